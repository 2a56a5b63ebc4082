"""The operators against the float64 oracle, on every target of conftest.py."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    GRADCHECK_CASES,
    LARGE,
    SPLIT_SHAPES,
    TORCH_CLASS,
    Case,
    bound,
    cast,
    error,
    is_number,
    lengths_of,
    oracle,
    outputs_of,
    reset_of,
    run_backward,
    run_forward,
    sample_grads,
    sample_inputs,
    sample_with_oracle,
)
from targets import COMPLETE, PARTIAL, on, on_every_target
from torch.nn.utils.rnn import PackedSequence

import rnnfast
from rnnfast import autograd, backend, reference
from rnnfast.reference import CELLS


def dtype_name(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


TORCH_CASES = [
    case
    for case in CASES
    if case.T * case.B * case.I and not (case.lengths or case.resets or case.cells or case.tokens)
]


@pytest.mark.parametrize("case", TORCH_CASES, ids=str)
def test_reference_is_torch_nn(case: Case) -> None:
    """The oracle itself, against torch.nn in float64: values and every gradient."""
    inputs, grads = sample_inputs(case, torch.float64), sample_grads(case, torch.float64)
    states = CELLS[case.cell].states
    make, options = TORCH_CLASS[case.cell]
    options = options | ({"proj_size": case.proj} if case.proj else {})
    module = make(case.I, case.H, bias=case.bias, dtype=torch.float64, **options)
    weights = [t for t in inputs[1 + states :] if t is not None]
    for parameter, value in zip(module.parameters(), weights, strict=True):
        parameter.data.copy_(value)
    x = inputs[0].flip(0) if case.reverse else inputs[0]
    leaves = [t.detach().clone().requires_grad_() for t in (x, *inputs[1 : 1 + states])]
    hx = tuple(t.unsqueeze(0) for t in leaves[1:])
    y, finals = module(leaves[0], hx if states > 1 else hx[0])
    y = y.flip(0) if case.reverse else y
    outputs = [y, *(t.squeeze(0) for t in (finals if states > 1 else (finals,)))]
    found = list(torch.autograd.grad(outputs, [*leaves, *module.parameters()], grads))
    found[0] = found[0].flip(0) if case.reverse else found[0]

    expected = oracle(case, inputs, grads)
    for actual, value in zip(outputs, expected.outputs, strict=True):
        assert error(actual, value) < bound(torch.float64)
    wanted = [t for t in expected.grads if t is not None]
    for actual, value in zip(found, wanted, strict=True):
        assert error(actual, value) < 5 * bound(torch.float64)


def torch_module(case: Case, inputs: list[torch.Tensor | None]) -> torch.nn.Module:
    """torch.nn's module in float64 with the weights of ``inputs``."""
    make, options = TORCH_CLASS[case.cell]
    module = make(case.I, case.H, dtype=torch.float64, **options)
    for parameter, value in zip(
        module.parameters(), inputs[1 + CELLS[case.cell].states :], strict=True
    ):
        parameter.data.copy_(value)
    return module


@pytest.mark.parametrize("cell", CELLS)
def test_packed_reference_is_torch_nn(cell: str) -> None:
    case = Case(cell, 9, 5, 3, 4, lengths="packed")
    inputs, states = sample_inputs(case, torch.float64), CELLS[cell].states
    lengths = lengths_of(case)
    batch_sizes = (torch.arange(case.T).unsqueeze(1) < lengths).sum(1)
    hx = tuple(t.unsqueeze(0) for t in inputs[1 : 1 + states])
    y, finals = torch_module(case, inputs)(
        PackedSequence(inputs[0], batch_sizes), hx if states > 1 else hx[0]
    )
    expected = oracle(case, inputs, sample_grads(case, torch.float64)).outputs
    assert error(y.data, expected[0]) < bound(torch.float64)
    for actual, value in zip(finals if states > 1 else (finals,), expected[1:], strict=True):
        assert error(actual.squeeze(0), value) < bound(torch.float64)


