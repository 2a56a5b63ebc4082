"""Reads texts, and cuts them into training data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from rnnfast.text.errors import TextError


def default_text() -> str:
    """The language reference that comes with CPython, about 465 KB of English prose."""
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def load_text(path: str | Path) -> str:
    """Read a UTF-8 text file. A byte order mark is dropped, and all line ends become newlines.

    Raises:
        OSError: the file is missing or cannot be read.
        TextError: the file is not UTF-8, or empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}; convert it first, "
            f"for example with iconv -t UTF-8"
        ) from None
    if not text:
        raise TextError(f"{path} is empty; expected a text to learn from")
    return text


def split(tokens: Tensor, validation: float = 0.1) -> tuple[Tensor, Tensor]:
    """Split tokens (N,) into a training part and, at the end, a validation part.

    Args:
        tokens: (N,).
        validation: the fraction of the tokens in the validation part.

    Raises:
        ValueError: the fraction is not between 0 and 1 (both excluded).
    """
    if not 0 < validation < 1:
        raise ValueError(f"validation must be a fraction between 0 and 1, got {validation}")
    cut = len(tokens) - round(len(tokens) * validation)
    return tokens[:cut], tokens[cut:]


def streams(tokens: Tensor, batch_size: int, seq_length: int) -> tuple[Tensor, Tensor]:
    """Arrange tokens (N,) as B = `batch_size` parallel streams of consecutive text.

    Returns inputs and targets, both (B, L) with L = (N - 1) // B. Row b continues the text where
    row b - 1 ends. `targets[:, t]` is the token that follows `inputs[:, t]`.

    Raises:
        TextError: the text is too short for one sequence of `seq_length` in every stream.
    """
    length = (len(tokens) - 1) // batch_size
    if length < seq_length:
        raise TextError(
            f"the text is too short: {len(tokens)} characters, but {batch_size} streams of "
            f"sequence length {seq_length} need {batch_size * seq_length + 1}; use a longer text, "
            f"or a smaller sequence length or batch size"
        )
    used = batch_size * length
    return tokens[:used].view(batch_size, length), tokens[1 : used + 1].view(batch_size, length)


def batches(tokens: Tensor, batch_size: int, seq_length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut the `streams` of tokens (N,) into batches for truncated backpropagation through time.

    Yields inputs and targets (B, seq_length); the last pair may be shorter. Each batch continues
    the previous one, so a recurrent state can be carried from batch to batch.

    Raises:
        TextError: the text is too short, see `streams`.
    """
    inputs, targets = streams(tokens, batch_size, seq_length)
    yield from zip(inputs.split(seq_length, 1), targets.split(seq_length, 1), strict=True)
