"""How a plan splits the recurrence across threads: a grid of row shares and unit shares.

Costs are fixed instead of measured, so that plans are the same on every machine with AVX-512.
"""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from cases import CELLS

import rnnfast
from rnnfast import backend

BARRIERS = [300.0, 600.0, 900.0, 1200.0, 1500.0, 1800.0]  # cycles for 2, 4, 8, ... 64 threads


def plan(cell: str, *sizes: int, threads: int, backward: bool = False) -> dict[str, Any]:
    machine = {"l2_bytes": 1 << 20, "l3_line_cycles": 2.9, "barrier_cycles": BARRIERS}
    return backend.EXTENSION.plan(cell, *sizes, threads=threads, backward=backward, **machine)


def grid(cell: str, *sizes: int, threads: int, backward: bool = False) -> tuple[int, int]:
    facts = plan(cell, *sizes, threads=threads, backward=backward)
    return facts["row_shares"], facts["unit_shares"]


SHAPES = [
    (100, 1, 64, 64),
    (100, 3, 512, 512),
    (100, 8, 1024, 1024),
    (50, 64, 512, 512),
    (1, 9, 8, 8),
]


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 6, 8, 16, 32, 64, 200])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_every_share_has_work(cell: str, backward: bool, threads: int, device: str) -> None:
    for T, B, I, H in SHAPES:
        facts = plan(cell, T, B, I, H, threads=threads, backward=backward)
        rows, units = facts["row_shares"], facts["unit_shares"]
        assert 1 <= rows <= B
        assert 1 <= units <= H
        assert rows * units <= facts["threads"] <= threads
        if not backward:
            assert rows * units == facts["threads"]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # one row: units are split while barriers pay
        ((100, 1, 256, 256), {4: (1, 4), 8: (1, 8), 16: (1, 16), 32: (1, 16), 64: (1, 16)}),
        # eight rows, with weights that fit only L3
        ((100, 8, 1024, 1024), {4: (2, 2), 8: (2, 4), 16: (2, 8), 32: (2, 16), 64: (4, 16)}),
        # eight rows and few panels
        ((100, 8, 256, 256), {4: (2, 2), 8: (4, 2), 16: (4, 4), 32: (4, 8), 64: (8, 8)}),
        # many rows, with weights that fit L2: rows are split until tiles become low
        ((100, 32, 128, 128), {4: (4, 1), 8: (8, 1), 16: (8, 2), 32: (16, 2), 64: (16, 4)}),
        # threads that the rows do not divide: one share per row
        ((100, 3, 512, 512), {64: (3, 21)}),
        # a product so small that no second thread pays
        ((100, 1, 16, 16), {4: (1, 1), 64: (1, 1)}),
    ],
    ids=str,
)
def test_grids_of_many_threads(
    sizes: tuple[int, ...], expected: dict[int, tuple[int, int]], avx512: None
) -> None:
    found = {threads: grid("lstm", *sizes, threads=threads) for threads in expected}
    assert found == expected


def test_sixteen_threads_have_work_with_eight_rows(avx512: None) -> None:
    for backward in (False, True):
        rows, units = grid("lstm", 100, 8, 1024, 1024, threads=16, backward=backward)
        assert rows * units == 16
        assert rows > 1
        assert units > 1


def test_measured_costs_change_only_in_steps(threads: None) -> None:
    """Plans would change from call to call if costs did."""
    torch.set_num_threads(4)
    until, seen = time.monotonic() + 1.5, set()
    while time.monotonic() < until:
        costs = backend.EXTENSION.barrier_cycles(4)
        assert all(math.log2(cycles).is_integer() for cycles in costs)
        assert costs[1:] == [costs[1]] * (len(costs) - 1)
        seen.add(tuple(costs))
        time.sleep(0.001)
    assert len(seen) <= 4  # they are measured again every half second


def test_threads_beyond_the_grid_share_the_products(avx512: None) -> None:
    facts = plan("lstm", 400, 1, 64, 64, threads=8, backward=True)
    assert facts["row_shares"] * facts["unit_shares"] < facts["threads"] == 8


def test_costs_of_barriers_by_number_of_threads(avx512: None) -> None:
    """If a barrier of four threads is expensive, only two threads are used."""
    sizes = ("lstm", 100, 1, 128, 128)
    for barrier_cycles, units in (([200.0, 200.0], 4), ([200.0, 9000.0], 2), (200.0, 4)):
        facts = backend.EXTENSION.plan(*sizes, threads=4, barrier_cycles=barrier_cycles)
        assert facts["unit_shares"] == units
    with pytest.raises(ValueError, match="barrier_cycles"):
        backend.EXTENSION.plan(*sizes, threads=4, barrier_cycles=[])


@pytest.fixture
def many_cores() -> Any:
    backend.EXTENSION.assume_cores(64)
    yield
    backend.EXTENSION.assume_cores(0)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
@pytest.mark.parametrize("shape", [(12, 8, 32, 512), (9, 5, 64, 256), (20, 6, 16, 128)], ids=str)
def test_grids_give_the_same_bits(
    mode: str, shape: tuple[int, ...], ragged: bool, threads: None, many_cores: None
) -> None:
    T, B, I, H = shape
    torch.manual_seed(0)
    layer = getattr(rnnfast, mode)(I, H, backend="fused")
    x = torch.randn(T, B, I, requires_grad=True)
    lengths = torch.randint(1, T + 1, (B,)) if ragged else None

    def run() -> list[torch.Tensor]:
        y, _ = layer(x, lengths=lengths)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]

    torch.set_num_threads(1)
    expected = run()
    grids = set()
    for count in (2, 3, 4, 6, 8, 16):
        torch.set_num_threads(count)
        grids.add(grid(mode.lower(), *shape, threads=count))
        for actual, value in zip(run(), expected, strict=True):
            assert torch.equal(actual, value)
    assert any(rows > 1 and units > 1 for rows, units in grids)
