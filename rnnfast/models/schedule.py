"""Learning-rate schedules for a training that ends by its steps or by the clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

_WARM_UP = 0.05  # fraction of the training in which the learning rate rises


def progress(steps: float, seconds: float) -> float:
    """How far a training is, from 0 to 1, given the used fractions of its steps and its seconds.

    The clock has no effect in the first half of the seconds. A training whose steps end well before
    the time limit therefore does not depend on the speed of the machine. The progress reaches 1
    when the seconds are used up.
    """
    return min(1.0, max(steps, 2 * seconds - 1))


def one_cycle(progress: float) -> float:
    """The learning rate relative to its maximum: a short rise, then half a cosine down to 0.

    Smith and Topin ("Super-convergence", 2018) start from a small rate in this way.
    """
    if progress < _WARM_UP:
        return (progress + 0.01) / (_WARM_UP + 0.01)
    return cosine((progress - _WARM_UP) / (1 - _WARM_UP))


def cosine(progress: float) -> float:
    """The learning rate relative to its maximum: half a cosine from 1 down to 0.

    The formula is (1 + cos(pi progress)) / 2 of Loshchilov and Hutter ("SGDR", 2017), without
    restarts.
    """
    return 0.5 + 0.5 * math.cos(math.pi * progress)


def constant(progress: float) -> float:
    """The learning rate relative to its maximum: always 1."""
    return 1.0


_SHAPES: dict[str, Callable[[float], float]] = {
    "one-cycle": one_cycle,
    "cosine": cosine,
    "constant": constant,
}
SCHEDULES = (*_SHAPES, "plateau")


class Schedule:
    """Sets the learning rate of an optimiser, by torch's `LambdaLR` or `ReduceLROnPlateau`.

    torch's `CosineAnnealingLR` and `OneCycleLR` count steps only, so they cannot follow a training
    that the clock may end. The shapes here are functions of the progress instead.

    A function of the progress has no memory. If a training is resumed with more epochs or more
    seconds, its learning rate is immediately that of the longer training, which may be higher than
    before.

    Args:
        name: "one-cycle", "cosine" or "constant" are functions of the progress; "plateau" halves
            the rate after two validations in a row without a better loss.
        optimiser: its current learning rates are the maximum.
        progress: returns the progress, from 0 to 1, after a given number of steps.

    Raises:
        ValueError: there is no schedule of this name.
    """

    def __init__(self, name: str, optimiser: Optimizer, progress: Callable[[int], float]) -> None:
        if name not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; got {name!r}")
        self._optimiser = optimiser
        self._highest = [group["lr"] for group in optimiser.param_groups]
        self._plateau: ReduceLROnPlateau | None = None
        self._by_progress: LambdaLR | None = None
        if name == "plateau":
            self._plateau = ReduceLROnPlateau(optimiser, factor=0.5, patience=1)
        else:
            shape = _SHAPES[name]
            self._factor = lambda steps: shape(progress(steps))
            self._by_progress = LambdaLR(optimiser, self._factor)

    def before_step(self, steps: int) -> None:
        """Set the learning rate of the next step, given the number of steps taken so far."""
        # LambdaLR sets the rate of its first step when it is constructed.
        if self._by_progress is not None and self._by_progress.last_epoch < steps:
            self._by_progress.step()

    def after_validation(self, loss: float) -> None:
        """Lower the learning rate if the validation loss asks for it."""
        if self._plateau is not None:
            self._plateau.step(loss)

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed training needs besides the optimiser's and the step count."""
        return {} if self._plateau is None else self._plateau.state_dict()

    def load_state_dict(self, state: dict[str, Any], steps: int) -> None:
        """Restore what `state_dict` returned after `steps` steps.

        The optimiser's own state must be restored first.
        """
        if self._plateau is not None:
            self._plateau.load_state_dict(state)
            return
        for group, highest in zip(self._optimiser.param_groups, self._highest, strict=True):
            group["initial_lr"] = highest
        self._by_progress = LambdaLR(self._optimiser, self._factor, last_epoch=steps - 1)
