"""Values and gradients of the operators against the oracle, and results that must be bit-identical.

Errors of the operators, and their autograd, are tested in test_operators.py.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from cases import (
    DTYPES,
    LARGE,
    MANY_BLOCKS,
    SHAPES,
    Case,
    assert_close,
    bound,
    cast,
    dtype_name,
    error,
    oracle,
    outputs_of,
    rounding_of_settled_gates,
    run_backward,
    run_forward,
    sample_grads,
    sample_inputs,
    sample_with_oracle,
)
from covering import quick_pairs
from runs import (
    COVERING,
    EDGES,
    GRID,
    LONG,
    MORE_LONG,
    MORE_REMEMBERING,
    MORE_SPLIT,
    REMEMBERING,
    SPLIT,
    Run,
    product_of_all,
    random_run,
    seed_of_the_day,
)
from targets import COMPLETE, REPLACED, TARGETS, check_on, on, running_on, together, with_kernels

import rnnfast
from rnnfast import backend, reference
from rnnfast.reference import CELLS

RANDOM_RUNS = 60
"""The number of random calls per day; `test_many_random_calls` makes more."""
MORE_RUNS = [*MORE_LONG, *MORE_REMEMBERING]


def results_of(
    run: Run, inputs: list[torch.Tensor | None], grads: list[torch.Tensor | None], **options: bool
) -> list[torch.Tensor]:
    """Returns outputs and gradients."""
    forward = run_forward(run.case, inputs, save=True, **options)
    return [*outputs_of(run.case, forward), *run_backward(run.case, inputs, grads, forward)]


def assert_same_bits(
    others: list[torch.Tensor], results: list[torch.Tensor], when: str, run: Run
) -> None:
    for i, (one, other) in enumerate(zip(others, results, strict=True)):
        assert torch.equal(one, other), f"{run}: result {i} is another {when}"


def allowed_errors(run: Run) -> list[float]:
    """The bounds of `error` for outputs and gradients, in the order of `results_of`."""
    case, dtype = run.case, run.dtype
    states = CELLS[case.cell].states
    steps = case.T if case.gates == "remembering" else 1  # states pass through many steps unchanged
    tolerance = bound(dtype, steps)
    outputs = [tolerance] * (1 + states + case.cells)
    # sums over batch and time contain the rounding errors of all gates
    gradients = [5 * tolerance] * (1 + states + 4 + bool(case.proj))
    for state in range(1, 1 + states):
        gradients[state] += rounding_of_settled_gates(case, dtype)
    return outputs + gradients


def test_zeros_would_fail() -> None:
    """A kernel that returns zeros must not pass, whatever the noise is."""
    expected = torch.ones(3, 10, dtype=torch.float64)
    for run in [*COVERING, *EDGES, *LONG, *REMEMBERING, *MORE_RUNS, *SPLIT, *MORE_SPLIT, *GRID]:
        for allowed in allowed_errors(run):
            with pytest.raises(AssertionError):
                assert_close(0 * expected, expected, allowed, run.dtype, 1e9 * expected)


def check_run(run: Run, targets: list[str]) -> None:
    """Checks what holds for any call: values, gradients, and variants that give the same bits."""
    case, dtype, wide = run.case, run.dtype, reference.compute_dtype(run.dtype)
    states, saved = CELLS[case.cell].states, CELLS[case.cell].saved
    torch.set_num_threads(1)
    exact_inputs, exact_grads, expected, noise = sample_with_oracle(case, dtype, run.grads)
    chosen = with_kernels(targets, case, dtype)
    best = [name for name in chosen if name in COMPLETE][-1:]
    values = [*expected.outputs, *expected.grads]
    noises = [None] * len(values) if noise is None else [*noise.outputs, *noise.grads]
    bounds, count = allowed_errors(run), len(expected.outputs)

    def check(device: str) -> None:
        inputs, grads = cast(exact_inputs, dtype, device), cast(exact_grads, dtype, device)
        torch.set_num_threads(run.threads if run.is_shared else 1)
        found = results_of(run, inputs, grads)
        for i, (actual, value, noise) in enumerate(zip(found, values, noises, strict=True)):
            if value is None:
                assert actual.numel() == 0
                continue
            assert actual.dtype == (wide if states < i < count else dtype)
            try:
                assert_close(actual, value, bounds[i], dtype, noise)
            except AssertionError as failure:
                name = f"output {i}" if i < count else f"gradient {i - count}"
                raise AssertionError(f"{run}: {name}: {failure}") from None
        plain = run_forward(case, inputs, save=False)[: 1 + states]
        assert_same_bits(list(plain), found[: 1 + states], "where nothing is saved", run)
        if device != "cpu":
            return
        name = backend.EXTENSION.get_cpu_capability()
        if saved and name in COMPLETE:
            computed = results_of(run, inputs, grads, recompute=True)
            assert_same_bits(computed, found, "with gates computed again", run)
        if not run.is_shared or name not in best:  # all others split work in the same way
            return
        torch.set_num_threads(2 if run.threads == 1 else 1)
        others = results_of(run, inputs, grads)
        assert_same_bits(others, found, f"with {torch.get_num_threads()} threads", run)

    check_on(chosen, check)


@pytest.mark.parametrize(
    "run",
    [
        *[*COVERING, *EDGES, *LONG, *REMEMBERING],
        *(pytest.param(run, marks=pytest.mark.full) for run in MORE_RUNS),
    ],
    ids=str,
)
@together
def test_values_and_gradients(
    run: Run, targets: list[str], poisoned_memory: None, threads: None
) -> None:
    check_run(run, targets)


def check_random_run(number: int, targets: list[str]) -> None:
    """The calls differ every day; ``RNNFAST_TEST_SEED`` repeats those of another day."""
    seed = seed_of_the_day()
    try:
        check_run(random_run(random.Random(f"{seed} {number}")), targets)
    except AssertionError as failure:
        raise AssertionError(f"RNNFAST_TEST_SEED={seed}, number {number}: {failure}") from None


@pytest.mark.parametrize("number", range(RANDOM_RUNS))
@together
def test_random_calls(
    number: int, targets: list[str], poisoned_memory: None, threads: None
) -> None:
    check_random_run(number, targets)


@pytest.mark.full
@pytest.mark.parametrize("hundred", range(50))
@together
def test_many_random_calls(
    hundred: int, targets: list[str], poisoned_memory: None, threads: None
) -> None:
    for number in range(100 * hundred, 100 * hundred + 100):
        check_random_run(number, targets)


@pytest.mark.full
@pytest.mark.parametrize("shape", [*SHAPES, LARGE, MANY_BLOCKS], ids=str)
@pytest.mark.parametrize("cell", CELLS)
@together
def test_a_third_of_all_combinations(
    cell: str, shape: tuple[int, ...], targets: list[str], poisoned_memory: None, threads: None
) -> None:
    """Another third each day; ``RNNFAST_TEST_SEED`` repeats that of another day."""
    seed = seed_of_the_day()
    for run in islice(product_of_all(cell, shape), seed % 3, None, 3):
        try:
            check_run(run, targets)
        except AssertionError as failure:
            raise AssertionError(f"RNNFAST_TEST_SEED={seed}: {failure}") from None


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("cell", CELLS)
def test_what_instruction_sets_share(cell: str, dtype: torch.dtype) -> None:
    """For dtypes without kernels of their own, targets use another's kernels, and give its bits."""
    others = [name for name in REPLACED if name in COMPLETE and dtype not in REPLACED[name]]
    if not others:
        return
    for shape in ((9, 13, 20, 65), LARGE):
        run = Run(Case(cell, *shape), dtype)
        inputs = cast(sample_inputs(run.case, dtype), dtype, "cpu")
        grads = cast(sample_grads(run.case, dtype), dtype, "cpu")
        with running_on("avx512"):
            expected = results_of(run, inputs, grads)
        for name in others:
            with running_on(name):
                assert_same_bits(results_of(run, inputs, grads), expected, f"on {name}", run)


