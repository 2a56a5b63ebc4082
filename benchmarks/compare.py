"""Compares rnnfast (backend "fused") with its peers: `python -m benchmarks.compare --help`.

It measures one layer for every mode, cell and case. All implementations get the same weights and
input, their results are checked against torch.nn in float64, and then they are timed in turn. A
ratio is the peer's time divided by rnnfast's: above 1, rnnfast is faster. On the CPU each row also
has a limit, the least time that this machine could take, and the limit divided by rnnfast's time.
The limit is computed after a short calibration; see `python -m benchmarks.roofline --help`.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Iterator

import torch

from . import roofline, suite
from .steps import CELLS, MODES, Case, make_problem
from .suite import Item, Row

DEFAULT_CASES = (
    "1,1,64,64 1,1,512,512 100,1,64,64 100,1,256,256 100,1,512,512 100,1,1024,1024 "
    "100,16,128,128 100,32,256,256 100,64,512,512 50,64,1024,1024 50,256,512,512 784,32,1,128"
)
# Sizes that fill neither vectors nor tiles, and batches between one sequence and many.
ODD_CASES = (
    "40,3,40,40 20,3,80,650 40,8,96,96 20,8,300,700 40,12,200,200 40,12,80,257 20,16,320,320 "
    "20,16,80,650 40,20,13,40 20,20,700,700 40,24,40,96 40,24,257,257 40,48,80,200 20,48,320,320 "
    "40,96,40,40 20,96,80,257"
)
TABLES = {"default": DEFAULT_CASES, "odd": ODD_CASES}
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def parse_case(text: str) -> Case:
    try:
        case = Case(*map(int, text.split(",")))
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r}: four integers T,B,I,H are wanted") from None
    if min(case) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: every size must be at least 1")
    return case


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    suite.add_options(parser, MODES, peers=["torch"], processes=1)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--cell", nargs="+", choices=CELLS, default=list(CELLS))
    add("--case", nargs="+", type=parse_case, metavar="T,B,I,H", help="instead of a table")
    add("--table", choices=TABLES, default="default", help="of cases (default: %(default)s)")
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    add("--no-limit", action="store_true", help="skip the calibration and the limits")
    args = parser.parse_args(argv)
    args.case = args.case or [parse_case(case) for case in TABLES[args.table].split()]
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    suite.check_options(parser, args)
    return args


class Roofline:
    """The limits of cases on this machine, from calibrations on one thread and on all threads."""

    def __init__(self, threads: int) -> None:
        self.one, self.all = roofline.calibrate(1), roofline.calibrate(threads)

    def of(self, cell: str, case: Case, dtype: str, mode: str, input_grad: bool) -> Row:
        one, limit = (
            roofline.limit(cell, case, mode, dtype, input_grad, m) for m in (self.one, self.all)
        )
        synchronised = roofline.synchronised(case, mode, one, limit, self.all)
        return {
            "limit": limit.seconds,
            "limit_bound": limit.bound,
            "limit_fma": limit.fma,
            "limit_gates": limit.gates,
            "limit_traffic": limit.traffic,
            "limit_synchronised": synchronised,
        }


def calibrated(args: argparse.Namespace) -> dict[int, Roofline]:
    """The limits for each number of threads; empty if there are none."""
    if args.no_limit or args.device != "cpu":
        return {}
    try:
        limits = {threads: Roofline(threads) for threads in args.threads}
    except roofline.CalibrationError as error:
        print(f"no limits: {error}", file=sys.stderr)
        return {}
    for roof in limits.values():
        for machine_ in (roof.one, roof.all):
            print(roofline.format_calibration(machine_))
    return limits


def items(args: argparse.Namespace) -> Iterator[Item]:
    """Yields an item for each mode, cell, dtype and case."""
    for mode, cell, dtype, case in itertools.product(args.mode, args.cell, args.dtype, args.case):
        where = {"mode": mode, "cell": cell, "dtype": dtype, **case._asdict()}
        options = (args.device, DTYPES[dtype], mode, args.input_grad)
        yield Item(where, functools.partial(make_problem, cell, case, *options))


def with_limit(row: Row, args: argparse.Namespace, limits: dict[int, Roofline]) -> Row:
    if "not_timed" in row or row["threads"] not in limits:
        return row
    case = Case(*(row[size] for size in Case._fields))
    roof = limits[row["threads"]]
    found = row | roof.of(row["cell"], case, row["dtype"], row["mode"], args.input_grad)
    return found | {"of_limit": found["limit"] / row["rnnfast_min"]}


def format_row(row: Row) -> str:
    case = "{T},{B},{I},{H}".format(**row)
    where = f"{row['mode']:9} {row['cell']:4} {row['dtype']:8} {case:>15} {row['threads']:>7}  "
    line = f"{where}{row['peer']:12} {suite.format_numbers(row)}"
    if "limit" in row:
        line += f" {row['of_limit']:8.0%} {row['limit_bound']}"
    return line


HEADER = (
    f"{'mode':9} {'cell':4} {'dtype':8} {'T,B,I,H':>15} {'threads':>7}  {'peer':12} "
    f"{suite.NUMBERS} {'of limit':>8}"
)


def format_scaling(rows: list[Row]) -> str:
    """How many times as fast more threads are than the first number of them."""
    times: dict[tuple[object, ...], dict[object, tuple[float, float]]] = {}
    for row in rows:
        if "not_timed" not in row:
            case = (row["mode"], row["cell"], row["dtype"], *(row[size] for size in Case._fields))
            seconds = (row["rnnfast_min"], row["peer_min"])
            times.setdefault((*case, row["peer"]), {})[row["threads"]] = seconds
    lines = ["speed-up by threads, rnnfast / peer:"]
    for (mode, cell, dtype, T, B, I, H, peer), by_threads in times.items():
        first = next(iter(by_threads.values()))
        ratios = (
            f"{threads}: {first[0] / ours:.2f} / {first[1] / theirs:.2f}"
            for threads, (ours, theirs) in by_threads.items()
        )
        lines.append(f"{mode:9} {cell:4} {dtype:8} {T},{B},{I},{H}  {peer}  " + "  ".join(ratios))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    limits = calibrated(args)
    print(HEADER)
    rows = []
    for measured in suite.rows_of(items, format_row, args):
        rows.append(with_limit(measured, args, limits))
        print(format_row(rows[-1]), flush=True)
    roofs = [roof for limit in limits.values() for roof in (limit.one, limit.all)]
    more = {"calibration": [roof.describe() for roof in roofs]} if roofs else {}
    status = suite.finish("benchmarks.compare", rows, args, argv, **more)
    if len(args.threads) > 1:
        print(format_scaling(rows))
    return status


if __name__ == "__main__":
    sys.exit(main())