@pytest.mark.parametrize("lengths", ["", "padded"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_resets_begin_new_sequences(cell: str, reverse: bool, lengths: str) -> None:
    """The reference against torch.nn on the pieces between resets, and only up to the lengths."""
    case = Case(cell, 12, 4, 3, 5, reverse=reverse, lengths=lengths, resets=True)
    inputs, states = sample_inputs(case, torch.float64), CELLS[cell].states
    expected = oracle(case, inputs, sample_grads(case, torch.float64)).outputs
    module, resets = torch_module(case, inputs), reset_of(case)
    for b, length in enumerate(lengths_of(case).tolist() if lengths else [case.T] * case.B):
        # between the borders of pieces no state passes; one at 0 cuts the initial state off
        borders = [t for t in range(length) if resets[t, b]]
        edges = sorted({0, *borders, length})
        pieces = [inputs[0][begin:end, b] for begin, end in pairwise(edges)]
        state = tuple(t[b : b + 1] for t in inputs[1 : 1 + states])
        first_is_new = 0 in borders and not reverse
        outputs = []
        for i, piece in enumerate(reversed(pieces) if reverse else pieces):
            if i > 0 or first_is_new:
                state = tuple(torch.zeros_like(t) for t in state)
            piece = piece.flip(0) if reverse else piece
            y, finals = module(piece, state if states > 1 else state[0])
            state = finals if states > 1 else (finals,)
            outputs.insert(0, y.flip(0)) if reverse else outputs.append(y)
        y = torch.cat([*outputs, torch.zeros(case.T - length, case.H)])
        assert error(y, expected[0][:, b]) < bound(torch.float64)
        for final, value in zip(state, expected[1:], strict=True):
            assert error(final[0], value[b]) < bound(torch.float64)


def test_cells_are_torch_nns() -> None:
    """The c of a step is the final c of the sequence up to it."""
    case = Case("lstm", 6, 2, 3, 4, cells=True)
    inputs = sample_inputs(case, torch.float64)
    cells = oracle(case, inputs, sample_grads(case, torch.float64)).outputs[-1]
    module, hx = torch_module(case, inputs), tuple(t.unsqueeze(0) for t in inputs[1:3])
    for t in range(case.T):
        assert error(module(inputs[0][: t + 1], hx)[1][1][0], cells[t]) < bound(torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@on_every_target(CASES)
def test_values_and_gradients(
    case: Case, dtype: torch.dtype, device: str, poisoned_memory: None
) -> None:
    exact_inputs, exact_grads, expected = sample_with_oracle(case, dtype)
    inputs, grads = cast(exact_inputs, dtype, device), cast(exact_grads, dtype, device)
    forward = run_forward(case, inputs, save=True)
    states = CELLS[case.cell].states
    wide = reference.compute_dtype(dtype)
    for i, (actual, value) in enumerate(
        zip(outputs_of(case, forward), expected.outputs, strict=True)
    ):
        assert actual.dtype == (dtype if i <= states else wide)
        assert error(actual, value) < bound(dtype)
    for saved, plain in zip(
        forward, run_forward(case, inputs, save=False)[: 1 + states], strict=False
    ):
        assert torch.equal(saved, plain)
    # sums over the batch and time of the gradients carry the rounding of all gates
    found = run_backward(case, inputs, grads, forward)
    for actual, value in zip(found, expected.grads, strict=True):
        if value is None:
            assert actual.numel() == 0
        else:
            assert actual.dtype == dtype
            assert error(actual, value) < 5 * bound(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("cell", CELLS)
def test_same_bits_whatever_the_distances_of_rows(
    cell: str, dtype: torch.dtype, device: str, threads: None
) -> None:
    """Of x, batch first: tiles cross borders of steps; rows are longer than is copied at once."""
    torch.set_num_threads(1)  # else rows of a thread lie apart at the borders in any case
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
    """The gates that are kept are those of the formulas, in the documented shapes."""
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
    else:
        expected = gates
    torch.testing.assert_close(gates, expected)


@pytest.mark.parametrize("cell", CELLS)
def test_each_gradient_alone(cell: str, device: str) -> None:
    """A mask leaves out work, never changes a result."""
    case = Case(cell, 6, 5, 7, 19)
    inputs = cast(sample_inputs(case, torch.float32), torch.float32, device)
    grads = cast(sample_grads(case, torch.float32), torch.float32, device)
    forward = run_forward(case, inputs, save=True)
    everything = run_backward(case, inputs, grads, forward)
    for i in range(len(inputs)):
        mask = [k == i for k in range(len(inputs))]
        alone = run_backward(case, inputs, grads, forward, mask)
        for k, grad in enumerate(alone):
            if k == i:
                assert torch.equal(grad, everything[k])
            else:
                assert grad.numel() == 0


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


@pytest.mark.parametrize("cell", CELLS)
def test_expanded_output_gradient(cell: str, device: str) -> None:
    """The gradient of a sum is an expanded scalar: no stride may be taken for granted."""
    case = Case(cell, 3, 4, 5, 20)
    exact = sample_inputs(case, torch.float64)
    grads = [torch.ones(1, 1, 1, dtype=torch.float64).expand(3, 4, 20)]
    grads += [None] * CELLS[cell].states
    inputs = cast(exact, torch.float64, device)
    forward = run_forward(case, inputs, save=True)
    found = run_backward(case, inputs, [g if g is None else g.to(device) for g in grads], forward)
    for actual, value in zip(found, oracle(case, exact, grads).grads, strict=True):
        assert error(actual, value) < 5 * bound(torch.float64)


@on_every_target(GRADCHECK_CASES)
def test_gradcheck(case: Case, device: str) -> None:
    """First and second derivatives of the autograd Functions over the fused operators."""
    row = CELLS[case.cell]
    inputs = cast(sample_inputs(case, torch.float64), torch.float64, device)
    given = [t.requires_grad_(is_number(t)) for t in inputs if t is not None]
    absent = [None] * (len(inputs) - len(given))

    def layer(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, *rest = (*tensors, *absent)
        states = tuple(rest[: row.states])
        weights = rest[row.states :]
        extras = lengths_of(case), reset_of(case, device), *weights[4:]
        y, finals, cells = autograd.layer(
            row, x, states, *weights[:4], case.reverse, *extras, save_cells=case.cells
        )
        return (y, *finals, cells) if case.cells else (y, *finals)

    if case.cell == "elman_relu":  # its kink is no point for finite differences
        y = layer(*given)[0]
        assert y[y > 0].min() > 1e-3
    assert torch.autograd.gradcheck(layer, given)
    assert torch.autograd.gradgradcheck(layer, given)


@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell: str, device: str) -> None:
    """Schemas and fake kernels, as torch.library checks them."""
    case = Case(cell, 3, 2, 4, 5)
    inputs = cast(sample_inputs(case, torch.float32), torch.float32, device)
    grads = cast(sample_grads(case, torch.float32), torch.float32, device)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    op = getattr(torch.ops.rnnfast, cell).default
    for save in (False, True):
        torch.library.opcheck(op, (*inputs, False, save), test_utils=tests)
    y, *rest = op(*inputs, False, True)
    saved = rest[CELLS[cell].states :]
    backward = getattr(torch.ops.rnnfast, f"{cell}_backward").default
    for mask in ([True] * len(inputs), [k % 2 == 0 for k in range(len(inputs))]):
        torch.library.opcheck(backward, (*grads, *inputs, y, *saved, False, mask), test_utils=tests)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_name)
def test_activations_to_a_few_ulp(dtype: torch.dtype, device: str) -> None:
    """tanh and sigmoid over their whole range, read off cells with one unit and weight 1."""
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
    """A NaN or an infinity in one sequence ends as in the reference, and stays in that sequence."""
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


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", CASES, ids=str)
@on(COMPLETE)
def test_recomputed_gates(
    case: Case, dtype: torch.dtype, device: str, poisoned_memory: None
) -> None:
    """Gates that the backward computes again are the forward's, to the last bit."""
    inputs = cast(sample_inputs(case, dtype), dtype, device)
    grads = cast(sample_grads(case, dtype), dtype, device)
    forward = run_forward(case, inputs, True, recompute=True)
    assert forward[1 + CELLS[case.cell].states].numel() == 0
    expected = run_backward(case, inputs, grads, run_forward(case, inputs, True))
    for actual, value in zip(run_backward(case, inputs, grads, forward), expected, strict=True):
        assert torch.equal(actual, value)


NOT_ON_EVERY_TARGET = [
    Case("lstm", 3, 2, 5, 7, lengths="padded"),
    Case("lstm", 3, 2, 5, 7, lengths="packed"),
    Case("lstm", 3, 2, 5, 7, resets=True),
    Case("lstm", 3, 2, 5, 7, proj=3),
    Case("lstm", 3, 2, 5, 7, tokens=True),
]


@pytest.mark.parametrize("case", NOT_ON_EVERY_TARGET, ids=str)
@on(PARTIAL)
def test_what_has_no_kernels_is_refused(case: Case, device: str) -> None:
    inputs = cast(sample_inputs(case, torch.float32), torch.float32, device)
    with pytest.raises(RuntimeError, match="lengths, reset, w_hr and tokens have no kernels on"):
        run_forward(case, inputs, save=True)


@on(PARTIAL)
def test_recomputing_without_kernels_is_refused(device: str) -> None:
    case = Case("lstm", 3, 2, 5, 7)
    inputs = cast(sample_inputs(case, torch.float32), torch.float32, device)
    grads = cast(sample_grads(case, torch.float32), torch.float32, device)
    with pytest.raises(RuntimeError, match="recompute=True has no kernels on this device"):
        run_forward(case, inputs, True, recompute=True)
    with pytest.raises(RuntimeError, match="that the forward save"):
        run_backward(case, inputs, grads, run_forward(case, inputs, False))


def test_numbers_without_parts(device: str) -> None:
    """Infinite numbers and those close to the largest are no sums of bfloat16."""
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
    """An infinite input saturates gates; its weights' gradients are NaN, all others are as ever."""
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
    """Steps beyond the end of every sequence, a whole block of them in the backward and more."""
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


@pytest.mark.parametrize("few", [1, 2, 3, 4])
@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_few_rows_after_a_block(cell: str, few: int, device: str) -> None:
    """Gradients of weights to which the backward's last block adds no more than a few rows."""
    torch.manual_seed(0)
    module = getattr(torch.nn, cell)(20, 21, device=device, dtype=torch.float64)
    twin = getattr(rnnfast, cell)(20, 21, backend="fused", device=device, dtype=torch.float64)
    twin.load_state_dict(module.state_dict())
    x = torch.randn(512 + few, 1, 20, device=device, dtype=torch.float64)
    h = torch.randn(1, 1, 21, device=device, dtype=torch.float64)
    state = (h, h) if cell == "LSTM" else h

    def gradients(layer: torch.nn.Module) -> tuple[torch.Tensor, ...]:
        y, _ = layer(x, state)
        # of the first steps alone, which the last block has
        return torch.autograd.grad(y[:few].square().sum(), list(layer.parameters()))

    for actual, expected in zip(gradients(twin), gradients(module), strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)

    def sums(layer: torch.nn.Module) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(layer(x, state)[0].square().sum(), list(layer.parameters()))

    for actual, expected in zip(sums(twin), sums(module), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


SPLIT_CASES = [
    *(
        Case(cell, *shape, lengths=lengths)
        for cell in CELLS
        for shape in SPLIT_SHAPES
        for lengths in ("", "padded", "packed")
    ),
    *(Case("lstm", *shape, proj=shape[-1] * 3 // 4) for shape in SPLIT_SHAPES),
    *(Case(cell, *shape, tokens=True) for cell in CELLS for shape in SPLIT_SHAPES),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@on_every_target(SPLIT_CASES)
def test_same_bits_for_every_run_and_thread_count(
    case: Case, dtype: torch.dtype, device: str, threads: None
) -> None:
    inputs = cast(sample_inputs(case, dtype), dtype, device)
    grads = cast(sample_grads(case, dtype), dtype, device)

    def run() -> list[torch.Tensor]:
        forward = run_forward(case, inputs, save=True)
        # nothing is said of what is saved for steps beyond the end
        outputs = forward if case.is_plain else outputs_of(case, forward)
        return [*outputs, *run_backward(case, inputs, grads, forward)]

    first = run()
    for count in (1, 1, 2, 3, 7, 40):  # more than there are cores, too
        torch.set_num_threads(count)
        for actual, expected in zip(run(), first, strict=True):
            assert torch.equal(actual, expected)


BAD = {
    "x rank": lambda t: [t[0][0], *t[1:]],
    "h0 rank": lambda t: [t[0], t[1][0], *t[2:]],
    "h0 batch": lambda t: [t[0], t[1][:-1], *t[2:]],
    "w_ih size": lambda t: [*t[:-4], t[-4][:, :-1], *t[-3:]],
    "w_hh size": lambda t: [*t[:-3], t[-3][:-1], *t[-2:]],
    "one bias": lambda t: [*t[:-1], None],
    "bias size": lambda t: [*t[:-1], t[-1][:-1]],
    "mixed dtypes": lambda t: [t[0].double(), *t[1:]],
    "integers": lambda t: [None if x is None else x.long() for x in t],
}


@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("cell", CELLS)
def test_operators_refuse_bad_arguments(cell: str, spoil: object, device: str) -> None:
    case = Case(cell, 3, 2, 4, 5)
    inputs = cast(sample_inputs(case, torch.float32), torch.float32, device)
    with pytest.raises(RuntimeError, match="rnnfast"):
        run_forward(case, spoil(inputs), save=False)


BAD_BACKWARD = {
    "grad_y size": lambda a: {**a, "grads": [a["grads"][0][:-1], *a["grads"][1:]]},
    "grad_h_n dtype": lambda a: {**a, "grads": [a["grads"][0], a["grads"][1].double()]},
    "saved gates": lambda a: {**a, "forward": [*a["forward"][:-1], a["forward"][-1][:-1]]},
    "y size": lambda a: {**a, "forward": [a["forward"][0][:, :1], *a["forward"][1:]]},
    "mask length": lambda a: {**a, "mask": [True] * 3},
}


@pytest.mark.parametrize("spoil", BAD_BACKWARD.values(), ids=BAD_BACKWARD.keys())
def test_backward_operators_refuse_bad_arguments(spoil: object, device: str) -> None:
    case = Case("gru", 3, 2, 4, 5)
    inputs = cast(sample_inputs(case, torch.float32), torch.float32, device)
    arguments = {
        "grads": cast(sample_grads(case, torch.float32), torch.float32, device),
        "forward": run_forward(case, inputs, save=True),
        "mask": [True] * len(inputs),
    }
    bad = spoil(arguments)
    with pytest.raises(RuntimeError, match="rnnfast"):
        run_backward(case, inputs, bad["grads"], bad["forward"], bad["mask"])


def test_mixed_devices_are_refused(device: str) -> None:
    inputs = cast(sample_inputs(Case("lstm", 3, 2, 4, 5), torch.float32), torch.float32, device)
    with pytest.raises((RuntimeError, NotImplementedError)):
        run_forward(Case("lstm", 3, 2, 4, 5), [inputs[0].to("meta"), *inputs[1:]], save=False)


def test_closed_gates_are_closed(device: str) -> None:
    """sigmoid(-inf) is 0: a forget gate at -inf forgets any c."""
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


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_fewer_threads_than_planned(limit: int) -> None:
    """OpenMP may give a smaller team than asked for; the numbers stay the same."""
    environment = os.environ | {"OMP_THREAD_LIMIT": str(limit)}
    command = [sys.executable, "-c", FEWER_THREADS]
    folder = Path(__file__).parent
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr


def test_cpu_capability_by_name() -> None:
    extension = backend.EXTENSION
    with pytest.raises(ValueError, match="not available here"):
        extension.set_cpu_capability("mmx")
    assert extension.get_cpu_capability() in extension.cpu_capabilities()