@pytest.mark.parametrize(
    ("run", "counts"),
    [
        *((run, (2, 2, 3, 7)) for run in SPLIT),  # including more threads than cores
        *((run, (4, 6)) for run in GRID),
        *(pytest.param(run, (2, 2, 3, 7), marks=pytest.mark.full) for run in MORE_SPLIT),
        *(pytest.param(run, (1, 16, 40), marks=pytest.mark.full) for run in MORE_SPLIT + GRID),
    ],
    ids=str,
)
@together
def test_same_bits_for_every_run_and_thread_count(
    run: Run, counts: tuple[int, ...], targets: list[str], threads: None
) -> None:
    inputs = sample_inputs(run.case, run.dtype)
    grads = sample_grads(run.case, run.dtype, grads=run.grads)

    def check(device: str) -> None:
        ours = cast(inputs, run.dtype, device), cast(grads, run.dtype, device)
        torch.set_num_threads(1)
        first = results_of(run, *ours)
        for count in counts:
            torch.set_num_threads(count)
            assert_same_bits(results_of(run, *ours), first, f"with {count} threads", run)

    check_on(with_kernels(targets, run.case, run.dtype), check)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("cell", CELLS)
def test_same_bits_whatever_the_distances_of_rows(
    cell: str, dtype: torch.dtype, device: str, threads: None
) -> None:
    """Batch-first x: tiles span time steps, and rows are longer than AMX copies at once."""
    torch.set_num_threads(1)  # a thread of several has rows at unequal distances in any layout
    case = Case(cell, 3, 40, 600, 34)
    x, *others = cast(sample_inputs(case, dtype), dtype, device)
    grads = cast(sample_grads(case, dtype), dtype, device)
    assert x is not None
    batch_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert batch_first.stride() != x.stride()
    results = []
    for rows in (x, batch_first):
        forward = run_forward(case, [rows, *others], save=True)
        results.append([*forward, *run_backward(case, [rows, *others], grads, forward)])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("cell", CELLS)
