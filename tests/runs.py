"""The calls that the tests of kernels make: covering arrays, edge cases and random calls."""

from __future__ import annotations

import datetime
import os
import random
from collections.abc import Iterator
from itertools import combinations, product
from typing import NamedTuple

import torch
from cases import (
    BLOCKS_OF_A_STEP,
    DTYPES,
    GRADS,
    GRID_SHAPE,
    LARGE,
    LAYOUTS,
    MANY_BLOCKS,
    SHAPES,
    SPLIT_SHAPES,
    Case,
)
from covering import Row, covering

from rnnfast.reference import CELLS


class Run(NamedTuple):
    """One call: forward and backward."""

    case: Case
    dtype: torch.dtype
    threads: int = 1
    grads: str = "all"
    """See `cases.GRADS`."""

    @property
    def is_shared(self) -> bool:
        """Whether there is enough work to use several threads."""
        case = self.case
        units = CELLS[case.cell].gates * case.H
        return case.T * case.B * units * (case.I + case.H) >= 100_000

    def __str__(self) -> str:
        options = [str(self.dtype).removeprefix("torch.")]
        options += [f"{self.threads}threads"] * (self.threads > 1)
        options += [f"grads_{self.grads}"] * (self.grads != "all")
        return "-".join([str(self.case), *options])


SIZES = {
    "T": (1, 2, 3, 5, 9, 70),  # from 9 sequences on, the backward takes 70 in several blocks
    "B": (1, 2, 4, 6, 9, 17, 33, 70),  # tiles have 6, 8 or 32 rows
    "I": (1, 3, 8, 17, 33, 70, 100),
    "H": (1, 5, 8, 16, 20, 33, 64, 70, 130),  # vectors: 2 to 16 units; Elman's panels: 4 vectors
}
OPTIONS = {
    "cell": tuple(CELLS),
    "dtype": DTYPES,
    "bias": (True, False),
    "reverse": (False, True),
    "layout": LAYOUTS,
    "lengths": ("", "padded", "packed"),
    "resets": (False, True),
    "gates": ("", "saturated", "remembering"),
    "cells": (False, True),
    "proj": ("", "few", "most"),
    "tokens": (False, True),
    "threads": (1, 2),
    "grads": GRADS,
}
MOST_PRODUCTS = 3e6
"""The most multiplications per gate in a call; more would make slow kernels take too long."""


def allowed(row: Row) -> bool:
    """Whether a call can have these options; some may be missing in ``row``."""
    of = row.get
    if of("lengths") == "packed":
        by_batch = of("layout") in ("batch_first", "same_row") or of("grads") == "batch_first"
        if of("resets") or by_batch or 0 in of("shape", (1, 1))[:2]:
            return False
    if of("cell", "lstm") != "lstm" and (of("cells") or of("proj")):
        return False
    T, B, I, H = of("shape") or [of(name, 1 if name != "H" else 5) for name in SIZES]
    # the bits that gates lose are estimated as an average over units
    if of("gates") and (of("bias") is False or H < 5):
        return False
    if of("tokens") and of("shape", (1, 1, 1))[2] == 0:
        return False
    return "shape" in row or T * B * of("H", 1) * (I + of("H", 1)) <= MOST_PRODUCTS


