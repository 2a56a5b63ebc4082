"""The reference, the oracle of the other tests, compared with torch.nn in float64."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from cases import (
    LAYOUTS,
    SHAPES,
    TORCH_CLASS,
    Case,
    bound,
    error,
    lengths_of,
    oracle,
    reset_of,
    sample_grads,
    sample_inputs,
)
from covering import covering
from runs import allowed, run_of
from torch.nn.utils.rnn import PackedSequence

from rnnfast import reference
from rnnfast.reference import CELLS

DIMENSIONS = {
    "shape": [shape for shape in SHAPES if 0 not in shape[:3]],
    "cell": tuple(CELLS),
    "dtype": (torch.float64,),
    "bias": (True, False),
    "reverse": (False, True),
    "layout": LAYOUTS,
    "proj": ("", "few", "most"),
    "gates": ("", "saturated"),
}
ROWS = covering(DIMENSIONS, [*combinations(DIMENSIONS, 2)], allowed)
TORCH_CASES = [case for case in (run_of(row).case for row in ROWS) if case.proj < case.H]


@pytest.mark.parametrize("case", TORCH_CASES, ids=str)
def test_reference_is_torch_nn(case: Case) -> None:
    """Values and every gradient of the reference equal torch.nn's, in float64."""
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
    """Returns torch.nn's module in float64 with the weights of ``inputs``."""
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
    """The reference equals torch.nn on the pieces between resets, up to the lengths."""
    case = Case(cell, 12, 4, 3, 5, reverse=reverse, lengths=lengths, resets=True)
    inputs, states = sample_inputs(case, torch.float64), CELLS[cell].states
    expected = oracle(case, inputs, sample_grads(case, torch.float64)).outputs
    module, resets = torch_module(case, inputs), reset_of(case)
    for b, length in enumerate(lengths_of(case).tolist() if lengths else [case.T] * case.B):
        # no state passes between pieces; a reset at step 0 discards the initial state
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
    """The c of a step is the final c of the sequence up to that step."""
    case = Case("lstm", 6, 2, 3, 4, cells=True)
    inputs = sample_inputs(case, torch.float64)
    cells = oracle(case, inputs, sample_grads(case, torch.float64)).outputs[-1]
    module, hx = torch_module(case, inputs), tuple(t.unsqueeze(0) for t in inputs[1:3])
    for t in range(case.T):
        assert error(module(inputs[0][: t + 1], hx)[1][1][0], cells[t]) < bound(torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_of_h(dtype: torch.dtype) -> None:
    """h is rounded to half types as by a conversion, and its gradient not at all."""
    special = [0.0, 1e-9, 1e-40, 1.001, 65520.0, 3.4e38, float("inf"), float("nan")]
    h = torch.cat([torch.randn(100), torch.tensor(special)])
    h = torch.cat([h, -h]).requires_grad_()
    rounded = reference._rounded(h, dtype)
    torch.testing.assert_close(rounded, h.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
    factors = torch.randn_like(h)
    (found,) = torch.autograd.grad(rounded, h, factors)
    assert torch.equal(found, factors)


def test_gradients_through_many_rounded_steps() -> None:
    """The gradient of the initial state is what the chain rule gives for the rounded values.

    A few active units of relu decide it. Rounded at every step it would be off by several eps.
    """
    case = Case("elman_relu", 51, 6, 104, 6, bias=False)
    inputs = sample_inputs(case, torch.bfloat16)
    grads = sample_grads(case, torch.bfloat16, grads="finals")
    results = oracle(case, inputs, grads, torch.bfloat16)
    grad, w_hh = grads[1], inputs[3]
    for step in results.outputs[0].flip(0):
        grad = (grad * (step > 0)) @ w_hh
    assert grad.abs().max() > 0
    assert error(results.grads[1], grad) <= torch.finfo(torch.bfloat16).eps / 2


def test_the_gradient_of_a_half_projection_is_summed_in_float32() -> None:
    """Equal steps add the same gradient many times. Sums in float16 would be off by 1 %."""
    case = Case("lstm", 113, 2, 8, 81, layout="same_step", proj=20)
    inputs = sample_inputs(case, torch.float16)
    grads = sample_grads(case, torch.float16, grads="sum")
    half = oracle(case, inputs, grads, torch.float16).grads[-1]
    assert error(half, oracle(case, inputs, grads).grads[-1]) <= bound(torch.float16)