def test_saved_tensors(cell: str, device: str) -> None:
    """The saved gates have the values of the formulas and the documented shapes."""
    case = Case(cell, 4, 3, 5, 18)
    inputs = cast(sample_inputs(case, torch.float64), torch.float64, device)
    row = CELLS[cell]
    y, *rest = run_forward(case, inputs, save=True)
    gates = rest[row.states]
    assert gates.shape == (4, 3, row.saved * 18)
    x, h, w_ih, w_hh, b_ih, b_hh = inputs[0], inputs[1], *inputs[1 + row.states :]
    h_prev = torch.cat([h.unsqueeze(0), y[:-1]])
    from_x, from_h = x @ w_ih.T + b_ih, h_prev @ w_hh.T + b_hh
    if cell == "lstm":
        i, f, g, o = (from_x + from_h).chunk(4, -1)
        expected = torch.cat([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], -1)
        c = rest[row.states + 1]
        torch.testing.assert_close(y, o.sigmoid() * c.tanh())
        torch.testing.assert_close(c[-1], rest[1])
    elif cell == "gru":
        (x_r, x_z, x_n), (h_r, h_z, h_n) = from_x.chunk(3, -1), from_h.chunk(3, -1)
        r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
        expected = torch.cat([(x_n + r * h_n).tanh(), r, z, h_n], -1)
    else:  # nothing but y is saved, from which the derivatives are computed
        expected = gates.new_empty(4, 3, 0)
        values = from_x + from_h
        torch.testing.assert_close(y, values.tanh() if cell == "elman_tanh" else values.relu())
    torch.testing.assert_close(gates, expected)


@pytest.mark.parametrize("cell", CELLS)
def test_absent_output_gradients_are_zeros(cell: str, device: str) -> None:
    case = Case(cell, 3, 4, 5, 20)
    exact = sample_inputs(case, torch.float64)
    inputs = cast(exact, torch.float64, device)
    forward = run_forward(case, inputs, save=True)
    full = sample_grads(case, torch.float64)
    for present in range(len(full)):
        grads = [g if k == present else None for k, g in enumerate(full)]
        found = run_backward(case, inputs, cast(grads, torch.float64, device), forward)
        expected = oracle(case, exact, grads)
        for actual, value in zip(found, expected.grads, strict=True):
            assert error(actual, value) < 5 * bound(torch.float64)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_name)