def run_of(row: Row) -> Run:
    """Returns the call with these options; missing ones have their default."""
    row = dict(row)
    shape = row.pop("shape", None) or tuple(row.pop(name) for name in SIZES)
    dtype, threads = row.pop("dtype"), row.pop("threads", 1)
    grads, proj = row.pop("grads", "all"), row.pop("proj", "")
    P = {"": 0, "few": max(min(shape[3], 3), shape[3] // 4), "most": max(1, shape[3] - 1)}[proj]
    return Run(Case(row.pop("cell"), *shape, proj=P, **row), dtype, threads, grads)


# dimensions that together decide which path through the kernels a call takes
TRIPLES = [
    ("H", "B", "layout"),
    ("T", "B", "lengths"),
    ("cell", "T", "B"),
    ("cell", "I", "H"),
    *(("cell", "dtype", name) for name in ("T", "B", "H", "gates", "tokens", "reverse")),
    *(("cell", "lengths", name) for name in ("layout", "reverse", "grads", "tokens", "dtype")),
    ("cell", "resets", "reverse"),
    ("lengths", "resets", "reverse"),
    ("layout", "reverse", "lengths"),
    ("layout", "reverse", "resets"),
    ("layout", "lengths", "dtype"),
    ("proj", "lengths", "reverse"),
    ("proj", "cells", "dtype"),
]
ALL_SIZES = SIZES | OPTIONS
COVERING = [
    run_of(row) for row in covering(ALL_SIZES, [*TRIPLES, *combinations(ALL_SIZES, 2)], allowed)
]
"""All pairs of values of all dimensions, and all triples of these dimensions."""

AT_EDGES = {"shape": SHAPES} | OPTIONS
EDGES = [
    run_of(row)
    for row in covering(AT_EDGES, [("shape", "cell", "dtype"), *combinations(AT_EDGES, 2)], allowed)
]
"""Every edge case with every cell and dtype, and all pairs of edge cases and options."""

AT_LARGE = {"shape": (LARGE,)} | OPTIONS
AT_BLOCKS = {"shape": (MANY_BLOCKS, BLOCKS_OF_A_STEP)} | OPTIONS  # these calls take long
OF_BLOCKS = [*combinations(("shape", "cell", "dtype"), 2)]
LONG = [
    run_of(row)
    for row in [
        *covering(AT_LARGE, [("cell", "dtype")], allowed),
        *covering(AT_BLOCKS, OF_BLOCKS, allowed),
    ]
]
"""Large cases with every cell and dtype; of those with blocks of steps, every pair of these."""
MORE_LONG = [run_of(row) for row in covering(AT_BLOCKS, [("shape", "cell", "dtype")], allowed)]
"""Every large case of blocks of steps with every cell and dtype."""
ALL_REMEMBERING = [
    run_of({"shape": (300, 4, 3, 10), "cell": cell, "dtype": dtype, "gates": "remembering"} | more)
    for cell in CELLS
    for dtype in DTYPES
    for more in ({}, {"reverse": True, "lengths": "padded"})
    if (cell, dtype) != ("elman_relu", torch.float16)  # sums of these sizes overflow in float16
]
"""Long sequences whose state hardly changes from step to step."""
# of each cell and dtype one of the two calls, in turn
REMEMBERING = [run for i, run in enumerate(ALL_REMEMBERING) if i % 4 in (0, 3)]
MORE_REMEMBERING = [run for run in ALL_REMEMBERING if run not in REMEMBERING]

AT_SPLITS = {"shape": tuple(SPLIT_SHAPES)} | OPTIONS
BY_PAIRS = [*combinations(("shape", "cell", "lengths"), 2), ("shape", "dtype"), ("cell", "dtype")]
BY_TRIPLES = [("shape", "cell", "lengths"), ("shape", "dtype"), ("cell", "dtype")]
SPLIT = [run_of(row) for row in covering(AT_SPLITS, BY_PAIRS, allowed)]
"""Calls that several threads split, in every way of splitting."""
MORE_SPLIT = [run_of(row) for row in covering(AT_SPLITS, BY_TRIPLES, allowed)]
"""Every way of splitting, with every cell and kind of sequences."""
GRID = [
    run_of(row)
    for row in covering(
        {"shape": (GRID_SHAPE,)} | OPTIONS, [("cell", "lengths"), ("cell", "dtype")], allowed
    )
]
"""Calls that threads split by both rows and units."""


def seed_of_the_day() -> int:
    """Returns today's date as a number such as 20300131, or ``RNNFAST_TEST_SEED`` if it is set."""
    today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d")
    return int(os.environ.get("RNNFAST_TEST_SEED") or today)


def random_run(generator: random.Random) -> Run:
    """Returns a random call that is not too long: all options, sizes up to 3/2 of those above."""
    while True:
        row = {name: generator.choice(values) for name, values in OPTIONS.items()}
        row |= {name: round(1.5 ** generator.uniform(0, 12)) for name in SIZES}
        row["H"] = max(4, row["H"])  # sums of a single row may cancel
        if allowed(row):
            return run_of(row)


def product_of_all(cell: str, shape: tuple[int, ...]) -> Iterator[Run]:
    """Returns calls with all dtypes, directions and kinds of sequences, in every variant."""
    variants: list[Row] = [{}, {"bias": False}, {"tokens": True}, {"gates": "saturated"}]
    variants += [{"proj": "few", "cells": True}, {"proj": "most"}, {"cells": True}]
    variants += [{"layout": layout} for layout in LAYOUTS[1:]]
    names = ("dtype", "reverse", "lengths", "resets")
    for values in product(*(OPTIONS[name] for name in names)):
        for variant in variants:
            row = {"shape": shape, "cell": cell, **dict(zip(names, values, strict=True)), **variant}
            if allowed(row):
                yield run_of(row)


UNEQUAL_LENGTHS = {
    "cell": tuple(CELLS),
    "steps": (("padded", False), ("packed", False), ("padded", True)),  # lengths, and resets
    "reverse": (False, True),
}


def of_unequal_lengths(cell: str, steps: tuple[str, bool], reverse: bool) -> Case:
    H = 4 if cell == "elman_relu" else 3  # with 3 a unit would be at relu's kink
    return Case(cell, 4, 3, 2, H, True, reverse, "contiguous", *steps, cells=cell == "lstm")


GRADCHECK_CASES = (
    [
        Case(cell, *shape, bias=bias, reverse=reverse)
        for cell in CELLS
        for shape, bias, reverse in [
            ((3, 2, 2, 3), True, False),
            ((2, 1, 3, 2), False, True),
            ((1, 2, 1, 1), True, True),
        ]
    ]
    + [
        of_unequal_lengths(**row)
        for row in covering(UNEQUAL_LENGTHS, [*combinations(UNEQUAL_LENGTHS, 2)], lambda row: True)
    ]
    + [
        Case("lstm", 3, 2, 2, 3, reverse=reverse, lengths=lengths, cells=True, proj=2)
        for lengths in ("", "packed")
        for reverse in (False, True)
    ]
    + [
        Case(cell, 4, 3, 3, 3, reverse=reverse, lengths=lengths, tokens=True)
        for cell in CELLS
        for lengths, reverse in (("", False), ("packed", True))
    ]
)
MORE_GRADCHECK_CASES = [
    case
    for values in product(*UNEQUAL_LENGTHS.values())
    if (case := of_unequal_lengths(*values)) not in GRADCHECK_CASES
]
"""The other combinations."""
