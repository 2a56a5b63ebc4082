"""A vocabulary whose tokens are single characters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rnnfast.text.errors import TextError
from rnnfast.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from numpy.typing import NDArray  # slow to import

_PIECE = 1 << 16  # number of characters that are processed at once; they fit into the cache
_CODE_POINTS = 0x110000


class CharVocabulary(Vocabulary):
    """The distinct characters of a text, numbered in code point order.

    >>> vocabulary = CharVocabulary("hello")
    >>> vocabulary.characters
    'ehlo'
    >>> vocabulary.decode(vocabulary.encode("hole"))
    'hole'

    Args:
        characters: a text, or any iterable of characters.
        unknown: see `Vocabulary`.
        padding: see `Vocabulary`.
        special: see `Vocabulary`.

    Attributes:
        characters: the characters in token order, without the special symbols.

    Raises:
        TextError: there are no characters, or an item is not a single character; see also
            `Vocabulary`.
        TypeError: see `Vocabulary`.
    """

    _noun = "character"
    _separator = ""

    def __init__(
        self,
        characters: Iterable[str],
        *,
        unknown: str | None = None,
        padding: str | None = None,
        special: Sequence[str] = (),
    ) -> None:
        distinct = _distinct(characters) if isinstance(characters, str) else set(characters)
        super().__init__(sorted(distinct), unknown=unknown, padding=padding, special=special)
        for item in self._items:
            if len(item) != 1:
                raise TextError(f"a vocabulary is made of single characters, got {item!r}")
        self.characters = "".join(self._items)
        single = {ord(symbol): token for symbol, token in self._tokens.items() if len(symbol) == 1}
        default = -1 if unknown is None else self._tokens[unknown]
        # The last entry is for all code points beyond the largest known one.
        self._by_code_point = np.full(max(single) + 2, default)
        self._by_code_point[list(single)] = list(single.values())

    def encode(self, text: str | Iterable[str]) -> Tensor:
        """Turn a text, or an iterable of symbols, into tokens: int64 (T,) on the CPU.

        Raises:
            TextError, TypeError: see `Vocabulary.encode`.
        """
        if not isinstance(text, str):
            return super().encode(text)
        tokens, done = np.empty(len(text), np.int64), 0
        for codes in _code_points(text):
            self._by_code_point.take(codes, mode="clip", out=tokens[done : done + len(codes)])
            done += len(codes)
        if tokens.size and tokens.min() < 0:
            return super().encode(text)  # raises an error that names the unknown characters
        return torch.from_numpy(tokens)

    @staticmethod
    def _split(text: str) -> list[str]:
        return list(text)

    def _short(self) -> str:
        return repr(self.characters)


def _code_points(text: str) -> Iterator[NDArray[np.uint32]]:
    """The code points of a text, in pieces."""
    for first in range(0, len(text), _PIECE):
        piece = text[first : first + _PIECE].encode("utf-32-le", "surrogatepass")
        yield np.frombuffer(piece, "<u4")


def _distinct(text: str) -> set[str]:
    """The distinct characters of a text, faster than `set` does it for a long text."""
    if len(text) < _PIECE:
        return set(text)
    there = np.zeros(_CODE_POINTS, bool)
    for codes in _code_points(text):
        there[codes] = True
    return set(map(chr, there.nonzero()[0]))
