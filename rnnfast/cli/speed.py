"""Compares the training speed of rnnfast.LSTM and torch.nn.LSTM in the same model."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable

from torch import Tensor, nn

import rnnfast
from rnnfast.cli.timing import compare, doubts
from rnnfast.models import CharLSTM
from rnnfast.models.training import Trainer, TrainingOptions
from rnnfast.text import batches

_WARM_UP, _ROUNDS, _SECONDS = 2, 17, 15.0


def compare_speed(
    model: CharLSTM,
    tokens: Tensor,
    options: TrainingOptions,
    backend: str,
    seconds_at_most: float = _SECONDS,
) -> dict[str, float]:
    """Measure the training speed in characters per second, from the median time of a step.

    Two copies of the model, one with each LSTM class, take turns in training steps on the same
    batch: forward, backward, clipping of the gradient, Adam. `rnnfast.LSTM` runs on `backend`. If
    the times vary too much to be trusted, there is a warning.
    """
    inputs, targets = next(batches(tokens, options.batch_size, options.seq_length))
    trainers = {
        f"rnnfast.LSTM ({backend})": _trainer(model, options, lstm=rnnfast.LSTM, backend=backend),
        "torch.nn.LSTM": _trainer(model, options, lstm=nn.LSTM, backend=None),
    }
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    deadline = time.perf_counter() + min(_SECONDS, seconds_at_most)
    for finished in range(_ROUNDS):
        if finished > _WARM_UP and time.perf_counter() > deadline:
            break
        for name, trainer in trainers.items():
            start = time.perf_counter()
            trainer.step(inputs, targets)
            seconds[name].append(time.perf_counter() - start)
    ours, theirs = (times[_WARM_UP:] for times in seconds.values())
    if words := doubts("" if compare(ours, theirs).agrees else "the training steps"):
        warnings.warn(f"the training speeds are in doubt: {words}", stacklevel=2)
    return {
        name: inputs.numel() / statistics.median(times)
        for name, times in zip(seconds, (ours, theirs), strict=True)
    }


def _trainer(
    model: CharLSTM, options: TrainingOptions, lstm: Callable[..., nn.RNNBase], backend: str | None
) -> Trainer:
    """A trainer for a copy of the model with the given class of LSTM layers."""
    copy = CharLSTM(
        **model.config._asdict(), device=model.head.weight.device, lstm=lstm, backend=backend
    )
    copy.load_state_dict(model.state_dict())
    return Trainer(copy, options.learning_rate, options.clip)
