"""How the planner splits a call: threads, blocks of steps, packing, weight formats."""

from __future__ import annotations

import pytest
from cases import GRID_SHAPE, LARGE, OVERLAP_SHAPES, SPLIT_SHAPES

from rnnfast import backend
from rnnfast.reference import CELLS


@pytest.mark.parametrize("threads_planned", [1, 2, 3, 16, 64])
@pytest.mark.parametrize("cell", CELLS)
def test_plan(cell: str, threads_planned: int, device: str) -> None:
    """Plans are within their limits for any size and number of threads."""
    plan = backend.EXTENSION.plan
    for T, B, I, H in [(1, 1, 1, 1), (1, 1, 512, 512), (100, 1, 8, 4096), (7, 300, 0, 20)]:
        for backward in (False, True):
            facts = plan(cell, T, B, I, H, "float32", threads_planned, backward)
            assert 1 <= facts["threads"] <= threads_planned
            assert 1 <= facts["block_steps"] <= T
            if facts["split"] == "rows":
                assert facts["threads"] <= B
            assert facts["workspace_bytes"] > 0
    with pytest.raises(ValueError, match="positive"):
        plan(cell, 0, 1, 1, 1)
    with pytest.raises(ValueError, match="unknown cell"):
        plan("no_such_cell", 1, 1, 1, 1)


