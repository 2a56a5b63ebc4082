"""Training of a CharLSTM: truncated backpropagation through time over parallel streams."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rnnfast.models.char_lstm import CharLSTM, State
from rnnfast.text import batches, streams

_WARM_UP = 0.05  # the part of the training in which the learning rate rises


@dataclass(frozen=True)
class TrainingOptions:
    """How a CharLSTM is trained.

    Attributes:
        seq_length: how many characters the gradient reaches back.
        batch_size: how many streams of text are read in parallel.
        epochs: how often the text is read.
        max_seconds: ends the training earlier, with the learning rate brought down in time.
        learning_rate: Adam's step size at its highest.
        clip: the largest norm of the gradient; longer ones are scaled down to it.
    """

    seq_length: int
    batch_size: int
    epochs: int
    max_seconds: float
    learning_rate: float
    clip: float


class Step(NamedTuple):
    """What one training step did."""

    bits_per_char: float
    characters: int


class Trainer:
    """A model with its optimiser, and the recurrent state it carries along the text."""

    def __init__(self, model: CharLSTM, learning_rate: float, clip: float) -> None:
        self.model = model
        self.optimiser = torch.optim.Adam(model.parameters(), learning_rate)
        self.clip = clip
        self.state: State | None = None

    def step(self, inputs: Tensor, targets: Tensor, learning_rate: float | None = None) -> Step:
        """Learn from one batch (B, T): forward, backward, clipping, Adam.

        Raises:
            ArithmeticError: the loss is not finite.
        """
        if learning_rate is not None:
            self.optimiser.param_groups[0]["lr"] = learning_rate
        logits, state = self.model(inputs, self.state)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimiser.step()
        self.state = (state[0].detach(), state[1].detach())
        bits = loss.item() / math.log(2)
        if not math.isfinite(bits):
            raise ArithmeticError(f"the loss became {bits}; a lower learning rate may help")
        return Step(bits, inputs.numel())


def train(model: CharLSTM, tokens: Tensor, options: TrainingOptions) -> Iterator[Step]:
    """Train a model on tokens (N,), yielding after every step.

    Raises:
        TextError: the text is too short for the batch size and sequence length.
        ArithmeticError: the loss is not finite.
    """
    seq_length, batch_size = options.seq_length, options.batch_size
    length = streams(tokens, batch_size, seq_length)[0].size(1)
    total = options.epochs * math.ceil(length / seq_length)
    trainer = Trainer(model, options.learning_rate, options.clip)
    model.train()
    done, start = 0, time.monotonic()
    for _ in range(options.epochs):
        trainer.state = None
        for inputs, targets in batches(tokens, batch_size, seq_length):
            elapsed = (time.monotonic() - start) / options.max_seconds
            if elapsed >= 1:
                return
            factor = one_cycle(progress(done / total, elapsed))
            yield trainer.step(inputs, targets, factor * options.learning_rate)
            done += 1


def progress(steps: float, seconds: float) -> float:
    """How far the training is, from the fractions of steps and of seconds that are used up.

    The clock counts from half-time on only, so that a training that ends by its steps well in
    time does not depend on the speed of the machine; it always arrives at 1 in time.
    """
    return max(steps, 2 * seconds - 1)


def one_cycle(progress: float) -> float:
    """The learning rate, relative to its highest: a short rise, then half a cosine down to 0."""
    if progress < _WARM_UP:
        return (progress + 0.01) / (_WARM_UP + 0.01)
    return 0.5 + 0.5 * math.cos(math.pi * (progress - _WARM_UP) / (1 - _WARM_UP))


@torch.inference_mode()
def evaluate(model: CharLSTM, tokens: Tensor, batch_size: int, seq_length: int) -> float:
    """Mean bits per character that a model needs for tokens (N,), without dropout.

    The text is read as in training, in `batch_size` streams or as many as it is long enough
    for; each starts from a state of zeros.

    Raises:
        TextError: the text has fewer than two characters.
    """
    batch_size = max(1, min(batch_size, (len(tokens) - 1) // seq_length))
    was_training = model.training
    model.eval()
    nats, characters, state = 0.0, 0, None
    for inputs, targets in batches(tokens, batch_size, min(seq_length, max(1, len(tokens) - 1))):
        logits, state = model(inputs, state)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        nats += loss.item()
        characters += targets.numel()
    model.train(was_training)
    return nats / characters / math.log(2)
