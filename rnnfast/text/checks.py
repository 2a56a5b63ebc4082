"""Checks and conversions of the arguments of the text functions."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rnnfast.text.errors import TextError

if TYPE_CHECKING:
    from numpy.typing import NDArray  # slow to import


def as_tokens(tokens: Tensor | NDArray[Any] | Iterable[Any] | int, vocab_size: int) -> Tensor:
    """Turn tokens of any type and shape into an int64 tensor on the same device.

    Raises:
        TextError: the tokens are not integers between 0 and vocab_size - 1.
        ValueError: vocab_size is not a positive integer.
    """
    check_positive(vocab_size=vocab_size)
    if isinstance(tokens, Tensor):
        integers = not (tokens.is_floating_point() or tokens.is_complex())
        if not integers or tokens.dtype == torch.bool:
            raise TextError(f"expected integer tokens, got {tokens.dtype}")
        checked = tokens.to(torch.int64)
    else:
        array = _as_array(tokens)
        if array.dtype.kind not in "iu":
            hint = "; the `encode` method of a vocabulary turns symbols into tokens"
            of_strings = array.dtype.kind == "U"
            raise TextError(
                f"expected integer tokens, got {array.dtype}{hint if of_strings else ''}"
            )
        # Copies in C order, because torch supports neither negative strides nor read-only arrays.
        checked = torch.from_numpy(array.astype(np.int64, order="C"))
    if checked.numel():
        low, high = int(checked.min()), int(checked.max())
        if low < 0 or high >= vocab_size:
            raise TextError(f"expected tokens between 0 and {vocab_size - 1}, got {low} to {high}")
    return checked


def check_positive(**sizes: int) -> None:
    """Raise a ValueError that names the first size that is not a positive integer."""
    for name, size in sizes.items():
        if not isinstance(size, Integral) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")


def as_strings(items: Iterable[Any]) -> list[str]:
    """Turn an iterable of strings into a list.

    Raises:
        TypeError: an item is not a string, or the iterable is itself a string, whose items would be
            its characters.
    """
    if isinstance(items, str) or not isinstance(items, Iterable):
        raise TypeError(f"expected an iterable of strings, got {items!r:.50}")
    strings = list(items)
    for string in strings:
        if not isinstance(string, str):
            raise TypeError(f"expected strings, got {string!r:.50}")
    return strings


def _as_array(tokens: NDArray[Any] | Iterable[Any] | int) -> NDArray[Any]:
    """Turn tokens into an array; an empty iterable becomes an array of integers."""
    if isinstance(tokens, np.ndarray) or not isinstance(tokens, Iterable):
        return np.asarray(tokens)
    items = list(tokens)
    return np.array(items) if items else np.zeros(0, np.int64)
