"""What the functions on tokens ask of their arguments."""

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
    """Turn tokens of any kind and shape into an int64 tensor, on the device they are on.

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
            hint = "; the `encode` of a vocabulary makes them of symbols"
            of_strings = array.dtype.kind == "U"
            raise TextError(
                f"expected integer tokens, got {array.dtype}{hint if of_strings else ''}"
            )
        # A copy in C order: torch knows no negative strides, nor arrays that are read-only.
        checked = torch.from_numpy(array.astype(np.int64, order="C"))
    if checked.numel():
        low, high = int(checked.min()), int(checked.max())
        if low < 0 or high >= vocab_size:
            raise TextError(f"expected tokens between 0 and {vocab_size - 1}, got {low} to {high}")
    return checked


def check_positive(**sizes: int) -> None:
    """Refuse a size that is not a positive integer, with a ValueError that names it."""
    for name, size in sizes.items():
        if not isinstance(size, Integral) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")


def as_strings(items: Iterable[Any]) -> list[str]:
    """List the strings of an iterable.

    Raises:
        TypeError: one is not a string, or the iterable is itself a string, whose items would be
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
    """An array of what was given; no tokens count as integers."""
    if isinstance(tokens, np.ndarray) or not isinstance(tokens, Iterable):
        return np.asarray(tokens)
    items = list(tokens)
    return np.array(items) if items else np.zeros(0, np.int64)
