"""A vocabulary whose tokens are single characters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rnnfast.text.errors import TextError
from rnnfast.text.vocabulary import Vocabulary


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
        TextError: there is no character, or an item is not a single one; see also `Vocabulary`.
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
        distinct = sorted(set(characters))
        super().__init__(distinct, unknown=unknown, padding=padding, special=special)
        for item in self._items:
            if len(item) != 1:
                raise TextError(f"a vocabulary is made of single characters, got {item!r}")
        self.characters = "".join(self._items)

    @staticmethod
    def _split(text: str) -> list[str]:
        return list(text)

    def _short(self) -> str:
        return repr(self.characters)
