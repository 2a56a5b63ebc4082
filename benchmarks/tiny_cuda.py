"""Runs every cell and dtype on tiny shapes, forward and backward, for compute-sanitizer."""

import argparse
import itertools
import sys

import torch

from .compare import DTYPES
from .lines import emit
from .peers import build_rnnfast
from .steps import CELLS, MODES, Case, make_problem, results

CASES = (Case(3, 2, 5, 7), Case(2, 3, 32, 32))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiny_cuda", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU's kernels")
    device = "cpu" if parser.parse_args(argv).dry_run else "cuda"
    for cell, (name, dtype) in itertools.product(CELLS, DTYPES.items()):
        for case, mode in itertools.product(CASES, MODES):
            problem = make_problem(cell, case, device, dtype, mode, input_grad=True)
            with torch.inference_mode(mode == "inference"):
                numbers = results(build_rnnfast(problem))
                assert all(value.isfinite().all() for value in numbers.values())
        emit(cell=cell, dtype=name, ran=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
