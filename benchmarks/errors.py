"""Compares the rounding errors of rnnfast with torch.nn's: `python -m benchmarks.errors --help`.

Both run the same layer in the same dtype, with random weights, inputs and gradients of the outputs.
The error of a result is the root mean square of its difference from an oracle, over all elements
and all seeds, relative to the root mean square of the oracle. A ratio is rnnfast's error divided by
torch.nn's: below 1, rnnfast is nearer. The table has the geometric mean and the largest of the
ratios of outputs (y), final states, and gradients (of the input, the initial states and the
weights).

The oracle is the reference (rnnfast/reference.py) in float64. For results in float64 it is computed
in long double, which is slow, so large shapes are left out there.

The gradient of relu jumps at 0. In float32 and float64 a sample is left out if a unit is on the
other side of 0 than in the oracle, with rnnfast or torch.nn: one such unit makes more error in the
gradients than all roundings. In half types nearly every sample has such units, with both.

"saturated" is a layer with biases that make many gates 0 or 1. "remembering" is one whose state
changes little from step to step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnnfast import _C
from rnnfast.reference import CELLS
from tests.cases import (
    DTYPES,
    TORCH_CLASS,
    Case,
    cast,
    oracle,
    run_backward,
    run_forward,
    sample_grads,
    sample_inputs,
)

from . import long_double, machine
from .suite import geometric_mean

KINDS = ("outputs", "states", "gradients")
GATES = {"plain": "", "saturated": "saturated", "remembering": "remembering"}
SHAPES = "60,12,40,72 20,8,300,700 10,16,512,512 30,16,7,1"
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
LARGEST_PRODUCT = 1e7
"""Multiply-adds of one gate in the largest case of which the oracle runs in long double."""
Row = dict[str, Any]


def by_torch(case: Case, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Returns (y, *final states, *gradients of the inputs) of torch.nn."""
    states = CELLS[case.cell].states
    make, options = TORCH_CLASS[case.cell]
    module = make(case.I, case.H, **options).to(inputs[0].dtype)
    for parameter, value in zip(module.parameters(), inputs[1 + states :], strict=True):
        parameter.data.copy_(value)
    leaves = [t.detach().clone().requires_grad_() for t in inputs[: 1 + states]]
    hx = tuple(t.unsqueeze(0) for t in leaves[1:])
    y, finals = module(leaves[0], hx if states > 1 else hx[0])
    outputs = [y, *(t.squeeze(0) for t in (finals if states > 1 else (finals,)))]
    return outputs + list(torch.autograd.grad(outputs, [*leaves, *module.parameters()], grads))


