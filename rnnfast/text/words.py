"""A vocabulary whose tokens are words and punctuation marks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from rnnfast.text.checks import as_strings, check_positive
from rnnfast.text.errors import TextError
from rnnfast.text.vocabulary import Vocabulary, special_symbols

_WORD = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]")


def split_words(text: str) -> list[str]:
    r"""Split a text into words and punctuation marks; white space is dropped.

    A word is a run of letters, digits and underscores, with apostrophes between them. Every
    punctuation mark is an item of its own. The items are the matches of
    ``\w+(?:['\u2019]\w+)*|[^\w\s]``. The case is kept.

    >>> split_words("Don't stop, it's 9:30!")
    ["Don't", 'stop', ',', "it's", '9', ':', '30', '!']
    """
    return _WORD.findall(text)


class WordVocabulary(Vocabulary):
    """The words and punctuation marks of a text, in the order of decreasing frequency.

    Equally frequent words are in the order of their first occurrence.

    >>> vocabulary = WordVocabulary("the cat and the dog", max_size=3, unknown="<unk>")
    >>> vocabulary.words
    ('the', 'cat')
    >>> vocabulary.decode(vocabulary.encode("the dog"))
    'the <unk>'

    Args:
        words: a text, which `split_words` splits, or an iterable of words. A set has no order, so
            it is sorted first.
        min_count: the minimum number of occurrences of a word in the vocabulary.
        max_size: the maximum number of symbols, including the special ones; no limit if None.
        unknown: see `Vocabulary`.
        padding: see `Vocabulary`.
        special: see `Vocabulary`.

    Attributes:
        words: the words in token order, without the special symbols.

    Raises:
        TextError: no word is left, or a word is empty; see also `Vocabulary`.
        TypeError: see `Vocabulary`.
        ValueError: min_count or max_size is not a positive integer.
    """

    _noun = "word"
    _separator = " "

    def __init__(
        self,
        words: str | Iterable[str],
        *,
        min_count: int = 1,
        max_size: int | None = None,
        unknown: str | None = None,
        padding: str | None = None,
        special: Sequence[str] = (),
    ) -> None:
        reserved = special_symbols(unknown, padding, special)
        room = None
        check_positive(min_count=min_count)
        if max_size is not None:
            check_positive(max_size=max_size)
            room = max(max_size - len(reserved), 0)
        if isinstance(words, str):
            words = self._split(words)
        elif isinstance(words, (set, frozenset)):
            words = sorted(words)
        counts = Counter(word for word in as_strings(words) if word not in reserved)
        if "" in counts:
            raise TextError("a word has at least one character, got an empty one")
        frequent = [word for word, count in counts.most_common() if count >= min_count]
        super().__init__(frequent[:room], unknown=unknown, padding=padding, special=special)
        self.words = self._items

    @staticmethod
    def _split(text: str) -> list[str]:
        return split_words(text)

    def _short(self) -> str:
        shown = ", ".join(map(repr, self.words[:5]))
        return f"[{shown}{', ...' if len(self.words) > 5 else ''}]"
