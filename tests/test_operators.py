"""The operators in torch: derivatives, schemas, gradient masks, and errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import (
    Case,
    cast,
    is_number,
    lengths_of,
    reset_of,
    run_backward,
    run_forward,
    sample_grads,
    sample_inputs,
)
from runs import GRADCHECK_CASES
from targets import COMPLETE, PARTIAL, check_on, on, together, with_kernels
from torch import Tensor

from rnnfast import autograd, backend
from rnnfast.reference import CELLS


@pytest.mark.parametrize("cell", CELLS)
def test_each_gradient_alone(cell: str, device: str) -> None:
    """A mask saves work and does not change results."""
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


@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=str)
@together
def test_gradcheck(case: Case, targets: list[str]) -> None:
    """First and second derivatives of the autograd Functions over the fused operators."""
    row = CELLS[case.cell]

    def check(device: str) -> None:
        inputs = cast(sample_inputs(case, torch.float64), torch.float64, device)
        given = [t.requires_grad_(is_number(t)) for t in inputs if t is not None]
        absent = [None] * (len(inputs) - len(given))

        def layer(*tensors: Tensor) -> tuple[Tensor, ...]:
            x, *rest = (*tensors, *absent)
            states = tuple(rest[: row.states])
            weights = rest[row.states :]
            extras = lengths_of(case), reset_of(case, device), *weights[4:]
            y, finals, cells = autograd.layer(
                row, x, states, *weights[:4], case.reverse, *extras, save_cells=case.cells
            )
            return (y, *finals, cells) if case.cells else (y, *finals)

        if case.cell == "elman_relu":  # finite differences fail at relu's kink
            y = layer(*given)[0]
            assert y[y > 0].min() > 1e-3
        assert torch.autograd.gradcheck(layer, given)
        assert torch.autograd.gradgradcheck(layer, given)

    # autograd's path through the operators is the same for every instruction set
    chosen = [name for name in targets if name not in COMPLETE[:-1]]
    check_on(with_kernels(chosen, case), check)


@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell: str, device: str) -> None:
    """torch.library checks schemas and fake kernels."""
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


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_of_tokens(cell: str, transposed: bool) -> None:
    """The gradient of the table lies as the table does."""
    case = Case(cell, 3, 2, 6, 5, tokens=True)
    inputs = cast(sample_inputs(case, torch.float32), torch.float32, "cpu")
    grads = cast(sample_grads(case, torch.float32), torch.float32, "cpu")
    place = 1 + CELLS[cell].states
    if transposed:
        inputs[place] = inputs[place].t().contiguous().t()
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    op = getattr(torch.ops.rnnfast, cell).default
    torch.library.opcheck(op, (*inputs, False, True), test_utils=tests)
    y, *rest = op(*inputs, False, True)
    backward = getattr(torch.ops.rnnfast, f"{cell}_backward").default
    saved = rest[CELLS[cell].states :]
    arguments = (*grads, *inputs, y, *saved, False, [True] * len(inputs))
    torch.library.opcheck(backward, arguments, test_utils=tests)
    assert backward(*arguments)[place].stride() == inputs[place].stride()


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


Inputs = list[Tensor | None]

BAD: dict[str, tuple[Callable[[Inputs], Inputs], str]] = {
    "x rank": (lambda t: [t[0][0], *t[1:]], r"expected x of shape \(T, B, I\), .* got \[2, 4\]"),
    "h0 rank": (lambda t: [t[0], t[1][0], *t[2:]], r"expected h0 of shape \(B, H\), got \[5\]"),
    "h0 batch": (
        lambda t: [t[0], t[1][:-1], *t[2:]],
        r"expected h0 of shape \[2, 5\], got \[1, 5\]",
    ),
    "c0 batch": (
        lambda t: [*t[:2], t[2][:-1], *t[3:]],
        r"expected c0 of shape \[2, 5\], got \[1, 5\]",
    ),
    "w_ih size": (
        lambda t: [*t[:-4], t[-4][:, :-1], *t[-3:]],
        r"expected w_ih of shape \[20, 4\], got \[20, 3\]",
    ),
    "w_hh size": (
        lambda t: [*t[:-3], t[-3][:-1], *t[-2:]],
        r"expected w_hh of shape \[20, 5\], got \[19, 5\]",
    ),
    "w_hr rank": (lambda t: [*t, t[1][0]], r"expected w_hr of shape \(P, H\), got \[5\]"),
    "one bias": (lambda t: [*t[:-1], None], "expected both b_ih and b_hh, or neither"),
    "bias size": (
        lambda t: [*t[:-1], t[-1][:-1]],
        r"expected b_hh of shape \[20\], got \[19\]",
    ),
    "mixed dtypes": (
        lambda t: [t[0].double(), *t[1:]],
        "expected h0 to have the dtype Double, got Float",
    ),
    "complex numbers": (
        lambda t: [x.cfloat() for x in t],
        "expected float64, float32, bfloat16 or float16, got ComplexFloat",
    ),
    "integers": (
        lambda t: [t[0].long(), *t[1:]],
        r"expected tokens of shape \(T, B, 1\) .* got \[3, 2, 4\]",
    ),
}


@pytest.mark.parametrize(("spoil", "words"), BAD.values(), ids=BAD.keys())
def test_operators_refuse_bad_arguments(spoil: Callable[[Inputs], Inputs], words: str) -> None:
    case = Case("lstm", 3, 2, 4, 5)
    inputs = spoil(cast(sample_inputs(case, torch.float32), torch.float32, "cpu"))
    weights, w_hr = (inputs[:7], inputs[7]) if len(inputs) > 7 else (inputs, None)
    with pytest.raises(RuntimeError, match=f"^rnnfast(::lstm)?: {words}"):
        torch.ops.rnnfast.lstm(*weights, False, False, w_hr=w_hr)


BAD_EXTRAS = {
    "lengths size": ({"lengths": torch.tensor([3])}, r"expected lengths of shape \[2\], int64"),
    "lengths dtype": (
        {"lengths": torch.tensor([3, 1]).int()},
        "expected lengths .* of Int",
    ),
    "lengths too long": ({"lengths": torch.tensor([3, 4])}, "expected lengths from 0 to T = 3"),
    "lengths below 0": ({"lengths": torch.tensor([3, -1])}, "expected lengths from 0 to T = 3"),
    "reset size": ({"reset": torch.zeros(2, 3).bool()}, r"expected reset of shape \[3, 2\]"),
    "reset dtype": ({"reset": torch.zeros(3, 2)}, "expected reset to have the dtype Bool"),
}


@pytest.mark.parametrize(("extras", "words"), BAD_EXTRAS.values(), ids=BAD_EXTRAS.keys())
def test_operators_refuse_bad_extras(extras: dict[str, Tensor], words: str) -> None:
    inputs = cast(sample_inputs(Case("gru", 3, 2, 4, 5), torch.float32), torch.float32, "cpu")
    with pytest.raises(RuntimeError, match=f"rnnfast::gru: {words}"):
        torch.ops.rnnfast.gru(*inputs, False, False, **extras)


@pytest.mark.parametrize(
    ("lengths", "words"),
    [([3, 2], "sum to 6"), ([2, 4], "increase"), ([6, 0], "at least 1"), ([3, 4], "sum to 6")],
    ids=str,
)
def test_operators_refuse_bad_packing(lengths: list[int], words: str) -> None:
    inputs = cast(sample_inputs(Case("gru", 3, 2, 4, 5), torch.float32), torch.float32, "cpu")
    packed, lengths = [inputs[0].flatten(0, 1), *inputs[1:]], torch.tensor(lengths)
    with pytest.raises(RuntimeError, match=f"rnnfast::gru: expected lengths of packed x.* {words}"):
        torch.ops.rnnfast.gru(*packed, False, False, lengths=lengths)
    reset = torch.zeros(3, 2, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="expected no reset with packed x"):
        torch.ops.rnnfast.gru(*packed, False, False, lengths=torch.tensor([3, 3]), reset=reset)


@pytest.mark.parametrize("token", [-1, 4])
def test_operators_refuse_tokens_that_are_not_in_the_table(token: int) -> None:
    case = Case("gru", 3, 2, 4, 5, tokens=True)
    inputs = cast(sample_inputs(case, torch.float32), torch.float32, "cpu")
    inputs[0][1, 1] = token
    with pytest.raises(IndexError, match=f"expected tokens from 0 to 3, got {token}"):
        run_forward(case, inputs, save=False)


BAD_BACKWARD = {
    "grad_y size": (
        lambda a: {**a, "grads": [a["grads"][0][:-1], *a["grads"][1:]]},
        r"gru: expected grad_y of shape \[3, 2, 5\], got \[2, 2, 5\]",
    ),
    "grad_h_n dtype": (
        lambda a: {**a, "grads": [a["grads"][0], a["grads"][1].double()]},
        "gru: expected grad_h_n to have the dtype Float, got Double",
    ),
    "saved gates": (
        lambda a: {**a, "forward": [*a["forward"][:-1], a["forward"][-1][:-1]]},
        r"gru: expected gates of shape \[3, 2, 20\], got \[2, 2, 20\]",
    ),
    "y size": (
        lambda a: {**a, "forward": [a["forward"][0][:, :1], *a["forward"][1:]]},
        r"gru: expected y of shape \[3, 2, 5\], got \[3, 1, 5\]",
    ),
    "mask length": (
        lambda a: {**a, "mask": [True] * 3},
        "gru_backward: expected a mask of 6 entries, got 3",
    ),
}


@pytest.mark.parametrize(("spoil", "words"), BAD_BACKWARD.values(), ids=BAD_BACKWARD.keys())
def test_backward_operators_refuse_bad_arguments(spoil: Callable[[dict], dict], words: str) -> None:
    case = Case("gru", 3, 2, 4, 5)
    inputs = cast(sample_inputs(case, torch.float32), torch.float32, "cpu")
    arguments = {
        "grads": cast(sample_grads(case, torch.float32), torch.float32, "cpu"),
        "forward": run_forward(case, inputs, save=True),
        "mask": [True] * len(inputs),
    }
    bad = spoil(arguments)
    with pytest.raises(RuntimeError, match=f"rnnfast::{words}"):
        run_backward(case, inputs, bad["grads"], bad["forward"], bad["mask"])


def test_mixed_devices_are_refused(device: str) -> None:
    inputs = cast(sample_inputs(Case("lstm", 3, 2, 4, 5), torch.float32), torch.float32, device)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        run_forward(Case("lstm", 3, 2, 4, 5), [inputs[0].to("meta"), *inputs[1:]], save=False)


def test_cpu_capability_by_name() -> None:
    extension = backend.EXTENSION
    with pytest.raises(ValueError, match="not available here"):
        extension.set_cpu_capability("mmx")
    assert extension.get_cpu_capability() in extension.cpu_capabilities()