def test_activations_to_a_few_ulp(dtype: torch.dtype, device: str) -> None:
    """tanh and sigmoid over their whole range, from cells with one unit and weight 1."""
    small = torch.logspace(-30, 2, 4001, dtype=torch.float64)
    x = torch.cat([-small, small, torch.zeros(1), torch.linspace(-20, 20, 8001)]).to(dtype)
    one, zero = torch.ones(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    rows = x.numel()

    def step(cell: str, gates: int, states: int) -> tuple[torch.Tensor, ...]:
        arguments = [x.view(1, rows, 1), *[zero.expand(rows, 1)] * states]
        arguments += [one.expand(gates, 1), zero.expand(gates, 1), None, None]
        return run_forward(Case(cell, 1, rows, 1, 1), cast(arguments, dtype, device), save=True)

    found = {"tanh": step("elman_tanh", 1, 1)[0], "sigmoid": step("lstm", 4, 2)[3][..., 0]}
    for name, values in found.items():
        exact = getattr(torch, name)(x.double())
        spacing = torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).tiny
        ulps = (values.cpu().double().view(-1) - exact).abs() / spacing
        assert ulps.max() < 4, name


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", [(4, 3, 5, 17), (4, 70, 170, 170)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_nan_and_inf_flow_through(
    cell: str, shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    """A NaN or infinity in one sequence has the reference's effect, and no effect on others."""
    case = Case(cell, *shape)
    inputs = sample_inputs(case, dtype)
    inputs[0][1, 0, 0], inputs[0][2, 1, 3] = float("nan"), float("inf")
    expected = oracle(case, inputs, sample_grads(case, dtype)).outputs
    found = run_forward(case, cast(inputs, dtype, device), save=False)
    for actual, value in zip(found, expected, strict=False):
        actual = actual.cpu().double()
        assert torch.equal(actual.isnan(), value.isnan())
        clean = ~value.isnan() & ~value.isinf()
        assert torch.equal(actual[~clean & ~value.isnan()], value[~clean & ~value.isnan()])
        assert error(actual[clean], value[clean]) < bound(dtype)


