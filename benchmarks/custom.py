"""Compares cells that users write with their peers: `python -m benchmarks.custom --help`.

The cells are a light GRU, an LSTM with peepholes, a GRU with layer normalisation (that of Dreamer),
minGRU, which has no recurrent weights, sLSTM, which has four states, and the LSTM and GRU of
torch.nn, written as users would write them. `rnnfast.Layer` runs beside

loop      A loop over time in PyTorch. It projects the input of all steps at once.
compiled  The same loop under torch.compile, which unrolls it: for up to 25 steps, and only where
          another process has compiled it within a time limit.
jax       jax.lax.scan under jax.jit.
builtin   rnnfast's own layer, of LSTM and GRU.

A case with T = 1 is a single step: `rnnfast.LayerCell` runs beside a function in PyTorch and
rnnfast's own cell. Results are checked, and then all implementations are timed in turn, in several
new processes. A ratio is the peer's time divided by that of the cell that was written with
rnnfast.cell: above 1, that is faster.

At the end, each cell is compiled once in an empty cache, and prepared again in a new process.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import torch

import rnnfast.custom

from . import suite
from .compare import parse_case
from .custom_cells import KINDS, make_problem
from .peers import build_written
from .steps import MODES
from .suite import Item, Row

CASES = "1,1,64,64 10,16,128,128 100,1,64,64 100,1,256,256 100,16,128,128 50,32,256,256"


def items(args: argparse.Namespace) -> Iterator[Item]:
    """Yields an item for each mode, cell and case."""
    for mode, cell, case in itertools.product(args.mode, args.cell, args.case):
        where = {"mode": mode, "cell": cell, "dtype": "float32", **case._asdict()}
        given = (cell, case, mode, case.T == 1, args.input_grad)
        yield Item(where, functools.partial(make_problem, *given), build_written)


def prepare(name: str, folder: str) -> float:
    """Compiles a cell, or finds it in the cache in `folder`; returns the seconds.

    Raises:
        RuntimeError: There are no kernels.
    """
    os.environ[rnnfast.custom.CACHE_VARIABLE] = folder
    begin = time.perf_counter()
    if problem := KINDS[name].cell.prepare(torch.float32):
        raise RuntimeError(f"{name}: {problem}")
    return time.perf_counter() - begin


def in_new_process(name: str, folder: str) -> float:
    """What `prepare` returns in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(prepare, name, folder).result()


def compile_times(names: list[str]) -> Iterator[Row]:
    """Yields for each cell the seconds of the first compile, and of a start that finds it."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            first = in_new_process(name, folder)
            cached = min(in_new_process(name, folder) for _ in range(3))
        yield {"cell": name, "first": first, "cached": cached}


def format_row(row: Row) -> str:
    case = "{T},{B},{I},{H}".format(**row)
    where = f"{row['mode']:9} {row['cell']:14} {case:>13} {row['threads']:>7}  {row['peer']:9} "
    return where + suite.format_numbers(row)


HEADER = f"{'mode':9} {'cell':14} {'T,B,I,H':>13} {'threads':>7}  {'peer':9} {suite.NUMBERS}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.custom",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    cases = [parse_case(text) for text in CASES.split()]
    add("--cell", nargs="+", choices=KINDS, default=[*KINDS])
    add("--case", nargs="+", type=parse_case, default=cases, metavar="T,B,I,H")
    add("--no-compile-times", action="store_true", help="only time steps and layers")
    suite.add_options(parser, MODES, peers=["loop", "compiled", "jax", "builtin"], processes=3)
    args = parser.parse_args(argv)
    if args.processes == 1:
        suite.check_options(parser, args)
    print(HEADER)
    rows = []
    # new processes for each number of threads, which JAX takes once
    for threads in args.threads:
        own = argparse.Namespace(**vars(args) | {"threads": [threads]})
        for row in suite.rows_of(items, format_row, own):
            rows.append(row)
            print(format_row(row), flush=True)
    compiles = [] if args.no_compile_times else [*compile_times(args.cell)]
    for row in compiles:
        first, cached = row["first"], 1e3 * row["cached"]
        print(f"{row['cell']:14} compiles in {first:.1f} s, starts in {cached:.0f} ms afterwards")
    return suite.finish("benchmarks.custom", rows, args, argv, compiles=compiles)


if __name__ == "__main__":
    sys.exit(main())
