"""Checks the kernels' results on this GPU: a part of the second stage of `make gpu-check`.

Every cell, dtype and size gets new random inputs, and output memory that is filled with NaN first.
Outputs, states and gradients are compared with torch.nn in float64. A second run must give the same
bits. float32 is checked twice: in IEEE arithmetic and, with a wider bound, in TF32, torch's default
for recurrent layers on CUDA. The program stops when its time is over.
"""

import argparse
import itertools
import random
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from .compare import DTYPES
from .lines import emit, reported
from .peers import build_rnnfast
from .steps import CELLS, Case, make_problem, module_step, results

CASES = (Case(3, 2, 5, 7), Case(33, 5, 20, 40), Case(70, 16, 128, 96), Case(1024, 16, 768, 768))
DRY_RUN_CASES = (Case(5, 3, 9, 20),)


class Arithmetic(NamedTuple):
    """A dtype, the precision of products in it, and the allowed error.

    The bound is relative to the largest element. Gradients, which are long sums, may have 5 times
    that error.
    """

    dtype: str
    precision: str
    bound: float


def eps(dtype: str) -> float:
    return torch.finfo(DTYPES[dtype]).eps


TF32_EPS = 2.0**-10
ARITHMETIC = (
    Arithmetic("float32", "ieee", 12 * eps("float32")),
    Arithmetic("float32", "tf32", 2 * TF32_EPS),
    Arithmetic("float16", "ieee", 2 * eps("float16")),
    Arithmetic("bfloat16", "ieee", 2 * eps("bfloat16")),
    Arithmetic("float64", "ieee", 12 * eps("float64")),
)


@contextmanager
def rnn_precision(precision: str) -> Iterator[None]:
    """Sets the precision of recurrent layers' float32 products on CUDA: "ieee" or "tf32"."""
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cudnn.rnn.fp32_precision = before


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Makes torch fill new uninitialised memory with NaN; nondeterministic operations only warn."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def check(
    cell: str, case: Case, arithmetic: Arithmetic, device: str, seed: int
) -> dict[str, object]:
    """Returns the largest errors, relative to their bounds, and whether a second run is equal."""
    dtype = DTYPES[arithmetic.dtype]
    problem = make_problem(cell, case, device, dtype, "training", input_grad=True, seed=seed)
    exact_problem = problem.to(torch.float64)
    exact = results(module_step(exact_problem.module, exact_problem))
    with rnn_precision(arithmetic.precision), poisoned_memory():
        step = build_rnnfast(problem)
        first, second = results(step), results(step)
    worst = {"values": 0.0, "gradients": 0.0}
    for name, want in exact.items():
        kind, factor = ("gradients", 5) if name.startswith("grad of") else ("values", 1)
        difference = (first[name].double() - want).abs().max() / want.abs().max()
        share = difference.item() / (factor * arithmetic.bound)
        worst[kind] = max(worst[kind], share) if share == share else float("inf")
    same_bits = all(torch.equal(first[name], second[name]) for name in first)
    passed = same_bits and max(worst.values()) < 1
    rounded = {f"{kind}_of_bound": round(share, 3) for kind, share in worst.items()}
    return {"passed": passed, **rounded, "same_bits": same_bits}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_verify", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0, help="start no case after these")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU's kernels")
    args = parser.parse_args(argv)
    device, cases = ("cpu", DRY_RUN_CASES) if args.dry_run else ("cuda", CASES)
    end = time.monotonic() + args.seconds
    passed = total = late = 0
    for case, arithmetic, cell in itertools.product(cases, ARITHMETIC, CELLS):
        if time.monotonic() > end:
            late += 1
            continue
        total += 1
        seed = random.SystemRandom().randrange(2**31)
        where = {"check": "parity", "cell": cell, "case": str(case), "dtype": arithmetic.dtype}
        where |= {"precision": arithmetic.precision, "seed": seed}
        with reported(**where):
            outcome = check(cell, case, arithmetic, device, seed)
            emit(**where, **outcome)
            passed += bool(outcome["passed"])
    emit(check="parity", passed=passed, of=total, not_run=late)
    return 0 if total and passed == total else 1


if __name__ == "__main__":
    sys.exit(main())
