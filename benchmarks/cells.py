"""Compares single steps of cells with their peers: `python -m benchmarks.cells --help`.

RNNCell, GRUCell and LSTMCell run in three modes: "inference", one step; "training", one step and
the gradients of the parameters; and "chained", ten steps, each with the state of the step before,
and the gradients from the last h. Results are checked, and then all implementations are timed in
turn, in several new processes. A ratio is the peer's time divided by rnnfast's: above 1, rnnfast is
faster. A case is a win if it is above 1 in every process, a loss if it is below 1 in every process,
and else level.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Iterator

import torch

from . import suite
from .steps import SINGLE_STEPS, Case, make_problem
from .suite import Item, Row

MODES = {"inference": ("inference", 1), "training": ("training", 1), "chained": ("training", 10)}
"""For each mode of this program, that of the problem and the number of steps."""
SIZES = (
    "1,64,64 1,512,512 4,128,128 8,256,256 16,375,400 16,400,400 32,256,256 64,512,512 128,128,128"
)


def parse_size(text: str) -> tuple[int, int, int]:
    try:
        B, I, H = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: three integers B,I,H are wanted") from None
    if min(B, I, H) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: every size must be at least 1")
    return B, I, H


def items(args: argparse.Namespace) -> Iterator[Item]:
    """Yields an item for each mode, cell and size."""
    for mode, cell, size in itertools.product(args.mode, args.cell, args.size):
        of_problem, steps = MODES[mode]
        case = Case(steps, *size)
        where = {"mode": mode, "cell": cell, "dtype": "float32", **case._asdict()}
        given = (cell, case, "cpu", torch.float32, of_problem, args.input_grad)
        yield Item(where, functools.partial(make_problem, *given))


def format_row(row: Row) -> str:
    size = "{B},{I},{H}".format(**row)
    where = f"{row['mode']:9} {row['cell']:8} {size:>11} {row['threads']:>7}  {row['peer']:12} "
    return where + suite.format_numbers(row)


HEADER = f"{'mode':9} {'cell':8} {'B,I,H':>11} {'threads':>7}  {'peer':12} {suite.NUMBERS}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cells",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cells, sizes = list(SINGLE_STEPS), list(map(parse_size, SIZES.split()))
    parser.add_argument("--cell", nargs="+", choices=cells, default=cells)
    parser.add_argument("--size", nargs="+", type=parse_size, default=sizes, metavar="B,I,H")
    suite.add_options(parser, MODES, peers=["torch"], processes=5)
    args = parser.parse_args(argv)
    suite.check_options(parser, args)
    return suite.run("benchmarks.cells", items, HEADER, format_row, args, argv)


if __name__ == "__main__":
    sys.exit(main())
