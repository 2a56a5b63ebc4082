"""Times unequal lengths, resets and projection: `python -m benchmarks.sequences`.

For each case it prints the times of all calls in ms, timed in turn, and then these ratios of times:

packed      torch.nn / rnnfast, on the same packed batch
lengths     torch.nn with packing and padding / rnnfast with ``lengths``
reset       rnnfast with ``reset`` / rnnfast without
projection  torch.nn / rnnfast, with ``proj_size`` a quarter of H

Results are compared first.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnnfast
from benchmarks import machine
from benchmarks.steps import CELLS, MODES, Case
from benchmarks.timing import time_in_turn

CASES = ("50,8,64,64", "100,16,128,128", "100,32,256,256", "100,64,512,512")
RESET_PROBABILITY = 0.02
RATIOS = {  # name of a ratio: numerator, denominator
    "packed": ("torch packed", "packed"),
    "lengths": ("torch pack, pad", "lengths"),
    "reset": ("reset", "full"),
    "projection": ("torch projection", "projection"),
}


def calls_of(cell: str, case: Case) -> dict[str, tuple[torch.nn.Module, Callable[[], Tensor]]]:
    """Returns, by name, a module and a call that returns its output as one tensor."""
    torch.manual_seed(0)
    T, B, I, H = case
    lengths = torch.randint(1, T + 1, (B,))
    reset = torch.rand(T, B) < RESET_PROBABILITY
    x = torch.randn(T, B, I)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)

    def pair(**options: Any) -> tuple[torch.nn.RNNBase, torch.nn.RNNBase]:
        theirs = CELLS[cell](I, H, **options)
        ours = getattr(rnnfast, cell)(I, H, **options, backend="fused")
        ours.load_state_dict(theirs.state_dict())
        return theirs, ours

    def pack_and_pad() -> Tensor:
        y, _ = theirs(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return pad_packed_sequence(y, total_length=T)[0]

    theirs, ours = pair()
    calls = {
        "torch packed": (theirs, lambda: theirs(packed)[0].data),
        "packed": (ours, lambda: ours(packed)[0].data),
        "torch pack, pad": (theirs, pack_and_pad),
        "lengths": (ours, lambda: ours(x, lengths=lengths)[0]),
        "full": (ours, lambda: ours(x)[0]),
        "reset": (ours, lambda: ours(x, reset=reset)[0]),
    }
    if cell == "LSTM":
        wide, narrow = pair(proj_size=max(1, H // 4))
        calls["torch projection"] = (wide, lambda: wide(x)[0])
        calls["projection"] = (narrow, lambda: narrow(x)[0])
    check(calls, ours, x, reset, packed)
    return calls


def check(
    calls: dict[str, tuple[torch.nn.Module, Callable[[], Tensor]]],
    ours: torch.nn.Module,
    x: Tensor,
    reset: Tensor,
    packed: PackedSequence,
) -> None:
    """Raises AssertionError if results differ from torch.nn's or, with resets, the reference's."""
    with torch.no_grad():
        for one, other in RATIOS.values():
            if one.startswith("torch") and one in calls:
                torch.testing.assert_close(calls[other][1](), calls[one][1](), rtol=1e-3, atol=1e-4)
        with rnnfast.use_backend("reference"):
            ours.backend = None
            expected = ours(x, reset=reset)[0]
        ours.backend = "fused"
        torch.testing.assert_close(calls["reset"][1](), expected, rtol=1e-3, atol=1e-4)
    assert packed.data.shape[0] < x.shape[0] * x.shape[1]


def step_of(module: torch.nn.Module, call: Callable[[], Tensor], mode: str) -> Callable[[], Any]:
    """Returns the function to time: the call and, in training, a backward from ones."""
    if mode == "inference":
        return torch.inference_mode()(call)

    def train() -> None:
        module.zero_grad(set_to_none=True)
        y = call()
        y.backward(torch.ones_like(y))

    return train


def measure(cell: str, case: Case, mode: str, min_time: float, rounds: int) -> dict[str, Any]:
    calls = calls_of(cell, case)
    functions = {name: step_of(module, call, mode) for name, (module, call) in calls.items()}
    timings = time_in_turn(functions, lambda: None, min_time, rounds)
    seconds = {name: timing.min for name, timing in timings.items()}
    ratios = {
        name: seconds[above] / seconds[below]
        for name, (above, below) in RATIOS.items()
        if above in seconds
    }
    row = {"mode": mode, "cell": cell, "case": str(case)}
    return row | {"seconds": seconds, "ratios": ratios}


def format_row(row: dict[str, Any]) -> str:
    times = "  ".join(f"{name} {1e3 * value:.3f}" for name, value in row["seconds"].items())
    ratios = "  ".join(f"{name} {value:.2f}" for name, value in row["ratios"].items())
    return f"{row['mode']:9} {row['cell']:4} {row['case']:>14}  {times}\n{'':30} {ratios}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", nargs="+", default=CASES, metavar="T,B,I,H")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--min-time", type=float, default=0.3, help="seconds per call and case")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds, at least")
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows = []
    for size in args.case:
        for cell in CELLS:
            for mode in MODES:
                case = Case(*map(int, size.split(",")))
                rows.append(measure(cell, case, mode, args.min_time, args.repeats))
                print(format_row(rows[-1]), flush=True)
    if args.json:
        command = "python -m benchmarks.sequences " + " ".join(argv or sys.argv[1:])
        content = {"machine": machine.describe("cpu"), "command": command, "rows": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
