"""The common base class of the vocabularies of characters and of words."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rnnfast.text.checks import as_strings, as_tokens
from rnnfast.text.errors import TextError

if TYPE_CHECKING:
    from numpy.typing import NDArray  # slow to import

AnyVocabulary = TypeVar("AnyVocabulary", bound="Vocabulary")


class Vocabulary(ABC):
    """Maps symbols to tokens, which are consecutive integers, and back.

    The special symbols come first, in the order `padding`, `unknown`, `special`; each is optional.
    The characters or words follow. A special symbol can be encoded like every other symbol, for
    example as the start or the end in a list of symbols.

    >>> from rnnfast.text import CharVocabulary
    >>> vocabulary = CharVocabulary("hello", padding="<pad>", special=("<s>", "</s>"))
    >>> vocabulary.symbols
    ('<pad>', '<s>', '</s>', 'e', 'h', 'l', 'o')
    >>> vocabulary.encode(["<s>", *"hole", "</s>"])
    tensor([1, 4, 6, 5, 3, 2])

    Args:
        items: distinct characters or words in token order.
        unknown: the symbol that replaces every item that is not in the vocabulary. If None, such an
            item is an error.
        padding: the symbol that `pad` appends to short sequences.
        special: further special symbols.

    Attributes:
        symbols: all symbols in token order.
        unknown: as given.
        padding: as given.
        special: as given, a tuple.

    Raises:
        TextError: there are no items, or a special symbol is empty or given twice.
        TypeError: an item or a special symbol is not a string.
    """

    _noun: ClassVar[str]
    _separator: ClassVar[str]

    def __init__(
        self,
        items: Iterable[str],
        *,
        unknown: str | None = None,
        padding: str | None = None,
        special: Sequence[str] = (),
    ) -> None:
        reserved = special_symbols(unknown, padding, special)
        self._items = tuple(item for item in as_strings(items) if item not in reserved)
        if not self._items:
            raise TextError(f"a vocabulary needs at least one {self._noun}, got none")
        self.unknown = unknown
        self.padding = padding
        self.special = tuple(special)
        self.symbols = reserved + self._items
        self._tokens = {symbol: token for token, symbol in enumerate(self.symbols)}
        self._first_item = len(reserved)

    @staticmethod
    @abstractmethod
    def _split(text: str) -> list[str]:
        """Split a text into items."""

    def __len__(self) -> int:
        return len(self.symbols)

    def __contains__(self, symbol: object) -> bool:
        return isinstance(symbol, str) and symbol in self._tokens

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.state() == other.state()

    def __hash__(self) -> int:
        return hash(self.symbols)

    def __repr__(self) -> str:
        options = {"unknown": self.unknown, "padding": self.padding, "special": self.special}
        given = "".join(f", {name}={value!r}" for name, value in options.items() if value)
        return f"{type(self).__name__}({self._short()}{given})"

    @abstractmethod
    def _short(self) -> str:
        """The items as `repr` shows them."""

    def token(self, symbol: str) -> int:
        """The token of one symbol, for example for `torch.nn.Embedding(padding_idx=...)`.

        Raises:
            TextError: the vocabulary lacks the symbol.
        """
        if symbol not in self:
            raise TextError(f"the vocabulary of {len(self)} lacks {symbol!r}")
        return self._tokens[symbol]

    def encode(self, text: str | Iterable[str]) -> Tensor:
        """Turn a text, or an iterable of symbols, into tokens: int64 (T,) on the CPU.

        Raises:
            TextError: the vocabulary lacks some items and has no `unknown` symbol. The message
                names the items.
            TypeError: the argument is neither a string nor an iterable of strings.
        """
        items = self._split(text) if isinstance(text, str) else as_strings(text)
        default = -1 if self.unknown is None else self._tokens[self.unknown]
        found = (self._tokens.get(item, default) for item in items)
        tokens = np.fromiter(found, np.int64, len(items))
        if tokens.size and tokens.min() < 0:
            unknown = sorted(set(items).difference(self._tokens))
            raise TextError(
                f"unknown {self._noun}s: the vocabulary of {len(self)} lacks "
                f"{', '.join(map(repr, unknown[:10]))}{', ...' if len(unknown) > 10 else ''} "
                f"(the first at position {int(tokens.argmin())})"
            )
        return torch.from_numpy(tokens)

    def decode(
        self,
        tokens: Tensor | NDArray[np.integer] | Iterable[int],
        *,
        skip_special: bool = False,
    ) -> str:
        """Turn tokens (T,) of any integer type back into a text.

        Characters give back the text that was encoded. Words are joined by single spaces, including
        before punctuation. The resulting text encodes to the same tokens if the words are those of
        `split_words`. Special symbols appear by their names.

        Args:
            tokens: T integers, on any device.
            skip_special: whether to leave out the special symbols, including `unknown`.

        Raises:
            TextError: the tokens are not one-dimensional integers between 0 and len(self) - 1.
        """
        first = self._first_item if skip_special else 0
        kept = [token for token in self._as_sequence(tokens).tolist() if token >= first]
        return self._separator.join([self.symbols[token] for token in kept])

    def pad(
        self, sequences: Iterable[Tensor | NDArray[np.integer] | Iterable[int]]
    ) -> tuple[Tensor, Tensor]:
        """Pad sequences of tokens to equal length, as one batch.

        >>> from rnnfast.text import CharVocabulary
        >>> vocabulary = CharVocabulary("abc", padding="<pad>")
        >>> vocabulary.pad([vocabulary.encode("ab"), vocabulary.encode("cab")])
        (tensor([[1, 2, 0],
                [3, 1, 2]]), tensor([2, 3]))

        Args:
            sequences: B sequences of tokens, each (T_b,).

        Returns:
            tokens (B, T) on the device of the sequences, where T is the largest T_b; and the
            lengths (B,) on the CPU, as `pack_padded_sequence` expects them. Both are int64.

        Raises:
            TextError: the vocabulary has no `padding` symbol, there are no sequences, or a sequence
                does not consist of tokens.
        """
        if self.padding is None:
            raise TextError("the vocabulary has no padding symbol; give it one: padding='<pad>'")
        checked = [self._as_sequence(sequence) for sequence in sequences]
        if not checked:
            raise TextError("expected at least one sequence to pad, got none")
        padded = pad_sequence(checked, batch_first=True, padding_value=self._tokens[self.padding])
        lengths = [len(sequence) for sequence in checked]
        return padded, torch.tensor(lengths, dtype=torch.int64, device="cpu")

    def _as_sequence(self, tokens: Tensor | NDArray[np.integer] | Iterable[int]) -> Tensor:
        """Check that tokens are a sequence (T,) of this vocabulary."""
        checked = as_tokens(tokens, len(self))
        if checked.dim() != 1:
            raise TextError(
                f"expected one-dimensional tokens, got tokens of shape {tuple(checked.shape)}"
            )
        return checked

    def state(self) -> dict[str, Any]:
        """A complete description of the vocabulary, in types that JSON supports."""
        return {
            "kind": type(self).__name__,
            "items": list(self._items),
            "unknown": self.unknown,
            "padding": self.padding,
            "special": list(self.special),
        }

    @classmethod
    def from_state(cls: type[AnyVocabulary], state: Any) -> AnyVocabulary:
        """Make the vocabulary that a state describes.

        `Vocabulary.from_state` makes a `CharVocabulary` or a `WordVocabulary`. If it is called on
        one of these classes, the state must be of that class.

        Raises:
            TextError: the state was not made by `state`, or is of the wrong class.
        """
        kinds = {kind.__name__: kind for kind in (cls, *cls.__subclasses__())}
        try:
            options = dict(state)
            kind, items = kinds[options.pop("kind")], options.pop("items")
            vocabulary = kind(items, **options)
        except (KeyError, TypeError, ValueError) as error:
            raise TextError(f"not the state of a {cls.__name__}: {error!r}") from error
        # The states differ if the constructor had to sort items or add missing keys.
        if vocabulary.state() != state:
            raise TextError(
                f"not the state of a {cls.__name__}: its items are not distinct and in order, or "
                f"its keys not {', '.join(vocabulary.state())}"
            )
        return vocabulary

    def save(self, path: str | Path) -> None:
        """Write the `state` to a file, as JSON.

        Raises:
            OSError: the file cannot be written.
        """
        Path(path).write_text(json.dumps(self.state()) + "\n", encoding="ascii")

    @classmethod
    def load(cls: type[AnyVocabulary], path: str | Path) -> AnyVocabulary:
        """Read a vocabulary that `save` wrote; see `from_state` for its class.

        Raises:
            OSError: the file cannot be read.
            TextError: the file is not JSON, or the errors of `from_state`.
        """
        try:
            return cls.from_state(json.loads(Path(path).read_text(encoding="ascii")))
        except (ValueError, RecursionError) as error:
            raise TextError(f"{path} is not a vocabulary: {error}") from error


def special_symbols(
    unknown: str | None, padding: str | None, special: Sequence[str]
) -> tuple[str, ...]:
    """The special symbols in token order."""
    named = [symbol for symbol in (padding, unknown) if symbol is not None]
    symbols = tuple(as_strings([*named, *as_strings(special)]))
    if "" in symbols or len(set(symbols)) < len(symbols):
        raise TextError(f"special symbols must be distinct and not empty, got {symbols}")
    return symbols
