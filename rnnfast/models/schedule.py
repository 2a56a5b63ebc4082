"""How the learning rate changes in the course of a training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

_WARM_UP = 0.05  # the part of the training in which the learning rate rises


def progress(steps: float, seconds: float) -> float:
    """How far the training is, from the fractions of steps and of seconds that are used up.

    The clock counts from half-time on only, so that a training that ends by its steps well in
    time does not depend on the speed of the machine; it always arrives at 1 in time.
    """
    return min(1.0, max(steps, 2 * seconds - 1))


def one_cycle(progress: float) -> float:
    """The learning rate, relative to its highest: a short rise, then half a cosine down to 0.

    The rise from a small rate is that of Smith and Topin ("Super-convergence", 2018).
    """
    if progress < _WARM_UP:
        return (progress + 0.01) / (_WARM_UP + 0.01)
    return cosine((progress - _WARM_UP) / (1 - _WARM_UP))


def cosine(progress: float) -> float:
    """The learning rate, relative to its highest: half a cosine from 1 down to 0.

    (1 + cos(pi progress)) / 2, as of Loshchilov and Hutter ("SGDR", 2017), without restarts.
    """
    return 0.5 + 0.5 * math.cos(math.pi * progress)


def constant(progress: float) -> float:
    """The learning rate, relative to its highest: 1 all along."""
    return 1.0


_SHAPES: dict[str, Callable[[float], float]] = {
    "one-cycle": one_cycle,
    "cosine": cosine,
    "constant": constant,
}
SCHEDULES = (*_SHAPES, "plateau")


class Schedule:
    """Sets the learning rate of an optimiser.

    A function of the progress has no memory: in a training that is made longer the rate is at
    once what it would be at this place of the longer one. Where it had come down, it rises again.

    Args:
        name: "one-cycle", "cosine" or "constant", functions of the progress; or "plateau": half
            the rate whenever two validations in a row brought no better loss.
        optimiser: its learning rates so far are the highest.

    Raises:
        ValueError: unknown name.
    """

    def __init__(self, name: str, optimiser: Optimizer) -> None:
        if name not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; got {name!r}")
        self._shape = _SHAPES.get(name)
        self._optimiser = optimiser
        self._highest = [group["lr"] for group in optimiser.param_groups]
        self._plateau = (
            ReduceLROnPlateau(optimiser, factor=0.5, patience=1) if name == "plateau" else None
        )

    def before_step(self, progress: float) -> None:
        """Set the rate of the next step; progress goes from 0 to 1."""
        if self._shape is not None:
            for group, highest in zip(self._optimiser.param_groups, self._highest, strict=True):
                group["lr"] = highest * self._shape(progress)

    def after_validation(self, loss: float) -> None:
        """Take notice of a validation loss."""
        if self._plateau is not None:
            self._plateau.step(loss)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs besides the optimiser's own state."""
        return {} if self._plateau is None else self._plateau.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        if self._plateau is not None:
            self._plateau.load_state_dict(state)
