"""Times several functions in turn, so that all of them meet the same state of the machine."""

import contextlib
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rnnfast.cli.timing import gc_disabled

BLOCK_SECONDS = 0.5e-3  # one measurement: as many calls as fill this time
WARM_UP_SECONDS = 0.02
# Between functions there is a pause, then untimed calls: threads of the last function may still
# spin (those of ONNX Runtime for 30 ms), and its data fill the caches. So pauses of PAUSE_SECONDS
# follow each other until no other thread of the process runs. Calls longer than LONG_CALL_SECONDS
# need no untimed calls.
PAUSE_SECONDS = 2e-3
MOST_PAUSE_SECONDS = 0.2
SETTLE_SECONDS = 1e-3
LONG_CALL_SECONDS = 20e-3


def others_run() -> bool:
    """Whether another thread of this process runs or is ready to run. Known on Linux only.

    The process's CPU time would not do: it counts running threads at the kernel's ticks.
    """
    own = threading.get_native_id()
    for task in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError):  # the thread has ended
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            if state == "R" and int(task.name) != own:
                return True
    return False


def pause() -> None:
    """Sleeps until the threads of this process are idle, or for MOST_PAUSE_SECONDS."""
    end = time.perf_counter() + MOST_PAUSE_SECONDS
    time.sleep(PAUSE_SECONDS)
    while others_run() and time.perf_counter() < end:
        time.sleep(PAUSE_SECONDS)


class Timing(NamedTuple):
    """Seconds per call over `rounds` rounds of `calls` calls each."""

    min: float
    median: float
    rounds: int
    calls: int


def time_in_turn(
    functions: dict[str, Callable[[], object]],
    synchronize: Callable[[], object],
    min_time: float,
    min_rounds: int,
) -> dict[str, Timing]:
    """Times A, B, A, B, ... for `min_rounds` rounds and `min_time` seconds each, at least."""

    def seconds(function: Callable[[], object], calls: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize()
        return (time.perf_counter() - start) / calls

    def settle(function: Callable[[], object]) -> None:
        end = time.perf_counter() + SETTLE_SECONDS
        while True:
            seconds(function, 1)
            if time.perf_counter() >= end:
                return

    calls, long = {}, set()
    for name, function in functions.items():
        started = time.perf_counter()
        once = seconds(function, 1)
        while time.perf_counter() - started < WARM_UP_SECONDS:
            once = min(once, seconds(function, 1))
        calls[name] = max(1, round(BLOCK_SECONDS / once))
        if once > LONG_CALL_SECONDS:
            long.add(name)

    samples: dict[str, list[float]] = {name: [] for name in functions}
    with gc_disabled():
        end = time.perf_counter() + min_time * len(functions)
        rounds = 0
        while rounds < min_rounds or time.perf_counter() < end:
            for name, function in functions.items():
                pause()
                if name not in long:
                    settle(function)
                samples[name].append(seconds(function, calls[name]))
            rounds += 1
    return {
        name: Timing(min(times), statistics.median(times), rounds, calls[name])
        for name, times in samples.items()
    }
