"""Training of a CharLSTM: truncated backpropagation through time over parallel streams."""

from __future__ import annotations

import math
import operator
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnfast.models.char_lstm import CharLSTM
from rnnfast.models.processes import Processes
from rnnfast.models.schedule import Schedule, progress
from rnnfast.models.trainer import Trainer, evaluate, sample
from rnnfast.text import streams

_SHORTEST = 1e-9  # seconds

__all__ = ["Record", "Run", "Trainer", "TrainingOptions", "evaluate", "sample"]


@dataclass(frozen=True)
class TrainingOptions:
    """How a CharLSTM is trained.

    Attributes:
        seq_length: how many characters the gradient reaches back.
        batch_size: how many streams of text are read in parallel.
        epochs: how often the text is read.
        max_seconds: ends the training earlier, validations included, with the learning rate brought
            down in time.
        learning_rate: Adam's step size at its highest.
        clip: the largest norm of the gradient; longer ones are scaled down to it.
        schedule: how the learning rate changes, see `rnnfast.models.schedule.Schedule`.
        eval_every: steps between validations, besides the one after each epoch; None is no others.
        patience: ends the training after so many validations without a better loss; None never.
        eval_characters: how many characters a validation reads, about, spread over the held-out
            text; None for all.

    Raises:
        ValueError: a number is not above zero.
    """

    seq_length: int
    batch_size: int
    epochs: int
    max_seconds: float
    learning_rate: float
    clip: float
    schedule: str = "one-cycle"
    eval_every: int | None = None
    patience: int | None = None
    eval_characters: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (value is None or isinstance(value, str) or value > 0):
                raise ValueError(f"{name} must be greater than zero, got {value}")


class Record(NamedTuple):
    """What is known after a step.

    Attributes:
        step: how many steps have been taken.
        epoch: which reading of the text it was in, from 1.
        characters: how many have been read.
        learning_rate: of this step.
        bits_per_char: the loss of this step's batch, before the step.
        gradient_norm: before clipping.
        validation_bits_per_char: of the held-out text after the step, if it was looked at.
    """

    step: int
    epoch: int
    characters: int
    learning_rate: float
    bits_per_char: float
    gradient_norm: float
    validation_bits_per_char: float | None


