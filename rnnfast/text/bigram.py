"""A bigram model, the baseline for character models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from rnnfast.text.errors import TextError

if TYPE_CHECKING:
    from numpy.typing import NDArray  # slow to import

_PIECE = 1 << 16  # minimum number of characters that are counted at once


def bigram_bits_per_char(
    train: Tensor | NDArray[np.integer], validation: Tensor | NDArray[np.integer], vocab_size: int
) -> float:
    """The loss on `validation` of a bigram model of `train`, in bits per character.

    The model is P(b | a) = (count(ab) + u(a) P(b)) / (count(a) + u(a)). Here u(a) is the number of
    distinct characters that follow a, and P(b) is the add-one unigram model (Witten and Bell,
    1991).

    Args:
        train: integers (N,), the training text.
        validation: integers (M,), the text to predict, or (B, M) for B texts.
        vocab_size: the number of distinct characters.

    Raises:
        TextError: either text has fewer than two characters.
    """
    train, validation = np.asarray(train), np.asarray(validation)
    if min(len(train), validation.shape[-1]) < 2:
        raise TextError(
            f"a bigram model needs texts of two characters or more, got {len(train)} to learn "
            f"from and {validation.shape[-1]} to predict"
        )
    counts = np.zeros(vocab_size * vocab_size)
    size = max(_PIECE, len(counts))
    for first in range(0, len(train) - 1, size):
        piece = train[first : first + size + 1].astype(np.int64)
        counts += np.bincount(piece[:-1] * vocab_size + piece[1:], minlength=len(counts))
    pairs = counts.reshape(vocab_size, vocab_size)
    unigram = np.bincount(train, minlength=vocab_size) + 1.0
    unigram /= unigram.sum()
    distinct = np.maximum((pairs > 0).sum(axis=1, keepdims=True), 1)
    probability = (pairs + distinct * unigram) / (pairs.sum(axis=1, keepdims=True) + distinct)
    return float(-np.log2(probability[validation[..., :-1], validation[..., 1:]]).mean())
