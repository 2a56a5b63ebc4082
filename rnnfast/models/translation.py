"""Translation of short texts, character by character: a Seq2SeqLSTM with its vocabularies."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rnnfast.models.atomic import write_atomically
from rnnfast.models.schedule import one_cycle, progress
from rnnfast.models.seq2seq import Seq2SeqConfig, Seq2SeqLSTM
from rnnfast.models.trainer import adam
from rnnfast.text import CharVocabulary, TextError, load_text

Pair = tuple[str, str]

_KEY = "rnnfast.Seq2SeqLSTM"
_PADDING, _START, _END = "<pad>", "<s>", "</s>"
_ROWS = 256  # hypotheses that are followed at a time, about


@dataclass(frozen=True)
class Translator:
    """A model, and the vocabularies of what it reads and of what it writes.

    Attributes:
        model: the network.
        source: the characters it reads.
        target: the characters it writes.
        max_length: the most characters that a translation may have.

    Raises:
        TextError: the target vocabulary lacks a special symbol.
        ValueError: the vocabularies do not fit the model, or `max_length` is no integer of 1 or
            more.
    """

    model: Seq2SeqLSTM
    source: CharVocabulary
    target: CharVocabulary
    max_length: int

    def __post_init__(self) -> None:
        config, target = self.model.config, self.target
        found = (
            *(config.input_vocab_size, config.output_vocab_size),
            *(config.padding_token, config.start_token, config.end_token),
        )
        special = [target.token(symbol) for symbol in (_PADDING, _START, _END)]
        if found != (len(self.source), len(target), *special):
            raise ValueError("the vocabularies do not fit the sizes and tokens of the model")
        if not isinstance(self.max_length, int) or self.max_length < 1:
            raise ValueError(f"max_length must be an integer of 1 or more, got {self.max_length!r}")

    @classmethod
    def for_pairs(cls, pairs: Sequence[Pair], hidden_size: int, **options: Any) -> Translator:
        """An untrained translator that knows the characters and the lengths of some pairs.

        Args:
            pairs: (source, target), texts.
            hidden_size: see `Seq2SeqLSTM`.
            options: other keywords of `Seq2SeqLSTM`.

        Raises:
            TextError: there are no pairs, or no characters in them.
            ValueError: as `Seq2SeqLSTM`.
        """
        if not pairs:
            raise TextError("expected at least one pair of texts, got none")
        sources, targets = ("".join(texts) for texts in zip(*pairs, strict=True))
        source = CharVocabulary(sources, padding=_PADDING)
        target = CharVocabulary(targets, padding=_PADDING, special=(_START, _END))
        model = Seq2SeqLSTM(
            len(source),
            len(target),
            hidden_size,
            padding_token=target.token(_PADDING),
            start_token=target.token(_START),
            end_token=target.token(_END),
            **options,
        )
        return cls(model, source, target, max(len(text) for _, text in pairs))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.head.weight.device

    def translate(self, texts: Sequence[str], beam_size: int = 1) -> list[str]:
        """Translate texts; `beam_size` as in `Seq2SeqLSTM.decode`.

        Raises:
            TextError: a text is empty, or has characters that the vocabulary lacks.
            ValueError: as `Seq2SeqLSTM.decode`.
        """
        translations = []
        texts_at_once = max(1, _ROWS // max(1, beam_size))
        for first in range(0, len(texts), texts_at_once):
            sources, lengths = self.encode_sources(texts[first : first + texts_at_once])
            written = self.model.decode(
                sources,
                lengths,
                max_length=self.max_length + 1,  # the end symbol
                beam_size=beam_size,
            )
            lengths = written.lengths.clamp(max=self.max_length)  # some may not have ended
            rows = zip(written.tokens, lengths, strict=True)
            translations += [self.target.decode(row[:length]) for row, length in rows]
        return translations

    def encode_sources(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The padded tokens (B, S) of B texts, on the model's device, and their lengths (B).

        Raises:
            TextError: a text is empty, or has characters that the vocabulary lacks.
        """
        rows = []
        for text in texts:
            if not text:
                raise TextError("expected a text of at least one character, got an empty one")
            try:
                rows.append(self.source.encode(text))
            except TextError as error:
                raise TextError(f"{text!r} cannot be read: {error}") from None
        tokens, lengths = self.source.pad(rows)
        return tokens.to(self.device), lengths

    def encode_targets(self, texts: Sequence[str]) -> Tensor:
        """The padded tokens (B, T) of B texts, each with its end symbol, on the model's device.

        Raises:
            TextError: a text has characters that the vocabulary lacks.
        """
        rows = [self.target.encode([*text, _END]) for text in texts]
        return self.target.pad(rows)[0].to(self.device)

    def save(self, path: str | Path) -> None:
        """Write all of this to one safetensors file (needs `rnnfast[cli]`).

        Raises:
            OSError: the file cannot be written.
        """
        from safetensors.torch import save

        description = {
            "config": self.model.config._asdict(),
            "source": self.source.state(),
            "target": self.target.state(),
            "max_length": self.max_length,
        }
        write_atomically(Path(path), save(self.model.state_dict(), {_KEY: json.dumps(description)}))

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: torch.device | str | None = None,
        backend: str | None = None,
    ) -> Translator:
        """Read what `save` wrote (needs `rnnfast[cli]`).

        Args:
            path: the file, or the folder in which it is named `model.safetensors`.
            device: where the model goes; the CPU if None.
            backend: see `Seq2SeqLSTM`.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: the file is damaged, or holds something else.
        """
        from rnnfast.models import checkpoint

        path = Path(path)
        if path.is_dir():
            path = path / checkpoint.FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{path.absolute()} does not exist; expected a file {checkpoint.FILE_NAME} of "
                f"rnnfast translate, or the folder that has it"
            )
        tensors, metadata = checkpoint.read(path)
        if _KEY not in metadata:
            raise checkpoint.CheckpointError(f"{path} is no translator: it does not name {_KEY}")
        try:
            description = checkpoint.parse(metadata[_KEY], Seq2SeqConfig)
            checkpoint.check_tensors(tensors, description["config"])
            source = CharVocabulary.from_state(description["source"])
            target = CharVocabulary.from_state(description["target"])
            # The weights come from the file: neither allocate nor draw them.
            model = Seq2SeqLSTM(**description["config"], device="meta", backend=backend)
            model.load_state_dict(tensors, assign=True)
            translator = cls(model, source, target, description["max_length"])
        except (ArithmeticError, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
            raise checkpoint.CheckpointError(
                f"{path} does not hold a whole translator: {reason}"
            ) from error
        model.to(device)
        return translator


def load_pairs(path: str | Path) -> list[Pair]:
    """Read pairs from a UTF-8 file: a source, a tab and its target on each line.

    Raises:
        OSError: the file is missing or cannot be read.
        TextError: the file is not UTF-8, or a line is not such a pair.
    """
    pairs = []
    for number, line in enumerate(load_text(path).removesuffix("\n").split("\n"), start=1):
        source, _, target = line.partition("\t")
        if not (source and target) or "\t" in target:
            raise TextError(f"{path}, line {number}: expected source, tab, target, got {line!r}")
        pairs.append((source, target))
    return pairs


def split_pairs(pairs: Sequence[Pair], validation: float) -> tuple[list[Pair], list[Pair]]:
    """Cut pairs into those to learn from and those to judge by, a fraction of the sources.

    The last of the distinct sources are held out, with all of their pairs, so that none of them is
    learnt. Blanks around a source do not count. A pair that is held out is so once.

    Raises:
        TextError: there are too few sources to have both.
    """
    sources = list(dict.fromkeys(source.strip() for source, _ in pairs))
    cut = len(sources) - round(len(sources) * validation)
    if not 0 < cut < len(sources):
        raise TextError(
            f"too few pairs, {len(sources)} by their sources, to keep {validation:g} of them"
        )
    kept = set(sources[cut:])
    learnt = [pair for pair in pairs if pair[0].strip() not in kept]
    return learnt, list(dict.fromkeys(pair for pair in pairs if pair[0].strip() in kept))


@dataclass(frozen=True)
class TrainingOptions:
    """How a translator is trained.

    Attributes:
        batch_size: how many pairs a step learns from.
        epochs: how often all pairs are seen.
        max_seconds: ends the training earlier, with the learning rate brought down in time.
        learning_rate: Adam's step size at its highest.
        clip: the largest norm of the gradient; longer ones are scaled down to it.
        teacher_forcing: see `Seq2SeqLSTM.forward`.
    """

    batch_size: int
    epochs: int
    max_seconds: float
    learning_rate: float
    clip: float
    teacher_forcing: float = 1.0


class Step(NamedTuple):
    """What one training step did.

    Attributes:
        bits_per_char: the loss of its batch, before the step.
        characters: how many target characters it learnt from, end symbols included.
    """

    bits_per_char: float
    characters: int


def train(
    translator: Translator, pairs: Sequence[Pair], options: TrainingOptions
) -> Iterator[Step]:
    """Learn from pairs, in an order drawn anew in each epoch; yields after every step.

    A step is forward, backward, clipping, Adam; the random numbers are torch's.

    Raises:
        TextError: there are no pairs, a text has characters that the vocabularies lack, or a source
            is empty.
        ArithmeticError: the learning rate is too large for the weights; in a step: the loss is not
            finite.
    """
    start = time.monotonic()
    sources, lengths = translator.encode_sources([source for source, _ in pairs])
    targets = translator.encode_targets([target for _, target in pairs])
    optimiser = adam(translator.model, options.learning_rate)
    return _steps(translator.model, sources, lengths, targets, options, optimiser, start)


def _steps(
    model: Seq2SeqLSTM,
    sources: Tensor,
    lengths: Tensor,
    targets: Tensor,
    options: TrainingOptions,
    optimiser: torch.optim.Adam,
    start: float,
) -> Iterator[Step]:
    """Take the steps of `train`; `start` is when the clock read 0."""
    total = options.epochs * math.ceil(len(sources) / options.batch_size)
    done = 0
    model.train()
    for _ in range(options.epochs):
        for rows in torch.randperm(len(sources), device="cpu").split(options.batch_size):
            elapsed = (time.monotonic() - start) / options.max_seconds
            if done and elapsed >= 1:
                return
            factor = one_cycle(progress(done / total, elapsed))
            optimiser.param_groups[0]["lr"] = factor * options.learning_rate
            source, target = sources[rows, : int(lengths[rows].max())], targets[rows]
            logits = model(source, target, lengths[rows], options.teacher_forcing)
            loss = model.loss(logits, target)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), options.clip)
            optimiser.step()
            bits = loss.item() / math.log(2)
            if not math.isfinite(bits):
                raise ArithmeticError(f"the loss became {bits}; a lower learning rate may help")
            yield Step(bits, int((target != model.config.padding_token).sum()))
            done += 1


def exact_match(translator: Translator, pairs: Sequence[Pair], beam_size: int = 1) -> float:
    """The fraction of the sources whose translation is the target, character for character.

    Raises:
        TextError: as `Translator.translate`.
        ValueError: there are no pairs, or the beam size is below 1.
    """
    if not pairs:
        raise ValueError("expected at least one pair, got none")
    translations = translator.translate([source for source, _ in pairs], beam_size)
    right = sum(text == target for text, (_, target) in zip(translations, pairs, strict=True))
    return right / len(pairs)
