"""The operators in torch: derivatives, schemas, gradient masks, and errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import (
    Case,
    cast,
    is_number,
    lengths_of,
    outputs_of,
    reset_of,
    run_backward,
    run_forward,
    sample_grads,
    sample_inputs,
)
from runs import GRADCHECK_CASES, MORE_GRADCHECK_CASES
from targets import COMPLETE, PARTIAL, check_on, on, together, with_kernels
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import rnnfast
from rnnfast import autograd, backend, reference
from rnnfast.reference import CELLS, LayerInputs

Inputs = list[Tensor | None]
full = pytest.mark.full


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


@pytest.mark.parametrize(
    "case",
    [*GRADCHECK_CASES, *(pytest.param(case, marks=full) for case in MORE_GRADCHECK_CASES)],
    ids=str,
)
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
            arguments = LayerInputs(x, states, *weights[:4], case.reverse, *extras)
            y, finals, cells = autograd.layer(row, arguments, save_cells=case.cells)
            return (y, *finals, cells) if case.cells else (y, *finals)

        if case.cell == "elman_relu":  # finite differences fail at relu's kink
            y = layer(*given)[0]
            assert y[y > 0].min() > 1e-3
        assert torch.autograd.gradcheck(layer, given)
        assert torch.autograd.gradgradcheck(layer, given)

    # autograd's path through the operators is the same for every instruction set
    chosen = [name for name in targets if name not in COMPLETE[:-1]]
    check_on(with_kernels(chosen, case), check)


# The others differ in their formulas alone, and `test_opcheck_of_tokens` calls all.
@pytest.mark.parametrize(
    "cell", [pytest.param(c, marks=[full] * (c in ("elman_tanh", "gru"))) for c in CELLS]
)
def test_opcheck(cell: str) -> None:
    """Schemas, fake kernels and autograd, as torch.library checks them."""
    case = Case(cell, 3, 2, 4, 5)
    inputs = cast(sample_inputs(case, torch.float32), torch.float32, "cpu")
    grads = cast(sample_grads(case, torch.float32), torch.float32, "cpu")
    op = getattr(torch.ops.rnnfast, cell).default
    backward = getattr(torch.ops.rnnfast, f"{cell}_backward").default
    y, *rest = op(*inputs, False, True)
    saved = rest[CELLS[cell].states :]
    for requires_grad in (False, True):
        given = [t.clone().requires_grad_(requires_grad) for t in inputs]
        torch.library.opcheck(op, (*given, False, not requires_grad))
        mask = [requires_grad or k % 2 == 0 for k in range(len(inputs))]
        torch.library.opcheck(backward, (*grads, *given, y, *saved, False, mask))


ALL_KINDS = [
    *(Case(cell, 3, 2, 4, 5) for cell in CELLS),
    Case("gru", 3, 2, 4, 5, bias=False, reverse=True, lengths="padded"),
    Case("gru", 4, 3, 4, 5, lengths="packed"),
    Case("elman_tanh", 3, 2, 4, 5, tokens=True),
    Case("lstm", 4, 3, 4, 5, resets=True, lengths="padded", cells=True),
    Case("lstm", 3, 2, 4, 5, proj=3, bias=False, cells=True),
]
"""What the tests below call."""
every_kind = pytest.mark.parametrize("case", ALL_KINDS, ids=str)


def differentiable(inputs: Inputs) -> list[Tensor]:
    return [t for t in inputs if is_number(t)]


def with_others(inputs: Inputs, others: Sequence[Tensor]) -> Inputs:
    """``inputs`` with others in place of `differentiable`."""
    rest = iter(others)
    return [next(rest) if is_number(t) else t for t in inputs]


def sample(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> Inputs:
    return cast(sample_inputs(case, dtype, seed), dtype, "cpu")


def function_of(case: Case, inputs: Inputs) -> Callable[..., tuple[Tensor, ...]]:
    """The operator as a function of `differentiable`, without what is saved for a backward."""
    operator = operator_of(case, save=case.cells)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(outputs_of(case, operator(*with_others(inputs, tensors))))

    return call


def operator_of(case: Case, save: bool) -> Callable[..., tuple[Tensor, ...]]:
    """The operator as a function of the tensors of a layer; vmap allows no random numbers in it."""
    operator, count = getattr(torch.ops.rnnfast, case.cell), 5 + CELLS[case.cell].states
    options = case.reverse, save, False, lengths_of(case), reset_of(case)
    return lambda *tensors: operator(*tensors[:count], *options, *tensors[count:])


def plain(case: Case, inputs: Inputs) -> Callable[..., tuple[Tensor, ...]]:
    """The same in plain PyTorch."""
    row, extras = CELLS[case.cell], (lengths_of(case), reset_of(case))

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        x, *rest = with_others(inputs, tensors)
        states, weights = tuple(rest[: row.states]), rest[row.states :]
        arguments = LayerInputs(x, states, *weights[:4], case.reverse, *extras, *weights[4:])
        y, finals, cells = reference.layer(row, arguments)
        return (y, *finals, cells) if case.cells else (y, *finals)

    return call


def weighted(results: Sequence[Tensor]) -> Tensor:
    return sum((k + 1) * result.sin().sum() for k, result in enumerate(results))


@every_kind
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("save", [False, True])
def test_gradients_of_direct_calls(case: Case, save: bool, recompute: bool) -> None:
    inputs = sample(case)
    leaves = [t.requires_grad_() for t in differentiable(inputs)]
    results = run_forward(case, inputs, save, recompute)
    after_states = results[1 + CELLS[case.cell].states :]
    assert not after_states[0].requires_grad
    if not save:  # though the backward has what it needs
        assert [t.shape for t in after_states] == [(0,)] * len(after_states)
        assert not any(t.requires_grad for t in after_states)
    case = case if save else case._replace(cells=False)
    found = torch.autograd.grad(weighted(outputs_of(case, results)), leaves)
    expected = torch.autograd.grad(weighted(plain(case, inputs)(*leaves)), leaves)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert not run_forward(case, inputs, save, recompute)[0].requires_grad


@every_kind
def test_second_derivatives_of_direct_calls(case: Case) -> None:
    inputs = sample(case)
    leaves = [t.requires_grad_() for t in differentiable(inputs)]
    seconds = []
    for call in (function_of(case, inputs), plain(case, inputs)):
        firsts = torch.autograd.grad(weighted(call(*leaves)), leaves, create_graph=True)
        seconds.append(torch.autograd.grad(weighted(firsts), leaves, materialize_grads=True))
    torch.testing.assert_close(*seconds)


def test_gradients_of_some_arguments() -> None:
    """The others, a state among them, are constants."""
    inputs = sample(Case("lstm", 3, 2, 4, 5))
    for wanted in (0, 2, 4, 6):
        given = [None if t is None else t.detach() for t in inputs]
        given[wanted].requires_grad_()
        results = torch.ops.rnnfast.lstm(*given, False, False)
        expected = plain(Case("lstm", 3, 2, 4, 5), given)(*given)
        for result in range(3):
            gradients = [
                torch.autograd.grad(r[result].sin().sum(), given[wanted], retain_graph=True)
                for r in (results, expected)
            ]
            torch.testing.assert_close(*gradients)


def test_compiled_autograd() -> None:
    """torch compiles the backward of a call that was not compiled itself."""
    case = Case("lstm", 3, 2, 4, 5, cells=True)
    inputs = sample(case)
    leaves = [t.requires_grad_() for t in differentiable(inputs)]
    expected = torch.autograd.grad(weighted(plain(case, inputs)(*leaves)), leaves)
    loss = weighted(function_of(case, inputs)(*leaves))
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        loss.backward()
    torch.testing.assert_close(tuple(t.grad for t in leaves), expected)


class TestAutocast:
    """Direct calls cast as the modules do."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @every_kind
    def test_casts_to_the_dtype_of_the_region(self, case: Case, dtype: torch.dtype) -> None:
        inputs = sample(case, torch.float32)
        leaves = [t.requires_grad_() for t in differentiable(inputs)]
        with torch.autocast("cpu", dtype):
            results = run_forward(case, inputs, save=True)
        expected = run_forward(case, cast(inputs, dtype, "cpu"), save=True)
        assert results[0].dtype is dtype
        pair = outputs_of(case, results), outputs_of(case, expected)
        torch.testing.assert_close(*pair, rtol=0, atol=0)
        found = torch.autograd.grad(weighted(outputs_of(case, results)), leaves)
        wanted = torch.autograd.grad(weighted(outputs_of(case, expected)), leaves)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        assert found[0].dtype is torch.float32

    def test_leaves_float64(self) -> None:
        inputs = sample(Case("gru", 3, 2, 4, 5))
        with torch.autocast("cpu"):
            assert torch.ops.rnnfast.gru(*inputs, False, False)[0].dtype is torch.float64

    def test_gives_what_the_module_gives(self) -> None:
        torch.manual_seed(0)
        module, x, h = rnnfast.GRU(4, 5), torch.randn(3, 2, 4), torch.randn(1, 2, 5)
        weights = module._flat_weights
        with torch.autocast("cpu"):
            y, h_n = module(x, h)
            direct = torch.ops.rnnfast.gru(x, h[0], *weights, False, False)
        torch.testing.assert_close((y, h_n[0]), tuple(direct[:2]), rtol=0, atol=0)


