"""`rnnfast bench`."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import rnnfast
from rnnfast.cli.parsers.bench import LAYERS, SIZES, Size
from rnnfast.cli.timing import RUNS, compare, doubts, time_in_turn


def run(options: argparse.Namespace) -> None:
    """Check and time every layer, size and mode; print a line for each."""
    if options.json is not None:
        options.json.open("a").close()  # fails before the timing if the file cannot be written
    where = f"{options.device}, {torch.get_num_threads()} threads, backend {options.backend}"
    print(f"rnnfast {where}; torch {torch.__version__}; microseconds per call, medians")
    print(
        f"{'T,B,I,H':<18}{'layer':<6}{'mode':<10}{'rnnfast':>12}{'torch.nn':>12}{'speed-up':>10}  "
        f"in {RUNS} runs"
    )
    results = []
    sizes, layers = options.size or SIZES, options.layer or LAYERS
    for size, layer, mode in itertools.product(sizes, layers, ("inference", "training")):
        calls = _calls(size, layer, mode == "training", options)
        _check({name: call() for name, call in calls.items()}, f"{layer} {size}, {mode}")
        times = time_in_turn(calls, _synchronize(options.device), options.seconds)
        found = compare(times["rnnfast"], times["torch.nn"])
        columns = "".join(f"{statistics.median(each) * 1e6:>12,.1f}" for each in times.values())
        mark = "" if found.agrees else " ?"
        print(
            f"{size!s:<18}{layer:<6}{mode:<10}{columns}{found.speed_up:>10.2f}  "
            f"{min(found.runs):.2f}-{max(found.runs):.2f}{mark}",
            flush=True,
        )
        results.append(
            {
                **{"layer": layer, "mode": mode, **size._asdict(), "speed_up": found.speed_up},
                **{"speed_ups_of_runs": found.runs, "runs_agree": found.agrees},
                **{
                    name: {"min": min(each), "median": statistics.median(each)}
                    for name, each in times.items()
                },
            }
        )
    mean = statistics.geometric_mean(result["speed_up"] for result in results)
    print(f"geometric mean of the speed-ups: {mean:.2f}")
    marked = sum(not result["runs_agree"] for result in results)
    if words := doubts(f"{marked} of {len(results)} lines, marked by ?," if marked else ""):
        warnings.warn(f"the times are in doubt: {words}", stacklevel=2)
    if options.json is not None:
        about = {
            "torch": torch.__version__,
            "device": str(options.device),
            "threads": torch.get_num_threads(),
            "backend": options.backend,
            "load": os.getloadavg()[0],
        }
        content = {**about, "unit": "seconds per call", "results": results}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {options.json}")


def _calls(
    size: Size, layer: str, training: bool, options: argparse.Namespace
) -> dict[str, Callable[[], list[Tensor]]]:
    """Functions that run the same layer of each library, and return its outputs and gradients."""
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
    """Check that both libraries computed the same tensors.

    Raises:
        ArithmeticError: the difference of two tensors is larger than rounding explains, relative to
            their largest element.
    """
    for ours, theirs in zip(results["rnnfast"], results["torch.nn"], strict=True):
        tolerance = 1e-2 if ours.is_cuda else 1e-3  # cuDNN may use TensorFloat-32
        difference, largest = (ours - theirs).abs().max(), theirs.abs().max()
        if not difference <= tolerance * largest:
            raise ArithmeticError(
                f"{case}: rnnfast and torch.nn differ by {difference:.2g}, where the largest "
                f"element is {largest:.2g}"
            )


def _synchronize(device: torch.device) -> Callable[[], Any]:
    """A function that waits until the device has finished its work."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None
