"""Vectors for tokens: one-hot vectors and co-occurrence counts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from torch import Tensor

from rnnfast.text.checks import as_tokens, check_positive
from rnnfast.text.errors import TextError
from rnnfast.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray  # slow to import


@overload
def one_hot(
    tokens: NDArray[np.integer], vocab_size: int | Vocabulary, dtype: DTypeLike | None = ...
) -> NDArray[Any]: ...


@overload
def one_hot(
    tokens: Tensor | int | str | Iterable[int] | Iterable[str],
    vocab_size: int | Vocabulary,
    dtype: torch.dtype | None = ...,
) -> Tensor: ...


def one_hot(tokens: Any, vocab_size: int | Vocabulary, dtype: Any = None) -> Any:
    """Turn each token into a vector with a one at the token's index and zeros elsewhere.

    >>> one_hot(torch.tensor([2, 0]), 3)
    tensor([[0., 0., 1.],
            [1., 0., 0.]])
    >>> one_hot(2, 3)
    tensor([0., 0., 1.])
    >>> from rnnfast.text import CharVocabulary
    >>> one_hot("b", CharVocabulary("abc"))
    tensor([0., 1., 0.])

    Args:
        tokens: an array or a tensor of integers of any shape; one integer; or, with a vocabulary,
            one symbol or several symbols. A string is one symbol, so pass
            ``vocabulary.encode(text)`` for a text.
        vocab_size: V, the length of the vectors; or a vocabulary of V symbols.
        dtype: the dtype of the result, NumPy's for an array and torch's otherwise; float32 if None.

    Returns:
        ``(*tokens.shape, V)``, or (V,) for one integer or symbol. An array gives an array. A tensor
        gives a tensor on the same device. Everything else gives a tensor on the CPU.

    Raises:
        TextError: the tokens are not integers between 0 and V - 1, the vocabulary lacks a symbol,
            or there are symbols but no vocabulary.
        TypeError: the vocabulary is a list or another container; see `WordVocabulary`.
        ValueError: V is not a positive integer.
    """
    if isinstance(vocab_size, Vocabulary):
        tokens, vocab_size = _numbers(tokens, vocab_size), len(vocab_size)
    elif isinstance(vocab_size, Iterable):
        raise TypeError(
            f"vocab_size should be an integer or a vocabulary, got {vocab_size!r:.50}: make "
            f"one with WordVocabulary(words) or CharVocabulary(text)"
        )
    checked = as_tokens(tokens, vocab_size).unsqueeze(-1)
    shape = (*checked.shape[:-1], vocab_size)
    if isinstance(tokens, np.ndarray):
        array: NDArray[Any] = np.zeros(shape, dtype or np.float32)
        np.put_along_axis(array, checked.numpy(), 1, -1)
        return array
    return torch.zeros(shape, dtype=dtype or torch.float32, device=checked.device).scatter_(
        -1, checked, 1
    )


def _numbers(tokens: Any, vocabulary: Vocabulary) -> Any:
    """Turn symbols into tokens; return tokens unchanged."""
    if not isinstance(tokens, Iterable) or isinstance(tokens, (Tensor, np.ndarray)):
        return tokens
    if not isinstance(tokens, str):
        items = list(tokens)
        return vocabulary.encode(items) if any(isinstance(item, str) for item in items) else items
    if tokens in vocabulary:
        return vocabulary.token(tokens)
    encoded = vocabulary.encode(tokens)
    if len(encoded) != 1:
        raise TextError(
            f"expected one symbol, got {tokens!r:.50}, a text of {len(encoded)}: "
            f"one_hot(vocabulary.encode(text), vocabulary) takes texts"
        )
    return encoded[0]


@overload
def cooccurrence(tokens: Tensor, vocab_size: int, window: int) -> Tensor: ...


@overload
def cooccurrence(
    tokens: NDArray[np.integer], vocab_size: int, window: int
) -> NDArray[np.int64]: ...


def cooccurrence(
    tokens: Tensor | NDArray[np.integer], vocab_size: int, window: int
) -> Tensor | NDArray[np.int64]:
    """Count how often each pair of tokens occurs within a window.

    C_ij is the number of pairs of positions (s, t) with tokens i and j and
    ``0 < |s - t| <= window``.
    C is symmetric. Two equal tokens i at positions s and t are the pairs (s, t) and (t, s), which
    add 2 to C_ii. Words that are used alike have similar rows in C (Lund and Burgess, 1996).

    Args:
        tokens: integers (T,), or (..., T) for several separate sequences. Padding is counted like
            every other token: ignore its row and column of C.
        vocab_size: V; the result has V ** 2 elements.
        window: the largest distance of a pair that is counted.

    Returns:
        int64 (V, V), an array for an array, a tensor on the same device for a tensor.

    Raises:
        TextError: the tokens are not integers between 0 and V - 1, or `tokens` is a single token.
        ValueError: V or window is not a positive integer.
    """
    check_positive(window=window)
    checked = as_tokens(tokens, vocab_size)
    if checked.dim() == 0:
        raise TextError("expected a sequence of tokens, got a single one")
    counts = checked.new_zeros(vocab_size**2)
    for distance in range(1, min(window, checked.size(-1) - 1) + 1):
        pairs = checked[..., :-distance] * vocab_size + checked[..., distance:]
        counts.scatter_add_(0, pairs.flatten(), torch.ones_like(pairs).flatten())
    counts = counts.view(vocab_size, vocab_size)
    counts = counts + counts.T
    return counts.numpy() if isinstance(tokens, np.ndarray) else counts
