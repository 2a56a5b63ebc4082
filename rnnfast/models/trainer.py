"""Training steps of a CharLSTM, and its loss on a held-out text."""

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
    """The result of one training step, over all processes."""

    bits_per_char: float
    characters: int
    gradient_norm: float


class Trainer:
    """A model, its optimiser, and the recurrent state that is carried from batch to batch.

    Args:
        model: the model to train.
        learning_rate: Adam's step size.
        clip: the maximum norm of the gradient; larger gradients are scaled down to it.
        processes: each process gets an equal part of every batch. DistributedDataParallel gives all
            of them the same weights and averages their gradients.

    Raises:
        OverflowError: the learning rate is too large for the weights' dtype.
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
        self._parallel: nn.Module | None = None

    def step(self, inputs: Tensor, targets: Tensor) -> Step:
        """Take one step: forward, backward, clipping of the gradient, Adam.

        Args:
            inputs: this process' part (B, T) of the batch.
            targets: the next token after each input (B, T).

        Raises:
            ArithmeticError: the loss or the norm of its gradient is not finite. The weights remain
                unchanged.
        """
        if self._parallel is None:
            self._parallel = self._connect(inputs, targets)
        loss, state = self._loss(self._parallel, inputs, targets)
        self.optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip).item()
        # All processes raise, or none does: the others would wait for a process that raised alone.
        nats, characters = self._processes.sum(loss.item() / self._processes.size, inputs.numel())
        for name, value in (("loss", nats / math.log(2)), ("gradient's norm", norm)):
            if not math.isfinite(value):
                raise ArithmeticError(f"the {name} became {value}; a lower learning rate may help")
        self.optimiser.step()
        self.state = (state[0].detach(), state[1].detach())
        return Step(nats / math.log(2), round(characters), norm)

    def close(self) -> None:
        """Free the DistributedDataParallel wrapper; a later `step` makes another one.

        The process group must not be destroyed while there is a wrapper.
        """
        self._parallel = None

    def _connect(self, inputs: Tensor, targets: Tensor) -> nn.Module:
        """Wrap the model for data-parallel training.

        DistributedDataParallel rearranges its gradient buckets after the first backward pass. Sums
        over three or more processes then round differently. The first pass is therefore a rehearsal
        without a step; otherwise a resumed training would differ from an uninterrupted one.
        """
        model = self._processes.data_parallel(self.model)
        if model is not self.model:
            with torch.random.fork_rng([inputs.device] if inputs.is_cuda else []):
                self._loss(model, inputs, targets)[0].backward()
        return model

    def _loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, State]:
        """The mean loss of a batch in nats, and the recurrent state after it."""
        logits, state = model(inputs, self.state)
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()), state


def adam(model: nn.Module, learning_rate: float) -> torch.optim.Adam:
    """Adam for all parameters of a model.

    Raises:
        OverflowError: the learning rate is too large for the weights' dtype.
    """
    optimiser = torch.optim.Adam(model.parameters(), learning_rate)
    # Adam divides the learning rate by 1 - beta1 in its first step.
    largest_step = learning_rate / (1 - optimiser.defaults["betas"][0])
    dtype = next(model.parameters()).dtype
    if largest_step > torch.finfo(dtype).max:
        raise OverflowError(
            f"Adam's steps overflow {dtype} at a learning rate of {learning_rate:g}; "
            f"a lower learning rate may help"
        )
    return optimiser


def sample(tokens: Tensor, batch_size: int, seq_length: int, limit: int | None = None) -> Tensor:
    """The part of a text that `evaluate` reads, spread over the whole text.

    The text is cut into B streams of equal length. A row holds the first L + 1 tokens of a stream:
    L inputs, and the token that follows the last of them.

    Args:
        tokens: int64 (N,).
        batch_size: the largest B. A text that is too short for it gets fewer streams.
        seq_length: the smallest L, unless the text is shorter.
        limit: the approximate number of inputs in all rows; None for the whole text.

    Returns:
        (B, L + 1).

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
    """The mean loss of a model on a text, in bits per character, without dropout.

    The text is read as in training, in parallel streams (see `sample`). Each stream starts from a
    state of zeros.

    Args:
        model: the model to evaluate.
        tokens: int64 (N,).
        batch_size: the number of streams, if the text is long enough for them.
        seq_length: the number of characters of each stream in one call of the model.
        processes: the processes, which share the streams.
        limit: the approximate number of characters to read; None for all.
        on_batch: called after each batch with the fraction of the work that is done. If it raises
            an exception, the evaluation ends.

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
