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
    """The options of a training of a CharLSTM.

    Attributes:
        seq_length: the number of characters that the gradient reaches back.
        batch_size: the number of streams of text that are read in parallel.
        epochs: the number of times that the text is read.
        max_seconds: the time limit, which includes the validations. The learning rate falls in time
            for it.
        learning_rate: Adam's step size at its maximum.
        clip: the maximum norm of the gradient; larger gradients are scaled down to it.
        schedule: the learning-rate schedule, see `rnnfast.models.schedule.Schedule`.
        eval_every: the number of steps between validations. There is also one after each epoch;
            None adds no others.
        patience: the number of validations in a row without a better loss that ends the training;
            None never ends it.
        eval_characters: the approximate number of characters that a validation reads, spread over
            the held-out text; None for all.

    Raises:
        ValueError: a number is not greater than zero.
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
    """The figures of one step.

    Attributes:
        step: the number of this step, from 1.
        epoch: the number of its epoch, from 1.
        characters: the number of characters read so far.
        learning_rate: the learning rate of this step.
        bits_per_char: the loss of this step's batch before the weights changed.
        gradient_norm: the norm of the gradient before clipping.
        validation_bits_per_char: the loss of the held-out text after the step, or None if there was
            no validation.
    """

    step: int
    epoch: int
    characters: int
    learning_rate: float
    bits_per_char: float
    gradient_norm: float
    validation_bits_per_char: float | None


class Run:
    """A whole training; iterating over it takes the steps and yields a `Record` for each.

    `state_dict` holds everything that the remaining steps depend on. A run that is restored from it
    computes the same numbers as a run that was never interrupted. They agree bit for bit on the
    same kind of processor with the same number of threads. The only exception is a training that
    has used half of `max_seconds`: from then on its learning rate depends on the clock, see
    `rnnfast.models.schedule.progress`.

    An exception from `on_validation` ends the iteration. The interrupted validation is repeated
    when the run continues, either by another iteration or from its `state_dict`.

    Args:
        model: the model to train.
        tokens: int64 (N,), the training text.
        options: the options of the training.
        held_out: int64 (M,), the text of the validations; None for no validations.
        processes: the processes that train the model together. Each gets an equal part of the
            streams.

    Attributes:
        on_validation: if not None, called during a validation with the fraction that is done.
        total: the number of steps of the whole training, if nothing ends it earlier.
        steps: the number of steps taken so far.
        recorded: the number of steps whose record was yielded. It is one less than `steps` while
            the validation after the latest step is still to be repeated.
        seconds: the time of all steps and validations, including those before a resumption. The
            caller may add time of its own.
        characters: the number of characters read so far.
        best_bits, best_step: the lowest validation loss in bits per character (infinite before the
            first validation), and the step before it.
        last_bits: the latest validation loss, or 0 before the first validation.

    Raises:
        TextError: the text is too short for the batch size and sequence length.
        ValueError: the processes cannot share the batch evenly, or the schedule is unknown.
        OverflowError: the learning rate is too large for the weights' dtype.
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
        self._steps_per_epoch = math.ceil(inputs.size(1) / options.seq_length)
        self.total = options.epochs * self._steps_per_epoch
        self.steps, self.seconds = 0, 0.0
        self.best_bits, self.best_step, self.last_bits = math.inf, 0, 0.0
        self._best_weights: dict[str, Tensor] = {}
        self._validations_since_best = 0
        self._step_seconds: deque[float] = deque(maxlen=2)  # of the latest two steps
        self._validation_seconds = 0.0  # of the latest validation
        self._pending: Record | None = None  # record of a step whose validation is not done yet
        self._schedule = Schedule(options.schedule, self._trainer.optimiser, self._progress)

    @property
    def recorded(self) -> int:
        """The number of steps whose record was yielded."""
        return self.steps - (self._pending is not None)

    @property
    def characters(self) -> int:
        """The number of characters read so far."""
        epochs, position = divmod(self.steps, self._steps_per_epoch)
        in_epoch = position * self.options.seq_length * self.options.batch_size
        return epochs * self._characters_per_epoch + in_epoch

    @property
    def total_characters(self) -> int:
        """The number of characters that `total` steps read."""
        return self.options.epochs * self._characters_per_epoch

    @property
    def out_of_time(self) -> bool:
        """Whether another step and a validation would exceed `max_seconds`."""
        return self.steps > 0 and self.seconds >= self._seconds_of_steps

    @property
    def _seconds_of_steps(self) -> float:
        """The time, in seconds, by which the last step must begin."""
        step = min(self._step_seconds, default=0.0)  # the minimum: one may have been delayed
        return max(self.options.max_seconds - self._validation_seconds - step, _SHORTEST)

    @property
    def out_of_patience(self) -> bool:
        """Whether the last `patience` validations brought no better loss."""
        patience = self.options.patience
        return patience is not None and self._validations_since_best >= patience

    @property
    def ended(self) -> bool:
        """Whether the training is over."""
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
        try:
            while not self.ended:
                record = self._pending or self._advance(start)
                if self._validation_is_due():
                    self._pending = record
                    record = record._replace(validation_bits_per_char=self._validate())
                    self._count_seconds(start)
                    self._pending = None
                yield record
        finally:
            self._trainer.close()

    def evaluate(self) -> float:
        """The validation loss of the current weights; the run must have a held-out text."""
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
        """Take one step; `start` is the monotonic time at which `seconds` was 0."""
        options = self.options
        epoch, position = divmod(self.steps, self._steps_per_epoch)
        if position == 0:
            self._trainer.state = None
        self._schedule.before_step(self.steps)
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

    def _progress(self, steps: int) -> float:
        """The progress, from 0 to 1, when `steps` steps have just been taken."""
        return progress(steps / self.total, self.seconds / self._seconds_of_steps)

    def _count_seconds(self, start: float) -> None:
        """Update `seconds` to the maximum over the processes, so that all take the same steps."""
        (self.seconds,) = self.processes.highest(time.monotonic() - start)

    def _validation_is_due(self) -> bool:
        """Whether a validation is due: after an epoch, `eval_every` steps, or the time limit."""
        if self._held_out is None:
            return False
        every = self.options.eval_every
        return (
            self.steps % self._steps_per_epoch == 0
            or (every is not None and self.steps % every == 0)
            or self.out_of_time
        )

    def _validate(self) -> float:
        """Compute the validation loss, and keep a copy of the weights if it is the lowest."""
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
        """Load the weights of the best validation into the model, if there was a validation."""
        if self._best_weights:
            self.model.load_state_dict(self._best_weights)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the remaining steps depend on; all processes must call this together."""
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
        """Restore what `state_dict` returned, including torch's random states.

        Raises:
            KeyError, RuntimeError, TypeError, ValueError: the state does not fit this run.
        """
        device = self.processes.device
        own = state["processes"][self.processes.rank]
        self.model.load_state_dict(state["model"])
        self._trainer.optimiser.load_state_dict(state["optimiser"])
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
        self._schedule.load_state_dict(state["schedule"], self.steps)
        torch.set_rng_state(own["random"])
        if own["cuda_random"] is not None:
            torch.cuda.set_rng_state(own["cuda_random"], device)