class CountCalls(TorchDispatchMode):
    """Counts calls of kernels of this package."""

    calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.calls += func.namespace == "rnnfast"
        return func(*args, **(kwargs or {}))


def transforms(case: Case) -> tuple[Inputs, list[Tensor], list[Callable]]:
    inputs = sample(case)
    return inputs, differentiable(inputs), [function_of(case, inputs), plain(case, inputs)]


def gradients(call: Callable[..., tuple[Tensor, ...]], count: int) -> Callable[..., Any]:
    return torch.func.grad(lambda *t: weighted(call(*t)), tuple(range(count)))


class TestTransforms:
    """torch.func's transforms and forward-mode AD of direct calls."""

    @pytest.mark.parametrize("over", ["inputs", "x", "weights", "all"])
    @pytest.mark.parametrize("save", [False, True])
    @every_kind
    def test_vmap(self, case: Case, over: str, save: bool) -> None:
        samples = [sample(case, seed=seed) for seed in range(3)]
        states = 1 + CELLS[case.cell].states
        chosen = {
            "inputs": range(states),
            "x": range(1),
            "weights": range(states, len(samples[0])),
            "all": range(len(samples[0])),
        }[over]
        inputs, dims = list(samples[0]), [None] * len(samples[0])
        for i in chosen:
            if inputs[i] is not None:
                dims[i] = i % 2  # not always the first
                inputs[i] = torch.stack([one[i] for one in samples], dims[i])

        call = operator_of(case, save)
        found = torch.vmap(call, tuple(dims))(*inputs)
        for k, one in enumerate(samples):
            mixed = [one[i] if dims[i] is not None else t for i, t in enumerate(inputs)]
            pairs = [*zip([result[k] for result in found], call(*mixed), strict=True)]
            if case.lengths == "padded":
                del pairs[states]  # gates, which are not written beyond a sequence's end
            for actual, expected in pairs:
                torch.testing.assert_close(actual, expected)

    def test_vmap_over_lengths_and_resets(self) -> None:
        case = Case("lstm", 4, 3, 4, 5)
        inputs = sample(case, torch.float32)
        lengths, reset = torch.tensor([[4, 0, 2], [1, 3, 4]]), torch.rand(4, 2, 3) < 0.5

        def call(lengths: Tensor, reset: Tensor) -> tuple[Tensor, ...]:
            return torch.ops.rnnfast.lstm(*inputs, True, False, False, lengths, reset)

        found = torch.vmap(call, (0, 1))(lengths, reset)
        for k in range(2):
            expected = call(lengths[k], reset[:, k])
            torch.testing.assert_close(tuple(result[k] for result in found), tuple(expected))

    @pytest.mark.parametrize(("shared", "calls"), [(True, 1), (False, 7)])
    def test_vmap_with_one_set_of_weights_is_one_call(self, shared: bool, calls: int) -> None:
        x, h0, w_ih, *weights = sample(Case("gru", 3, 2, 4, 5))
        xs, w_ihs = x.expand(7, *x.shape), w_ih.expand(7, *w_ih.shape)

        def call(x: Tensor, w_ih: Tensor) -> Tensor:
            return torch.ops.rnnfast.gru(x, h0, w_ih, *weights, False, False)[0]

        with CountCalls() as seen:
            torch.vmap(call, (0, None if shared else 0))(xs, w_ih if shared else w_ihs)
        assert seen.calls == calls

    @every_kind
    def test_per_sample_gradients(self, case: Case) -> None:
        _, tensors, calls = transforms(case)
        stacked = [torch.stack([t, -t, 2 * t]) for t in tensors]
        found, expected = (torch.vmap(gradients(call, len(stacked)))(*stacked) for call in calls)
        torch.testing.assert_close(found, expected)

    @every_kind
    def test_gradients_of_vmap(self, case: Case) -> None:
        _, tensors, calls = transforms(case)
        stacked = [torch.stack([t, -t, 2 * t]).requires_grad_() for t in tensors]
        # by torch.func, and by ordinary autograd
        found, expected = (gradients(torch.vmap(call), len(stacked))(*stacked) for call in calls)
        torch.testing.assert_close(found, expected)
        found = torch.autograd.grad(weighted(torch.vmap(calls[0])(*stacked)), stacked)
        torch.testing.assert_close(found, expected)

    @every_kind
    def test_forward_mode(self, case: Case) -> None:
        _, tensors, calls = transforms(case)
        tangents = [torch.randn_like(t) for t in tensors]
        found, expected = (torch.func.jvp(c, tuple(tensors), tuple(tangents)) for c in calls)
        torch.testing.assert_close(found, expected)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, d) for t, d in zip(tensors, tangents, strict=True)]
            results = [forward_ad.unpack_dual(result).tangent for result in calls[0](*duals)]
        torch.testing.assert_close(tuple(results), expected[1])

    @pytest.mark.parametrize("case", [Case("lstm", 2, 1, 2, 2), Case("gru", 2, 1, 2, 2)], ids=str)
    def test_jacobians_and_hessians(self, case: Case) -> None:
        _, tensors, (call, formula) = transforms(case)
        x, rest = tensors[0], tensors[1:]
        expected = torch.autograd.functional.jacobian(lambda x: formula(x, *rest)[0], x)
        for jacobian in (
            torch.func.jacrev(lambda x: call(x, *rest)[0])(x),
            torch.func.jacfwd(lambda x: call(x, *rest)[0])(x),
            torch.autograd.functional.jacobian(lambda x: call(x, *rest)[0], x, vectorize=True),
        ):
            torch.testing.assert_close(jacobian, expected)

        def loss(function: Callable[..., tuple[Tensor, ...]]) -> Callable[[Tensor], Tensor]:
            return lambda x: weighted(function(x, *rest))

        expected = torch.autograd.functional.hessian(loss(formula), x)
        for hessian in (
            torch.func.hessian(loss(call))(x),
            torch.autograd.functional.hessian(loss(call), x),
            torch.autograd.functional.hessian(loss(call), x, vectorize=True),
        ):
            torch.testing.assert_close(hessian, expected)


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
