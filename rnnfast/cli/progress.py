"""What is seen of a training while it runs, and what ends it from outside."""

from __future__ import annotations

import math
import signal
import sys
import time
from types import FrameType, TracebackType
from typing import Any

from tqdm import tqdm

_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{left}, {rate_fmt}{postfix}]"


class ProgressBar(tqdm):
    """A bar of characters, whose estimate of the time that is left knows of a time limit.

    Args:
        total: how many characters there will be, if no limit ends the training earlier.
        initial: how many there have been before.
        seconds: until a time limit ends the training; infinite without one.
        hidden: whether nothing is shown.
    """

    def __init__(
        self, total: int, *, initial: int = 0, seconds: float = math.inf, hidden: bool = False
    ) -> None:
        self._deadline, self._noted = time.monotonic() + seconds, -math.inf
        super().__init__(
            total=total,
            initial=initial,
            desc="training",
            unit="char",
            unit_scale=True,
            smoothing=0.05,
            mininterval=0.1 if sys.stderr.isatty() else 10,  # seconds; a log needs no animation
            bar_format=_FORMAT,
            disable=hidden,
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        """What `_FORMAT` shows."""
        values: dict[str, Any] = super().format_dict
        done = self.n - self.initial
        rate = values["rate"] or (done / values["elapsed"] if values["elapsed"] else 0)
        left = (self.total - self.n) / rate if rate else math.inf
        left = min(left, max(0.0, self._deadline - time.monotonic()))
        return {**values, "left": self.format_interval(left) if math.isfinite(left) else "?"}

    def note(self, activity: str) -> None:
        """Show what is being done; not more often than the bar moves."""
        if self.disable:
            return
        self.set_description_str(activity, refresh=False)
        if time.monotonic() - self._noted >= self.mininterval:
            self._noted = time.monotonic()
            self.refresh()


class StoppedError(Exception):
    """A training was stopped by a signal."""


class Interruption:
    """Takes note of SIGINT and SIGTERM, so that the step under way is finished first.

    A second one changes nothing: torchrun passes on what the terminal has sent to all already.

    Attributes:
        signal: the number of the signal that came last, or 0.
    """

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> Interruption:
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
