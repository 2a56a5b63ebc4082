"""A vocabulary whose tokens are single characters."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rnnfast.text.errors import TextError


class CharVocabulary:
    """The distinct characters of a text, numbered in code point order.

    >>> vocabulary = CharVocabulary("hello")
    >>> vocabulary.characters
    'ehlo'
    >>> vocabulary.decode(vocabulary.encode("hole"))
    'hole'
    """

    def __init__(self, characters: Iterable[str]) -> None:
        """Collect the distinct characters of a text (or of any iterable of characters).

        Raises:
            TextError: there is no character, or an item is not a single character.
        """
        distinct = sorted(set(characters))
        if not distinct:
            raise TextError("a vocabulary needs at least one character, got none")
        for item in distinct:
            if len(item) != 1:
                raise TextError(f"a vocabulary is made of single characters, got {item!r}")
        self.characters = "".join(distinct)
        self._code_points = _code_points(self.characters)

    def __len__(self) -> int:
        return len(self.characters)

    def __contains__(self, character: object) -> bool:
        return isinstance(character, str) and len(character) == 1 and character in self.characters

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CharVocabulary) and self.characters == other.characters

    def __hash__(self) -> int:
        return hash(self.characters)

    def __repr__(self) -> str:
        return f"CharVocabulary({self.characters!r})"

    def encode(self, text: str) -> Tensor:
        """Turn a text of length T into its tokens, an int64 tensor (T,).

        Raises:
            TextError: the text has characters that the vocabulary lacks; the message names them.
        """
        code_points = _code_points(text)
        tokens = np.searchsorted(self._code_points, code_points)
        tokens[tokens == len(self)] = 0
        known = self._code_points[tokens] == code_points
        if not known.all():
            first = int(np.argmin(known))
            unknown = sorted(set(text) - set(self.characters))
            raise TextError(
                f"unknown characters: the vocabulary of {len(self)} lacks "
                f"{', '.join(map(repr, unknown[:10]))}{', ...' if len(unknown) > 10 else ''} "
                f"(the first at position {first})"
            )
        return torch.from_numpy(tokens.astype(np.int64, copy=False))

    def decode(self, tokens: Tensor | NDArray[np.integer] | Iterable[int]) -> str:
        """Turn tokens (T,), of any integer type, back into a text.

        Raises:
            TextError: the tokens are not one-dimensional integers between 0 and len(self) - 1.
        """
        if isinstance(tokens, Tensor):
            tokens = tokens.cpu().numpy()
        elif not isinstance(tokens, np.ndarray):
            tokens = np.array(list(tokens), dtype=np.int64)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise TextError(
                f"expected one-dimensional integer tokens, got {tokens.dtype} of shape "
                f"{tokens.shape}"
            )
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < len(self):
            raise TextError(
                f"expected tokens between 0 and {len(self) - 1}, got {tokens.min()} to "
                f"{tokens.max()}"
            )
        return "".join(self.characters[token] for token in tokens.tolist())

    def save(self, path: str | Path) -> None:
        """Write the characters to a file, as a JSON string in token order."""
        Path(path).write_text(json.dumps(self.characters) + "\n", encoding="ascii")

    @classmethod
    def load(cls, path: str | Path) -> CharVocabulary:
        """Read back what `save` wrote.

        Raises:
            OSError: the file cannot be read.
            TextError: the file is not a JSON string of distinct characters in token order.
        """
        try:
            characters = json.loads(Path(path).read_text(encoding="ascii"))
        except ValueError as error:
            raise TextError(f"{path} is not a vocabulary: {error}") from None
        if not isinstance(characters, str) or list(characters) != sorted(set(characters)):
            raise TextError(
                f"{path} is not a vocabulary: expected a string of distinct characters in code "
                f"point order"
            )
        return cls(characters)


def _code_points(text: str) -> NDArray[np.uint32]:
    """The code points of a text, uint32 (T,); lone surrogates count as characters."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