class Run:
    """A training from its first to its last step; iterate over it to take the steps.

    `state_dict` between two steps holds all that the rest depends on. A run that goes on from it
    computes the same numbers as one that was never interrupted, bit for bit on the same kind of
    processor with the same number of threads, unless the clock interferes: `max_seconds` counts
    from half-time on, see `rnnfast.models.schedule.progress`.

    What `on_validation` raises ends the iteration. A validation that was ended so is done anew
    when the run goes on, whether by another iteration or from its `state_dict`.

    Args:
        model: what learns.
        tokens: int64 (N,), the text to learn.
        options: how.
        held_out: int64 (M,), the text to judge by; None for a training without validation.
        processes: share the streams of a batch evenly, and agree in all else.

    Attributes:
        on_validation: if not None, is told in the course of a validation which part of it is done.
        total: how many steps there will be, if nothing ends the training earlier.
        steps: how many have been taken.
        recorded: of how many the record was given out: of all, unless the validation that follows
            the last one was ended.
        seconds: the time they took, with the validations, over all resumptions; more can be added.
        characters: how many they have read.
        best_bits, best_step: the lowest validation loss in bits per character, infinite before the
            first, and the step it came after.
        last_bits: the latest validation loss, 0 before the first.

    Raises:
        TextError: the text is too short for the batch size and sequence length.
        ValueError: the processes cannot share the batch evenly, or the schedule is unknown.
        OverflowError: the learning rate is beyond the range of the weights' dtype.
    """

    def __init__(
        self,
        model: CharLSTM,
        tokens: Tensor,
        options: TrainingOptions,
        held_out: Tensor | None = None,
        processes: Processes = Processes(),  # noqa: B008, it is immutable
    ) -> None:
        if options.batch_size % processes.size:
            raise ValueError(
                f"{processes.size} processes cannot share a batch size of {options.batch_size} "
                f"evenly; expected a multiple of {processes.size}"
            )
        self.model, self.options, self.processes = model, options, processes
        self.on_validation: Callable[[float], None] | None = None
        self._held_out = held_out
        inputs, targets = streams(tokens, options.batch_size, options.seq_length)
        self._characters_per_epoch = inputs.numel()
        self._inputs, self._targets = processes.share(inputs), processes.share(targets)
        self._trainer = Trainer(model, options.learning_rate, options.clip, processes)
        self._schedule = Schedule(options.schedule, self._trainer.optimiser)
        self._steps_per_epoch = math.ceil(inputs.size(1) / options.seq_length)
        self.total = options.epochs * self._steps_per_epoch
        self.steps, self.seconds = 0, 0.0
        self.best_bits, self.best_step, self.last_bits = math.inf, 0, 0.0
        self._best_weights: dict[str, Tensor] = {}
        self._validations_since_best = 0
        self._step_seconds: deque[float] = deque(maxlen=2)  # what the latest took
        self._validation_seconds = 0.0  # what the latest took
        self._pending: Record | None = None  # of a step whose validation is still to come

    @property
    def recorded(self) -> int:
        """Of how many steps the record was given out."""
        return self.steps - (self._pending is not None)

    @property
    def characters(self) -> int:
        """How many have been read."""
        epochs, position = divmod(self.steps, self._steps_per_epoch)
        in_epoch = position * self.options.seq_length * self.options.batch_size
        return epochs * self._characters_per_epoch + in_epoch

    @property
    def total_characters(self) -> int:
        """How many will have been read after `total` steps."""
        return self.options.epochs * self._characters_per_epoch

    @property
    def out_of_time(self) -> bool:
        """Whether another step, and a validation, would take longer than `max_seconds`."""
        return self.steps > 0 and self.seconds >= self._seconds_of_steps

    @property
    def _seconds_of_steps(self) -> float:
        """When the last step has to begin."""
        step = min(self._step_seconds, default=0.0)  # of two: one may have been held up
        return max(self.options.max_seconds - self._validation_seconds - step, _SHORTEST)

    @property
    def out_of_patience(self) -> bool:
        """Whether the last `patience` validations brought no better loss."""
        patience = self.options.patience
        return patience is not None and self._validations_since_best >= patience

    @property
    def ended(self) -> bool:
        """Whether there will be no more steps."""
        if self._pending is not None:
            return False
        return self.steps >= self.total or self.out_of_time or self.out_of_patience

    def __iter__(self) -> Iterator[Record]:
        """Take the remaining steps.

        Raises:
            ArithmeticError: a loss is not finite.
        """
        start = time.monotonic() - self.seconds
        self.model.train()
        while not self.ended:
            record = self._pending or self._advance(start)
            if self._validation_is_due():
                self._pending = record
                record = record._replace(validation_bits_per_char=self._validate())
                self._count_seconds(start)
                self._pending = None
            yield record

    def evaluate(self) -> float:
        """The mean bits per character of what validations read; there must be a held-out text."""
        assert self._held_out is not None
        options, start = self.options, time.monotonic()
        bits = evaluate(
            self.model,
            self._held_out,
            options.batch_size,
            options.seq_length,
            self.processes,
            limit=options.eval_characters,
            on_batch=self.on_validation,
        )
        (self._validation_seconds,) = self.processes.highest(time.monotonic() - start)
        return bits

    def _advance(self, start: float) -> Record:
        """One step; `start` is when the clock read 0."""
        options = self.options
        epoch, position = divmod(self.steps, self._steps_per_epoch)
        if position == 0:
            self._trainer.state = None
        self._schedule.before_step(
            progress(self.steps / self.total, self.seconds / self._seconds_of_steps)
        )
        learning_rate = self._trainer.optimiser.param_groups[0]["lr"]
        columns = slice(position * options.seq_length, (position + 1) * options.seq_length)
        step = self._trainer.step(self._inputs[:, columns], self._targets[:, columns])
        self.steps += 1
        before = self.seconds
        self._count_seconds(start)
        self._step_seconds.append(self.seconds - before)
        return Record(
            self.steps,
            epoch + 1,
            self.characters,
            learning_rate,
            step.bits_per_char,
            step.gradient_norm,
            None,
        )

    def _count_seconds(self, start: float) -> None:
        """Read the clock, which all processes have to agree on."""
        (self.seconds,) = self.processes.highest(time.monotonic() - start)

    def _validation_is_due(self) -> bool:
        """After every epoch and every `eval_every` steps, and when the time is over."""
        if self._held_out is None:
            return False
        every = self.options.eval_every
        return (
            self.steps % self._steps_per_epoch == 0
            or (every is not None and self.steps % every == 0)
            or self.out_of_time
        )

    def _validate(self) -> float:
        """Look at the held-out text, and remember the weights if they are the best so far."""
        bits = self.evaluate()
        if not math.isfinite(bits):
            raise ArithmeticError(
                f"the validation loss became {bits}; a lower learning rate may help"
            )
        self.last_bits = bits
        self._schedule.after_validation(bits)
        self._validations_since_best += 1
        if bits < self.best_bits:
            self.best_bits, self.best_step = bits, self.steps
            self._best_weights = {k: v.clone() for k, v in self.model.state_dict().items()}
            self._validations_since_best = 0
        return bits

    def restore_best(self) -> None:
        """Give the model the weights of the best validation, if there was one."""
        if self._best_weights:
            self.model.load_state_dict(self._best_weights)

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on; every process must ask for it."""
        device = self.processes.device
        hidden = self._trainer.state
        own = {
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "hidden": None if hidden is None else [tensor.cpu() for tensor in hidden],
        }
        return {
            "steps": self.steps,
            "seconds": self.seconds,
            "best_bits": self.best_bits,
            "best_step": self.best_step,
            "last_bits": self.last_bits,
            "best_weights": self._best_weights,
            "validations_since_best": self._validations_since_best,
            "pending": None if self._pending is None else list(self._pending),
            "model": self.model.state_dict(),
            "optimiser": self._trainer.optimiser.state_dict(),
            "schedule": self._schedule.state_dict(),
            "processes": self.processes.gather(own),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned; this also sets torch's random states.

        Raises:
            KeyError, RuntimeError, TypeError, ValueError: it is the state of something else.
        """
        device = self.processes.device
        own = state["processes"][self.processes.rank]
        self.model.load_state_dict(state["model"])
        self._trainer.optimiser.load_state_dict(state["optimiser"])
        self._schedule.load_state_dict(state["schedule"])
        self._trainer.state = None
        if own["hidden"] is not None:
            h, c = own["hidden"]
            self._trainer.state = (h.to(device), c.to(device))
        self.steps, self.seconds = operator.index(state["steps"]), float(state["seconds"])
        self.best_bits = float(state["best_bits"])
        self.best_step = operator.index(state["best_step"])
        self.last_bits = float(state["last_bits"])
        self._best_weights = dict(state["best_weights"])
        self._validations_since_best = operator.index(state["validations_since_best"])
        self._pending = None if state["pending"] is None else Record(*state["pending"])
        torch.set_rng_state(own["random"])
        if own["cuda_random"] is not None:
            torch.cuda.set_rng_state(own["cuda_random"], device)
