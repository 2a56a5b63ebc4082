"""Compares rnnfast (backend "fused") with torch.nn on this GPU: the last stage of `make gpu-check`.

Prints one line of JSON for each case, with the keys of `benchmarks.compare`. The most important
cases come first: training an LSTM, and (T, B, H) = (1024, 16, 768), a size for which others have
published times. It stops when its time is over. The exit code is 1 if a case fails, if results
disagree, or if nothing was timed.
"""

import argparse
import itertools
import sys
import time
from typing import NamedTuple

import torch

from . import compare, machine, suite
from .gpu_verify import TF32_EPS, rnn_precision
from .lines import emit, reported
from .steps import CELLS, MODES, Case, make_problem

PUBLISHED = Case(1024, 16, 768, 768)
CASES = (
    PUBLISHED,
    *(Case(*sizes) for sizes in ((1024, 16, 256, 256), (256, 64, 512, 512), (1024, 1, 128, 128))),
    *(
        Case(*sizes)
        for sizes in ((128, 256, 1024, 1024), (512, 16, 128, 128), (256, 8, 1024, 1024))
    ),
    *(Case(*sizes) for sizes in ((2048, 64, 384, 384), (128, 64, 256, 256), (1, 1, 512, 512))),
)
DRY_RUN_CASES = (Case(16, 2, 8, 8),)


class Choice(NamedTuple):
    cell: str
    mode: str
    case: Case
    dtype: str
    precision: str


def choices(cases: tuple[Case, ...], numbers: tuple[tuple[str, str], ...]) -> list[Choice]:
    """Returns everything to time, the most important first."""

    def misses(choice: Choice) -> int:
        wanted = (choice.cell == "LSTM", choice.mode == "training", choice.case == cases[0])
        return 3 - sum(wanted)

    every = itertools.product(reversed(CELLS), reversed(MODES), cases, numbers)
    return sorted((Choice(*rest, *number) for *rest, number in every), key=misses)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_bench", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0, help="start no case after these")
    parser.add_argument("--dry-run", action="store_true", help="a tiny case, on the CPU's kernels")
    options = parser.parse_args(argv)
    end = time.monotonic() + options.seconds
    device, cases, min_time = ("cpu", DRY_RUN_CASES, 0) if options.dry_run else ("cuda", CASES, 0.1)
    numbers = (("float32", "tf32"), ("float32", "ieee"))  # a dry run: CPUs may lack other dtypes
    if not options.dry_run:
        numbers = (("float16", "ieee"), ("bfloat16", "ieee"), *numbers)
    emit(machine=machine.describe(device))
    timed = wrong = finished = late = 0
    everything = choices(cases, numbers)
    for choice in everything:
        if time.monotonic() > end:
            late += 1
            continue
        where = {"mode": choice.mode, "cell": choice.cell, "dtype": choice.dtype}
        where |= {"precision": choice.precision, **choice.case._asdict()}
        where["threads"] = torch.get_num_threads()
        tolerance = TF32_EPS if choice.precision == "tf32" else 0.0
        settings = ["--min-time", str(min_time), "--repeats", "3", "--tolerance", str(tolerance)]
        with reported(**where), rnn_precision(choice.precision):
            dtype = compare.DTYPES[choice.dtype]
            problem = make_problem(choice.cell, choice.case, device, dtype, choice.mode)
            for row in suite.compare_one(problem, compare.parse_args(settings)):
                emit(**where, **row)
                timed += "not_timed" not in row
                wrong += "disagrees" in str(row.get("not_timed", ""))
            finished += 1
    failed = len(everything) - late - finished
    emit(timed=timed, disagreed=wrong, failed=failed, not_started=late)
    return 0 if timed and not wrong and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
