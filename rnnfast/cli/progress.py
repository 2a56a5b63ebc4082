"""The progress bar of a training, and its reaction to signals."""

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
    """A progress bar in characters; its estimate of the remaining time respects a time limit.

    Args:
        total: the number of characters of the whole training.
        initial: the number of characters that were read before.
        seconds: the time until a time limit ends the training; infinite without a limit.
        hidden: whether to show no bar.
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
            mininterval=0.1 if sys.stderr.isatty() else 10,  # seconds; fewer lines in a log file
            bar_format=_FORMAT,
            disable=hidden,
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        """The values that `_FORMAT` refers to."""
        values: dict[str, Any] = super().format_dict
        done = self.n - self.initial
        rate = values["rate"] or (done / values["elapsed"] if values["elapsed"] else 0)
        left = (self.total - self.n) / rate if rate else math.inf
        left = min(left, max(0.0, self._deadline - time.monotonic()))
        return {**values, "left": self.format_interval(left) if math.isfinite(left) else "?"}

    def note(self, activity: str) -> None:
        """Show the current activity, at most once per `mininterval`."""
        if self.disable:
            return
        self.set_description_str(activity, refresh=False)
        if time.monotonic() - self._noted >= self.mininterval:
            self._noted = time.monotonic()
            self.refresh()


class StoppedError(Exception):
    """A signal stopped the training."""


class Interruption:
    """Records SIGINT and SIGTERM instead of raising, so that the current step can finish.

    A second signal has no further effect. With Ctrl-C under torchrun a process gets two: one from
    the terminal and one from torchrun.

    Attributes:
        signal: the number of the latest signal, or 0.
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
