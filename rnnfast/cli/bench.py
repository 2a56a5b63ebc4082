"""`rnnfast bench`."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import rnnfast
from rnnfast.cli.parsers.bench import LAYERS, SIZES, Size

_BLOCK_SECONDS = 0.5e-3  # what is timed at once: as many calls as fill this
_PAUSE_SECONDS = 2e-3  # between the two: threads of the last one may still spin
_MIN_ROUNDS = 5


class Timing(NamedTuple):
    """Seconds per call: the least of all rounds, and the middle one."""

    min: float
    median: float


def run(options: argparse.Namespace) -> None:
    """Check, time, and print a line for each layer, size and mode."""
    if options.json is not None:
        options.json.open("a").close()  # what cannot be written to is refused before the timing
    where = f"{options.device}, {torch.get_num_threads()} threads, backend {options.backend}"
    print(f"rnnfast {where}; torch {torch.__version__}; microseconds per call, minimum and median")
    print(f"{'T,B,I,H':<18}{'layer':<6}{'mode':<10}{'rnnfast':>18}{'torch.nn':>18}{'speed-up':>10}")
    results = []
    sizes, layers = options.size or SIZES, options.layer or LAYERS
    for size, layer, mode in itertools.product(sizes, layers, ("inference", "training")):
        calls = _calls(size, layer, mode == "training", options)
        _check({name: call() for name, call in calls.items()}, f"{layer} {size}, {mode}")
        timings = time_in_turn(calls, _synchronize(options.device), options.seconds)
        speed_up = timings["torch.nn"].min / timings["rnnfast"].min
        columns = "".join(
            f"{timing.min * 1e6:>9,.0f}{timing.median * 1e6:>9,.0f}" for timing in timings.values()
        )
        print(f"{size!s:<18}{layer:<6}{mode:<10}{columns}{speed_up:>10.2f}", flush=True)
        results.append(
            {
                **{"layer": layer, "mode": mode, **size._asdict(), "speed_up": speed_up},
                **{name: timing._asdict() for name, timing in timings.items()},
            }
        )
    mean = statistics.geometric_mean(result["speed_up"] for result in results)
    print(f"geometric mean of the speed-ups: {mean:.2f}")
    if options.json is not None:
        about = {
            "torch": torch.__version__,
            "device": str(options.device),
            "threads": torch.get_num_threads(),
            "backend": options.backend,
        }
        content = {**about, "unit": "seconds per call", "results": results}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {options.json}")


def _calls(
    size: Size, layer: str, training: bool, options: argparse.Namespace
) -> dict[str, Callable[[], list[Tensor]]]:
    """The same layer twice, each as a function that runs it and returns all it computed."""
    torch.manual_seed(0)
    ours = getattr(rnnfast, layer)(size.I, size.H, backend=options.backend, device=options.device)
    theirs = getattr(nn, layer)(size.I, size.H, device=options.device)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(size.T, size.B, size.I, device=options.device)
    gradient = torch.randn(size.T, size.B, size.H, device=options.device)

    def infer(module: nn.Module) -> list[Tensor]:
        with torch.inference_mode():
            return [module(x)[0]]

    def train(module: nn.Module) -> list[Tensor]:
        output = module(x)[0]
        return [output, *torch.autograd.grad(output, list(module.parameters()), gradient)]

    work = train if training else infer
    return {"rnnfast": lambda: work(ours), "torch.nn": lambda: work(theirs)}


def _check(results: dict[str, list[Tensor]], case: str) -> None:
    """Refuse to compare the speed of things that are not the same.

    Raises:
        ArithmeticError: a tensor differs by more than rounding, relative to its largest element.
    """
    for ours, theirs in zip(results["rnnfast"], results["torch.nn"], strict=True):
        tolerance = 1e-2 if ours.is_cuda else 1e-3  # cuDNN may use TensorFloat-32
        difference, largest = (ours - theirs).abs().max(), theirs.abs().max()
        if not difference <= tolerance * largest:
            raise ArithmeticError(
                f"{case}: rnnfast and torch.nn differ by {difference:.2g}, where the largest "
                f"element is {largest:.2g}"
            )


def time_in_turn(
    functions: Mapping[str, Callable[[], object]],
    synchronize: Callable[[], object],
    seconds: float,
) -> dict[str, Timing]:
    """Time functions A, B, A, B, ... until `seconds` each, and a few rounds, have passed."""

    def measure(function: Callable[[], object], calls: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize()
        return (time.perf_counter() - start) / calls

    calls = {
        name: max(1, round(_BLOCK_SECONDS / min(measure(function, 1) for _ in range(3))))
        for name, function in functions.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds * len(functions)
    with _no_garbage_collection():
        while time.perf_counter() < end or len(samples[next(iter(samples))]) < _MIN_ROUNDS:
            for name, function in functions.items():
                time.sleep(_PAUSE_SECONDS)
                measure(function, calls[name])  # wakes the threads and warms the caches
                samples[name].append(measure(function, calls[name]))
    return {name: Timing(min(times), statistics.median(times)) for name, times in samples.items()}


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _synchronize(device: torch.device) -> Callable[[], Any]:
    """What waits for the work on a device."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None