def test_numbers_without_parts(device: str) -> None:
    """Infinities and the largest numbers cannot be written as sums of bfloat16."""
    case = Case("lstm", *LARGE)
    largest = torch.finfo(torch.float32).max
    for where in ("x", "h0", "w_ih", "w_hh"):
        inputs = sample_inputs(case, torch.float32)
        spoiled = inputs[["x", "h0", "c0", "w_ih", "w_hh"].index(where)]
        for value in (float("inf"), -largest):
            spoiled.view(-1)[spoiled.numel() // 2] = value
            expected = oracle(case, inputs, sample_grads(case, torch.float32)).outputs
            found = run_forward(case, cast(inputs, torch.float32, device), save=False)
            for actual, exact in zip(found, expected, strict=False):
                actual = actual.cpu().double()
                assert torch.equal(actual.isnan(), exact.isnan())
                assert error(actual.nan_to_num(), exact.nan_to_num()) < bound(torch.float32)


@on(COMPLETE)
def test_gates_of_numbers_without_parts_computed_again(device: str) -> None:
    """An infinite input gives NaN in its weights' gradients, and does not affect the others."""
    case = Case("lstm", *LARGE)
    inputs = cast(sample_inputs(case, torch.float32), torch.float32, device)
    inputs[0][1, 2, 3] = float("inf")
    grads = cast(sample_grads(case, torch.float32), torch.float32, device)
    saved, computed = (
        run_backward(case, inputs, grads, run_forward(case, inputs, True, recompute=recompute))
        for recompute in (False, True)
    )
    for actual, expected in zip(computed, saved, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    of_w_ih = computed[["x", "h0", "c0", "w_ih"].index("w_ih")]
    assert of_w_ih[:, 3].isnan().any()
    assert not of_w_ih[:, 4].isnan().any()


@on(COMPLETE)
def test_blocks_without_rows(device: str) -> None:
    """Steps beyond the end of every sequence, including a whole block of the backward."""
    torch.manual_seed(0)
    layer = rnnfast.LSTM(64, 64, backend="fused")
    lengths = torch.randint(1, 9, (70,))
    x, grad_y = torch.randn(40, 70, 64), torch.randn(40, 70, 64)

    def gradients(T: int) -> list[torch.Tensor]:
        leaf = x[:T].clone().requires_grad_()
        y, _ = layer(leaf, lengths=lengths)
        found = torch.autograd.grad(y, [leaf, *layer.parameters()], grad_y[:T])
        return [found[0][:8], *found[1:]]

    for actual, expected in zip(gradients(40), gradients(8), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@quick_pairs(device=TARGETS, cell=["RNN", "GRU", "LSTM"], few=[1, 2, 3, 4])
def test_few_rows_after_a_block(cell: str, few: int, device: str) -> None:
    """The backward's last block adds at most a few rows to the gradients of weights."""
    torch.manual_seed(0)
    module = getattr(torch.nn, cell)(20, 21, device=device, dtype=torch.float64)
    twin = getattr(rnnfast, cell)(20, 21, backend="fused", device=device, dtype=torch.float64)
    twin.load_state_dict(module.state_dict())
    x = torch.randn(512 + few, 1, 20, device=device, dtype=torch.float64)
    h = torch.randn(1, 1, 21, device=device, dtype=torch.float64)
    state = (h, h) if cell == "LSTM" else h

    def gradients(layer: torch.nn.Module) -> tuple[torch.Tensor, ...]:
        y, _ = layer(x, state)
        # the loss reads the first steps only, which are in the backward's last block
        return torch.autograd.grad(y[:few].square().sum(), list(layer.parameters()))

    for actual, expected in zip(gradients(twin), gradients(module), strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)

    def sums(layer: torch.nn.Module) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(layer(x, state)[0].square().sum(), list(layer.parameters()))

    for actual, expected in zip(sums(twin), sums(module), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_closed_gates_are_closed(device: str) -> None:
    """sigmoid(-inf) is 0: a forget gate of -inf clears any c."""
    one, closed = torch.ones(1, 1), torch.full((4,), -float("inf"))
    weights = [torch.zeros(4, 1), torch.zeros(4, 1), closed, torch.zeros(4)]
    inputs = [one.view(1, 1, 1), one, one * 1e38, *weights]
    y, _, c = run_forward(Case("lstm", 1, 1, 1, 1), cast(inputs, torch.float32, device), False)[:3]
    assert y.item() == 0
    assert c.item() == 0


FEWER_THREADS = """
import torch
from cases import Case, cast, outputs_of, run_backward, run_forward, sample_grads, sample_inputs

CASES = [Case("lstm", 12, 1, 40, 520), Case("lstm", 50, 48, 16, 64)]
CASES += [Case("gru", 1, 24, 40, 520)]
CASES += [Case("lstm", 30, 48, 16, 64, lengths=lengths) for lengths in ("padded", "packed")]
CASES += [Case("lstm", 12, 3, 40, 520, proj=200)]
for case in CASES:
    inputs = cast(sample_inputs(case, torch.float32), torch.float32, "cpu")
    grads = cast(sample_grads(case, torch.float32), torch.float32, "cpu")
    results = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        forward = run_forward(case, inputs, save=True)
        outputs = outputs_of(case, forward)
        results.append([*outputs, *run_backward(case, inputs, grads, forward)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
print("equal")
"""


@pytest.mark.parametrize("limit", [1, 3, pytest.param(2, marks=pytest.mark.full)])
def test_fewer_threads_than_planned(limit: int) -> None:
    """If OpenMP gives a smaller team than requested, the results are the same."""
    environment = os.environ | {"OMP_THREAD_LIMIT": str(limit), "RNNFAST_ASSUME_CORES": "64"}
    command = [sys.executable, "-c", FEWER_THREADS]
    folder = Path(__file__).parent
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr
