"""Compares frozen layers with their peers: `python -m benchmarks.frozen --help`.

Layers that `rnnfast.freeze` makes, by the type of their weights, run in inference beside the same
layer of rnnfast that is not frozen, torch.nn, ONNX Runtime, OpenVINO, and the int8 layers of torch
and of ONNX Runtime. Results are checked, and then all implementations are timed in turn, in several
new processes. A ratio is the peer's time divided by that of the frozen layer: above 1, the frozen
layer is faster. The column "dtype" is the type of the frozen weights.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Iterator

import torch

from rnnfast.frozen import TYPES

from . import suite
from .compare import parse_case
from .peers import build_frozen
from .steps import CELLS, make_problem
from .suite import Item, Row

TOLERANCES = {"float32": 0.0, "bfloat16": 0.02, "float16": 0.005, "int8": 0.1}
CASES = (
    "1,1,64,64 1,1,256,256 1,1,512,512 1,1,1024,1024 100,1,64,64 100,1,128,128 100,1,512,512 "
    "100,1,1024,1024 20,8,300,700 100,16,128,128 50,16,400,400 100,32,256,256 50,64,512,512"
)


def items(args: argparse.Namespace) -> Iterator[Item]:
    """Yields an item for each cell, case and type of weights."""
    for cell, case, weights in itertools.product(args.cell, args.case, args.weights):
        where = {"mode": "inference", "cell": cell, "dtype": weights, **case._asdict()}
        make = functools.partial(make_problem, cell, case, "cpu", torch.float32, "inference")
        build = functools.partial(build_frozen, weights=weights)
        yield Item(where, make, build, TOLERANCES[weights])


def format_row(row: Row) -> str:
    case = "{T},{B},{I},{H}".format(**row)
    where = f"{row['dtype']:8} {row['cell']:4} {case:>16} {row['threads']:>7}  {row['peer']:16} "
    return where + suite.format_numbers(row)


HEADER = f"{'weights':8} {'cell':4} {'T,B,I,H':>16} {'threads':>7}  {'peer':16} {suite.NUMBERS}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.frozen",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--cell", nargs="+", choices=CELLS, default=["LSTM", "GRU"])
    add(
        "--case",
        nargs="+",
        type=parse_case,
        default=[parse_case(text) for text in CASES.split()],
        metavar="T,B,I,H",
    )
    add("--weights", nargs="+", choices=TYPES, default=[*TYPES])
    peers = ["unfrozen", "torch", "onnxruntime", "openvino", "torch_int8", "onnxruntime_int8"]
    suite.add_options(parser, ["inference"], peers=peers, processes=2)
    args = parser.parse_args(argv)
    suite.check_options(parser, args)
    return suite.run("benchmarks.frozen", items, HEADER, format_row, args, argv)


if __name__ == "__main__":
    sys.exit(main())
