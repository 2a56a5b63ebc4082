"""Times functions in turn, and tells whether their times can be trusted."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

RUNS = 5
"""The number of consecutive runs into which a timing is divided."""
_TOLERANCE = 1.25
_BLOCK_SECONDS = 0.5e-3  # calls are timed in blocks of this length
_PAUSE_SECONDS = 2e-3  # pause between functions, because idle threads of the last one still spin
_LONG_SECONDS = 20e-3  # from this length on, a call needs no pause and no warm-up


class Comparison(NamedTuple):
    """How much faster one function is than another: ratios of times, above 1 if it is faster."""

    speed_up: float
    """The ratio of the medians of all times."""
    runs: list[float]
    """The ratio of the medians in each run."""
    of_minima: float
    """The ratio of the minima of all times."""

    @property
    def agrees(self) -> bool:
        """Whether all ratios agree up to a factor of 1.25."""
        ratios = (*self.runs, self.of_minima)
        return max(ratios) <= _TOLERANCE * min(ratios)


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Comparison:
    """Compare two equally long lists of times that were measured in turn."""
    runs = min(RUNS, len(ours))
    ends = [len(ours) * run // runs for run in range(runs + 1)]
    parts = [slice(*pair) for pair in pairwise(ends)]
    median = statistics.median
    return Comparison(
        median(theirs) / median(ours),
        [median(theirs[part]) / median(ours[part]) for part in parts],
        min(theirs) / min(ours),
    )


def doubts(disagreeing: str) -> str | None:
    """Say why times cannot be trusted and what to do; None if there is no reason for doubt.

    Args:
        disagreeing: a description of the times whose runs disagree; empty if all agree.
    """
    reasons = []
    if disagreeing:
        reasons.append(f"the runs of {disagreeing} disagree by more than a factor of {_TOLERANCE}")
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    if load > 1.5 * cores:
        reasons.append(f"other programs use the machine (load {load:.1f} on {cores} cores)")
    if not reasons:
        return None
    return f"{', and '.join(reasons)}: repeat this while nothing else runs, or with more time"


def time_in_turn(
    functions: Mapping[str, Callable[[], object]],
    synchronize: Callable[[], object],
    seconds: float,
) -> dict[str, list[float]]:
    """Time functions in turn, A, B, A, B, ..., for `seconds` each and at least `RUNS` rounds.

    Returns:
        The seconds per call in each round, for each function.
    """

    def measure(function: Callable[[], object], calls: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize()
        return (time.perf_counter() - start) / calls

    once = {
        name: min(measure(function, 1) for _ in range(3)) for name, function in functions.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds * len(functions)
    with gc_disabled():
        while time.perf_counter() < end or len(samples[next(iter(samples))]) < RUNS:
            for name, function in functions.items():
                calls = max(1, round(_BLOCK_SECONDS / once[name]))
                if once[name] < _LONG_SECONDS:
                    time.sleep(_PAUSE_SECONDS)
                    measure(function, calls)  # wakes the threads and fills the caches
                samples[name].append(measure(function, calls))
    return samples


@contextmanager
def gc_disabled() -> Iterator[None]:
    """Keeps Python's collection of garbage out of what is timed."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
