"""Translation of short texts, character by character, with a Seq2SeqLSTM."""

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
from rnnfast.models.schedule import Schedule, progress
from rnnfast.models.seq2seq import Seq2SeqConfig, Seq2SeqLSTM
from rnnfast.models.trainer import adam
from rnnfast.text import CharVocabulary, TextError, load_text

Pair = tuple[str, str]

_KEY = "rnnfast.Seq2SeqLSTM"
_PADDING, _START, _END = "<pad>", "<s>", "</s>"
_ROWS = 256  # approximate number of hypotheses in a batch


@dataclass(frozen=True)
class Translator:
    """A model with the vocabularies of its source and target texts.

    Attributes:
        model: the network.
        source: the vocabulary of the source texts.
        target: the vocabulary of the translations.
        max_length: the maximum number of characters in a translation.

    Raises:
        TextError: the target vocabulary lacks a special symbol.
        ValueError: the vocabularies do not fit the model, or `max_length` is not a positive
            integer.
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
        """Make an untrained translator whose vocabularies and `max_length` come from text pairs.

        Args:
            pairs: texts (source, target).
            hidden_size: see `Seq2SeqLSTM`.
            options: further keyword arguments of `Seq2SeqLSTM`.

        Raises:
            TextError: there are no pairs, or no characters in them.
            ValueError: the errors of `Seq2SeqLSTM`.
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
        """The device of the model."""
        return self.model.head.weight.device

    def translate(self, texts: Sequence[str], beam_size: int = 1) -> list[str]:
        """Translate texts. `beam_size` is that of `Seq2SeqLSTM.decode`.

        Raises:
            TextError: a text is empty, or has characters that the vocabulary lacks.
            ValueError: the errors of `Seq2SeqLSTM.decode`.
        """
        translations = []
        texts_at_once = max(1, _ROWS // max(1, beam_size))
        for first in range(0, len(texts), texts_at_once):
            sources, lengths = self.encode_sources(texts[first : first + texts_at_once])
            written = self.model.decode(
                sources,
                lengths,
                max_length=self.max_length + 1,  # including the end symbol
                beam_size=beam_size,
            )
            lengths = written.lengths.clamp(max=self.max_length)  # for texts without an end symbol
            rows = zip(written.tokens, lengths, strict=True)
            translations += [self.target.decode(row[:length]) for row, length in rows]
        return translations

    def encode_sources(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode B texts as padded tokens (B, S) on the model's device, and their lengths (B).

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
        """Encode B texts with their end symbols as padded tokens (B, T) on the model's device.

        Raises:
            TextError: a text has characters that the vocabulary lacks.
        """
        rows = [self.target.encode([*text, _END]) for text in texts]
        return self.target.pad(rows)[0].to(self.device)

    def save(self, path: str | Path) -> None:
        """Write the translator to one safetensors file (needs the extra cli).

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
        """Read a translator that `save` wrote (needs the extra cli).

        Args:
            path: the file, or a folder with a file named `model.safetensors`.
            device: the device of the model; the CPU if None.
            backend: see `Seq2SeqLSTM`.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: the file is damaged, or does not hold a translator.
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
            # The weights come from the file, so they are not initialised here.
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
    """Read text pairs from a UTF-8 file. Each line holds a source, a tab and its target.

    Raises:
        OSError: the file is missing or cannot be read.
        TextError: the file is not UTF-8, or a line does not hold a pair.
    """
    pairs = []
    for number, line in enumerate(load_text(path).removesuffix("\n").split("\n"), start=1):
        source, _, target = line.partition("\t")
        if not (source and target) or "\t" in target:
            raise TextError(f"{path}, line {number}: expected source, tab, target, got {line!r}")
        pairs.append((source, target))
    return pairs


def split_pairs(pairs: Sequence[Pair], validation: float) -> tuple[list[Pair], list[Pair]]:
    """Split pairs into training pairs and held-out pairs.

    A fraction `validation` of the distinct sources is held out, taken from the end. All pairs of a
    held-out source are held out, so the training sees none of them. Sources that differ only in
    leading or trailing blanks count as one. Duplicates of a held-out pair are removed.

    Raises:
        TextError: there are too few sources for both parts.
    """
    sources = list(dict.fromkeys(source.strip() for source, _ in pairs))
    cut = len(sources) - round(len(sources) * validation)
    if not 0 < cut < len(sources):
        raise TextError(
            f"too few pairs: {len(sources)} distinct sources, of which {validation:g} is held out"
        )
    kept = set(sources[cut:])
    learnt = [pair for pair in pairs if pair[0].strip() not in kept]
    return learnt, list(dict.fromkeys(pair for pair in pairs if pair[0].strip() in kept))


@dataclass(frozen=True)
class TrainingOptions:
    """The options of a training of a translator.

    Attributes:
        batch_size: the number of pairs in a step.
        epochs: the number of times that all pairs are seen.
        max_seconds: the time limit. The learning rate falls in time for it.
        learning_rate: Adam's step size at its maximum.
        clip: the maximum norm of the gradient; larger gradients are scaled down to it.
        teacher_forcing: the `teacher_forcing_ratio` of `Seq2SeqLSTM.forward`.
    """

    batch_size: int
    epochs: int
    max_seconds: float
    learning_rate: float
    clip: float
    teacher_forcing: float = 1.0


class Step(NamedTuple):
    """The result of one training step.

    Attributes:
        bits_per_char: the loss of the batch before the weights changed.
        characters: the number of target characters in the batch, including end symbols.
    """

    bits_per_char: float
    characters: int


def train(
    translator: Translator, pairs: Sequence[Pair], options: TrainingOptions
) -> Iterator[Step]:
    """Train on pairs, which are shuffled in each epoch; yield the result of every step.

    A step is forward, backward, clipping of the gradient, and Adam. The order of the pairs comes
    from torch's default generator.

    Raises:
        TextError: there are no pairs, a text has characters that the vocabularies lack, or a source
            is empty.
        ArithmeticError: the learning rate is too large for the weights' dtype; or, in a step, the
            loss is not finite.
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
    """Take the steps of `train`; `start` is the monotonic time of its beginning."""
    total = options.epochs * math.ceil(len(sources) / options.batch_size)
    done, elapsed = 0, 0.0
    schedule = Schedule("one-cycle", optimiser, lambda steps: progress(steps / total, elapsed))
    model.train()
    for _ in range(options.epochs):
        for rows in torch.randperm(len(sources), device="cpu").split(options.batch_size):
            elapsed = (time.monotonic() - start) / options.max_seconds
            if done and elapsed >= 1:
                return
            schedule.before_step(done)
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
    """The fraction of the sources whose translation equals the target exactly.

    Raises:
        TextError: the errors of `Translator.translate`.
        ValueError: there are no pairs, or the beam size is below 1.
    """
    if not pairs:
        raise ValueError("expected at least one pair, got none")
    translations = translator.translate([source for source, _ in pairs], beam_size)
    right = sum(text == target for text, (_, target) in zip(translations, pairs, strict=True))
    return right / len(pairs)
