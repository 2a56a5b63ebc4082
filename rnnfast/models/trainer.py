"""One step of training a CharLSTM, and its loss on another text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rnnfast.models.char_lstm import CharLSTM, State
from rnnfast.models.processes import Processes
from rnnfast.text import streams


class Step(NamedTuple):
    """What one training step did, in all processes together."""

    bits_per_char: float
    characters: int
    gradient_norm: float


class Trainer:
    """A model with its optimiser, and the recurrent state it carries along the text.

    Args:
        model: what learns.
        learning_rate: Adam's step size.
        clip: the largest norm of the gradient; longer ones are scaled down to it.
        processes: each has an equal part of the batch; they start from the same weights, and
            average their gradients.

    Raises:
        OverflowError: the learning rate is beyond the range of the weights' dtype.
    """

    def __init__(
        self,
        model: CharLSTM,
        learning_rate: float,
        clip: float,
        processes: Processes = Processes(),  # noqa: B008, it is immutable
    ) -> None:
        self.model = model
        self.optimiser = adam(model, learning_rate)
        self.clip = clip
        self.state: State | None = None
        self._processes = processes

    def step(self, inputs: Tensor, targets: Tensor) -> Step:
        """Learn from one batch, or this process' part (B, T): forward, backward, clipping, Adam.

        Raises:
            ArithmeticError: the loss or its gradient is not finite; the weights are as they were.
        """
        logits, state = self.model(inputs, self.state)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.optimiser.zero_grad()
        loss.backward()
        self._processes.average_gradients(self.model)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip).item()
        # Agreed before anyone may raise, else the others would wait for this process.
        nats, characters = self._processes.sum(loss.item() / self._processes.size, inputs.numel())
        for name, value in (("loss", nats / math.log(2)), ("gradient's norm", norm)):
            if not math.isfinite(value):
                raise ArithmeticError(f"the {name} became {value}; a lower learning rate may help")
        self.optimiser.step()
        self.state = (state[0].detach(), state[1].detach())
        return Step(nats / math.log(2), round(characters), norm)


def adam(model: nn.Module, learning_rate: float) -> torch.optim.Adam:
    """Adam for all parameters of a model.

    Raises:
        OverflowError: the learning rate is beyond the range of the weights' dtype.
    """
    optimiser = torch.optim.Adam(model.parameters(), learning_rate)
    # Adam's first step is the learning rate over 1 - beta1.
    largest_step = learning_rate / (1 - optimiser.defaults["betas"][0])
    dtype = next(model.parameters()).dtype
    if largest_step > torch.finfo(dtype).max:
        raise OverflowError(
            f"Adam's steps overflow {dtype} at a learning rate of {learning_rate:g}; "
            f"a lower learning rate may help"
        )
    return optimiser


def sample(tokens: Tensor, batch_size: int, seq_length: int, limit: int | None = None) -> Tensor:
    """The part of a text that `evaluate` reads: (B, L + 1), L characters and what follows each.

    The rows are the beginnings of `batch_size` streams of equal length, or of as many as the text
    is long enough for: the sample is spread over the whole text.

    Args:
        tokens: (N,).
        batch_size: B, at most.
        seq_length: the length that a row has at least, if the text is that long.
        limit: how many characters are read, about; None for all.

    Raises:
        TextError: the text has fewer than two characters.
    """
    batch_size = max(1, min(batch_size, (len(tokens) - 1) // seq_length))
    inputs, _ = streams(tokens, batch_size, min(seq_length, max(1, len(tokens) - 1)))
    length = inputs.size(1)
    columns = length if limit is None else min(length, max(seq_length, limit // batch_size))
    return tokens.unfold(0, columns + 1, length)[:batch_size]


@torch.inference_mode()
def evaluate(
    model: CharLSTM,
    tokens: Tensor,
    batch_size: int,
    seq_length: int,
    processes: Processes = Processes(),  # noqa: B008, it is immutable
    *,
    limit: int | None = None,
    on_batch: Callable[[float], None] | None = None,
) -> float:
    """Mean bits per character that a model needs for tokens (N,), without dropout.

    The text is read as in training, in `batch_size` streams or as many as it is long enough
    for; each starts from a state of zeros. The processes share the streams.

    Args:
        model: what is judged.
        tokens: int64 (N,).
        batch_size: how many streams are read in parallel.
        seq_length: how many characters of each are read at a time.
        processes: share the streams.
        limit: how many characters are read, about, see `sample`; None for all.
        on_batch: is told after each batch which part of the work is done; what it raises ends the
            evaluation.

    Raises:
        TextError: the text has fewer than two characters.
    """
    rows = sample(tokens, batch_size, seq_length, limit)
    own = processes.share(rows)
    was_training = model.training
    model.eval()
    nats, characters, state = 0.0, 0, None
    length = rows.size(1) - 1
    try:
        for first in range(0, length, seq_length):
            last = min(length, first + seq_length)
            inputs, targets = own[:, first:last], own[:, first + 1 : last + 1]
            if len(own):  # else there are fewer streams than processes
                logits, state = model(inputs, state)
                loss = nn.functional.cross_entropy(
                    logits.flatten(0, 1), targets.flatten(), reduction="sum"
                )
                nats += loss.item()
                characters += targets.numel()
            if on_batch is not None:
                on_batch(last / length)
    finally:
        model.train(was_training)
    all_nats, all_characters = processes.sum(nats, characters)
    return all_nats / all_characters / math.log(2)