def by_kernels(case: Case, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Returns (y, *final states, *gradients of the inputs) of the operators."""
    forward = run_forward(case, inputs, save=True)
    outputs = forward[: 1 + CELLS[case.cell].states]
    return [*outputs, *run_backward(case, inputs, grads, forward)]


def in_long_double(case: Case) -> bool:
    return case.T * case.B * case.H * (case.I + case.H) <= LARGEST_PRODUCT


def expected_results(
    case: Case, dtype: torch.dtype, inputs: list[Tensor], grads: list[Tensor]
) -> list[long_double.Array]:
    """Returns what `by_torch` and `by_kernels` should return."""
    if dtype is torch.float64:
        given = [[t.numpy().astype(np.longdouble) for t in each] for each in (inputs, grads)]
        return long_double.oracle(case.cell, *given)
    expected = oracle(case, inputs, grads)
    return [t.numpy().astype(np.longdouble) for t in (*expected.outputs, *expected.grads)]


def crosses_kink(
    case: Case, dtype: torch.dtype, ys: Iterable[Tensor], expected: long_double.Array
) -> bool:
    """Whether a unit of relu is 0 in one of the outputs and positive in the oracle, or vice versa.

    It is never so for other cells, and not asked in half types.
    """
    if case.cell != "elman_relu" or dtype not in (torch.float32, torch.float64):
        return False
    positive = torch.from_numpy(expected > 0)
    return any(not torch.equal(y > 0, positive) for y in ys)


def relative_errors(
    case: Case, dtype: torch.dtype, seeds: range, capabilities: list[str]
) -> dict[str, list[float]]:
    """Returns the error of every result of "torch.nn" and of each instruction set's kernels.

    Raises ValueError if no sample is left; see `crosses_kink`.
    """
    squares: dict[str, np.ndarray[Any, Any]] = {}
    before = _C.get_cpu_capability()

    def add(name: str, values: list[long_double.Array]) -> None:
        squares[name] = squares.get(name, 0) + np.array([np.square(v).sum() for v in values])

    try:
        for seed in seeds:
            exact = sample_inputs(case, dtype, seed)
            exact_grads = sample_grads(case, dtype, 100 + seed)
            expected = expected_results(case, dtype, exact, exact_grads)
            inputs, grads = (cast(tensors, dtype, "cpu") for tensors in (exact, exact_grads))
            found = {"torch.nn": by_torch(case, inputs, grads)}
            for name in capabilities:
                _C.set_cpu_capability(name)
                found[name] = by_kernels(case, inputs, grads)
            if crosses_kink(case, dtype, (results[0] for results in found.values()), expected[0]):
                continue
            add("expected", expected)
            for name, results in found.items():
                pairs = zip(results, expected, strict=True)
                add(name, [got.detach().double().numpy() - want for got, want in pairs])
    finally:
        _C.set_cpu_capability(before)
    if not squares:
        raise ValueError(f"{case}: in every sample a unit is on the other side of relu's kink")
    norms = squares.pop("expected")
    norms[norms == 0] = 1
    return {name: np.sqrt(each / norms).astype(float).tolist() for name, each in squares.items()}


def result_names(cell: str) -> list[tuple[str, str]]:
    """Returns the kind and the name of each result of `by_torch` and `by_kernels`."""
    states = ["h", "c"][: CELLS[cell].states]
    found = [("outputs", "y"), *(("states", f"{name}_n") for name in states)]
    inputs = ["x", *(f"{name}_0" for name in states), "w_ih", "w_hh", "b_ih", "b_hh"]
    return found + [("gradients", f"gradient of {name}") for name in inputs]


def measure(cell: str, dtype: str, gates: str, args: argparse.Namespace) -> list[Row]:
    """Returns a row for each shape, instruction set and result."""
    rows = []
    for shape in args.shape:
        case = Case(cell, *shape, gates=GATES[gates])
        if dtype == "float64" and not in_long_double(case):
            continue
        errors = relative_errors(case, DTYPE_NAMES[dtype], range(args.seeds), args.capability)
        theirs = errors.pop("torch.nn")
        for capability, ours in errors.items():
            where = {"capability": capability, "cell": cell, "dtype": dtype, "gates": gates}
            where["shape"] = ",".join(map(str, shape))
            for (kind, name), one, other in zip(result_names(cell), ours, theirs, strict=True):
                rows.append(where | {"kind": kind, "result": name, "rnnfast": one, "torch": other})
    return rows


def ratio(row: Row) -> float | None:
    """Returns rnnfast's error over torch.nn's; None where torch.nn makes no error."""
    return row["rnnfast"] / row["torch"] if row["torch"] else None


def summarize(rows: list[Row]) -> list[Row]:
    """Returns, for each cell, dtype and kind of gates, the means and the largest ratios by kind."""
    by = ("capability", "cell", "dtype", "gates")
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in by), []).append(row)
    summary = []
    for key, group in groups.items():
        line: Row = dict(zip(by, key, strict=True))
        for kind in KINDS:
            found = [(ratio(row), row) for row in group if row["kind"] == kind and ratio(row)]
            if not found:
                continue
            largest, where = max(found, key=lambda pair: pair[0])
            mean = geometric_mean([value for value, _ in found])
            place = f"{where['result']} {where['shape']}"
            line[kind] = {"mean": mean, "largest": largest, "where": place}
        summary.append(line)
    return summary


HEADER = f"{'kernels':13} {'cell':10} {'dtype':8} {'gates':11}"
HEADER += "".join(f" {kind + ': mean, largest':>24}" for kind in KINDS) + "  largest of all"


def format_line(s: Row) -> str:
    line = f"{s['capability']:13} {s['cell']:10} {s['dtype']:8} {s['gates']:11}"
    kinds = [s[kind] for kind in KINDS if kind in s]
    for kind in KINDS:
        line += f" {s[kind]['mean']:17.3f} {s[kind]['largest']:6.3f}" if kind in s else f"{'-':>25}"
    return f"{line}  {max(kinds, key=lambda kind: kind['largest'])['where'] if kinds else '-'}"


def parse_shape(text: str) -> tuple[int, ...]:
    try:
        T, B, I, H = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: four integers T,B,I,H are wanted") from None
    return T, B, I, H


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.errors",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--cell", nargs="+", choices=CELLS, default=list(CELLS))
    add("--dtype", nargs="+", choices=DTYPE_NAMES, default=list(DTYPE_NAMES))
    add("--gates", nargs="+", choices=GATES, default=list(GATES))
    shapes = [parse_shape(text) for text in SHAPES.split()]
    add("--shape", nargs="+", type=parse_shape, default=shapes, metavar="T,B,I,H")
    add("--seeds", type=int, default=40, help="number of random samples (default: %(default)s)")
    add(
        "--capability",
        nargs="+",
        choices=_C.cpu_capabilities(),
        default=[_C.get_cpu_capability()],
        help="instruction sets of rnnfast's kernels (default: the one that runs here)",
    )
    add("--json", type=Path, metavar="FILE", help="write all errors, with the machine")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error("--seeds: at least one is needed")
    print(HEADER)
    rows = []
    for cell, dtype, gates in itertools.product(args.cell, args.dtype, args.gates):
        found = measure(cell, dtype, gates, args)
        rows += found
        print(*map(format_line, summarize(found)), sep="\n", flush=True)
    if args.json:
        command = "python -m benchmarks.errors " + shlex.join(
            sys.argv[1:] if argv is None else argv
        )
        facts = {"machine": machine.describe("cpu"), "command": command, "seeds": args.seeds}
        args.json.write_text(
            json.dumps(facts | {"summary": summarize(rows), "rows": rows}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