@pytest.mark.parametrize("shape", SPLIT_SHAPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_planned_split(cell: str, shape: tuple[int, ...]) -> None:
    """The plans for shapes of test_kernels.py, which runs them with several numbers of threads."""
    for backward in (False, True):
        plan = backend.EXTENSION.plan(cell, *shape, "float32", 2, backward)
        assert plan["split"] == SPLIT_SHAPES[shape]


@pytest.mark.parametrize("cell", CELLS)
def test_planned_grid(cell: str) -> None:
    """A shape of test_kernels.py that threads split by rows and units."""
    plans = [
        backend.EXTENSION.plan(cell, *GRID_SHAPE, "float32", threads, backward)
        for threads in (4, 6)
        for backward in (False, True)
    ]
    assert any(plan["row_shares"] > 1 and plan["unit_shares"] > 1 for plan in plans)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("cell", CELLS)
def test_split_precision(cell: str, backward: bool, device: str) -> None:
    """Split precision (AMX for float32) is used in large products."""
    amx = backend.EXTENSION.get_cpu_capability() in ("avx512_amx", "amx_emulation")

    def splits(*sizes: int, dtype: str = "float32") -> tuple[bool, bool]:
        plan = backend.EXTENSION.plan(cell, *sizes, dtype, 2, backward)
        return plan["block_split_precision"], plan["step_split_precision"]

    assert splits(*LARGE) == (amx, amx)
    assert splits(100, 2, 256, 256) == (amx, False)
    assert splits(1, 2, 256, 256) == (False, False)
    assert splits(*LARGE, dtype="float64") == (False, False)
    assert splits(*LARGE, dtype="bfloat16") == (False, False)


def test_more_threads_where_there_is_more_work(avx512: None) -> None:
    plan = backend.EXTENSION.plan
    assert plan("lstm", 1, 1, 8, 8, "float32", 2)["threads"] == 1
    assert plan("lstm", 100, 1, 1024, 1024, "float32", 2)["split"] == "units"
    assert plan("lstm", 100, 32, 64, 64, "float32", 2)["split"] == "rows"
    # tiles of five and six rows take time in proportion to their rows
    assert plan("lstm", 100, 64, 128, 128, "float32", 2)["split"] == "rows"


def test_steps_are_dealt_where_waiting_for_each_other_is_cheap(avx512: None) -> None:
    plan = backend.EXTENSION.plan
    for barrier_cycles, split in ((200, "units"), (1700, "none")):
        facts = plan("lstm", 100, 1, 64, 64, "float32", 2, barrier_cycles=barrier_cycles)
        assert facts["split"] == split


def test_weights_of_a_far_core_are_dear_for_a_short_sequence(avx512: None) -> None:
    # with rows split across threads, each thread reads what the other has packed
    for barrier_cycles, split in ((200, "rows"), (1700, "none")):
        machine = {"l3_line_cycles": 3, "barrier_cycles": barrier_cycles}
        facts = backend.EXTENSION.plan("elman_tanh", 8, 8, 64, 64, "float32", 2, **machine)
        assert facts["split"] == split


def test_rows_are_dealt_where_units_would_fetch_many_states(avx512: None) -> None:
    # at every step, half of h is read from the other core
    for B, split in ((64, "rows"), (8, "units")):
        facts = backend.EXTENSION.plan("gru", 30, B, 512, 512, "float32", 2)
        assert facts["split"] == split


def test_rows_are_dealt_though_threads_share_a_core_just_now(avx512: None) -> None:
    # barriers take a time slice then, but loading a line costs no more than from a far core
    facts = backend.EXTENSION.plan("lstm", 100, 8, 1, 400, "float32", 2, barrier_cycles=350e3)
    assert facts["split"] == "rows"


def test_a_second_thread_for_the_products_of_a_long_backward(avx512: None) -> None:
    """The products use a second thread, though the recurrence runs on one."""
    for T, threads in ((30, 1), (400, 2)):
        sizes = ("lstm", T, 1, 64, 64, "float32", 2, True)
        facts = backend.EXTENSION.plan(*sizes, barrier_cycles=1700)
        assert (facts["threads"], facts["split"]) == (threads, "none")


def test_units_are_dealt_where_l3_is_slow(avx512: None) -> None:
    # a thread reads half of 16 MB of weights per step, or all of them for half of the rows
    plan = backend.EXTENSION.plan
    for l3_line_cycles, split in ((3, "rows"), (12, "units")):
        machine = {"l2_bytes": 1 << 20, "l3_line_cycles": l3_line_cycles}
        facts = plan("lstm", 3000, 12, 1024, 1024, "float32", 2, **machine)
        assert facts["split"] == split


def test_weights_are_read_once_in_a_single_step(avx512: None) -> None:
    """Each thread packs the panels of its units just before their only use."""
    machine = {"l2_bytes": 1 << 20, "l3_line_cycles": 3}
    for T, hidden, split in (
        (1, "panelwise", "units"),
        (2, "once", "units"),
        (900, "once", "rows"),
    ):
        facts = backend.EXTENSION.plan("lstm", T, 20, 128, 128, "float32", 2, **machine)
        assert (facts["hidden_packing"], facts["split"]) == (hidden, split)


def test_the_backward_packs_by_panels_what_it_uses_once(avx512: None) -> None:
    """W_ih is used once if there is one block of steps, W_hh if there is one step."""
    for T, threads, expected in (
        (1, 2, ("panelwise", "panelwise")),
        (2, 2, ("panelwise", "once")),
        (2, 16, ("once", "once")),  # more threads than panels of W_ih
        (900, 2, ("once", "once")),
    ):
        facts = backend.EXTENSION.plan("lstm", T, 24, 200, 520, "float32", threads, True)
        assert (facts["input_packing"], facts["hidden_packing"]) == expected


def test_small_weights_and_pairs_are_packed_for_fewer_uses(avx512: None) -> None:
    for size, dtype, uses in (
        (64, "float32", 8),
        (128, "float32", 12),
        (512, "float32", 24),
        (512, "float16", 6),
    ):
        for T, packing in ((uses - 1, "none"), (uses, "once")):
            facts = backend.EXTENSION.plan("lstm", T, 1, size, size, dtype, 1)
            assert facts["hidden_packing"] == packing


@pytest.mark.parametrize("backward", [False, True])
def test_where_layers_overlap(backward: bool, avx512: None) -> None:
    def at_once(shape: str, stacked: bool, threads: int) -> int:
        sizes = OVERLAP_SHAPES[shape]
        return backend.EXTENSION.layers_at_once(
            "lstm", *sizes, 4, stacked, threads, backward, 1 << 20
        )

    for stacked in (False, True):
        assert [at_once("one row", stacked, n) for n in (1, 2, 4)] == [1, 2, 4]
        assert at_once("large", stacked, 2) == 1
    assert at_once("rows", False, 2) == 2
    # layers of a single step have nothing to overlap; two directions do
    single_step = ("lstm", 1, 64, 512, 512, 2)
    assert backend.EXTENSION.layers_at_once(*single_step, True, 2, backward, 1 << 20) == 1
    assert backend.EXTENSION.layers_at_once(*single_step, False, 2, backward, 1 << 20) == 2
