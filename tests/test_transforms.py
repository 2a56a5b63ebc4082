"""What torch.nn's recurrent modules do not support: torch.func, forward AD, torch.compile, more.

The oracle is a plain loop over calls, or `rnnfast.reference` under ordinary autograd.
"""

import os

import pytest
import torch
from covering import quick_pairs, quick_values
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.functional import hessian, jacobian
from torch.utils.checkpoint import checkpoint

import rnnfast
from rnnfast import autograd, reference
from rnnfast.backend import EXTENSION, transforms_active
from rnnfast.reference import CELLS, LayerInputs

EXPECT_FUSED = EXTENSION is not None or os.environ.get("RNNFAST_EXPECT_EXTENSION") != "0"
BACKENDS = ["reference", *(["fused"] if EXPECT_FUSED else [])]
DTYPE = torch.float64
MODULES = {
    "elman_tanh": lambda **options: rnnfast.RNN(2, 3, **options),
    "elman_relu": lambda **options: rnnfast.RNN(2, 3, nonlinearity="relu", **options),
    "gru": lambda **options: rnnfast.GRU(2, 3, **options),
    "lstm": lambda **options: rnnfast.LSTM(2, 3, **options),
}
ONE_STEP = {
    "elman_tanh": lambda **options: rnnfast.RNNCell(2, 3, **options),
    "gru": lambda **options: rnnfast.GRUCell(2, 3, **options),
    "lstm": lambda **options: rnnfast.LSTMCell(2, 3, **options),
}

backends = pytest.mark.parametrize("backend", BACKENDS)
cells = pytest.mark.parametrize("cell", CELLS)
fused = pytest.mark.skipif(not EXPECT_FUSED, reason="the extension is not expected")


@pytest.fixture
def module(cell, backend):
    torch.manual_seed(0)
    return MODULES[cell](dtype=DTYPE, backend=backend)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(4, 2, 2, dtype=DTYPE)


def output(result):
    """Returns the first tensor of a module's result."""
    return result if isinstance(result, torch.Tensor) else output(result[0])


def loss(module, parameters, x):
    return torch.func.functional_call(module, parameters, (x,))[0].pow(2).sum()


def values(module):
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


@cells
@backends
def test_per_sample_gradients(module, x):
    parameters = values(module)
    batch = torch.stack([x, 2 * x, -x])
    actual = torch.func.vmap(torch.func.grad(lambda p, x: loss(module, p, x)), in_dims=(None, 0))(
        parameters, batch
    )
    for i, sample in enumerate(batch):
        gradients = torch.autograd.grad(module(sample)[0].pow(2).sum(), list(module.parameters()))
        for name, expected in zip(parameters, gradients, strict=True):
            torch.testing.assert_close(actual[name][i], expected)


@cells
@backends
def test_vmap_over_models(module, x):
    parameters = values(module)
    ensemble = {name: torch.stack([value, -value]) for name, value in parameters.items()}
    actual = torch.func.vmap(lambda p: loss(module, p, x))(ensemble)
    expected = [
        loss(module, {name: value[i] for name, value in ensemble.items()}, x) for i in range(2)
    ]
    torch.testing.assert_close(actual, torch.stack(expected))


@cells
@backends
def test_jacobians_agree(module, x):
    def call(x):
        return module(x)[0]

    expected = jacobian(call, x)
    for actual in (
        torch.func.jacrev(call)(x),
        torch.func.jacfwd(call)(x),
        jacobian(call, x, vectorize=True),
        jacobian(call, x, vectorize=True, strategy="forward-mode"),
    ):
        torch.testing.assert_close(actual, expected)


@cells
@backends
def test_hessians_agree(module, x):
    def call(x):
        return module(x)[0].pow(2).sum()

    expected = hessian(call, x)
    torch.testing.assert_close(torch.func.hessian(call)(x), expected)
    torch.testing.assert_close(hessian(call, x, vectorize=True), expected)


@cells
@backends
def test_forward_mode(module, x):
    direction = torch.randn_like(x)
    with forward_ad.dual_level():
        dual = module(forward_ad.make_dual(x, direction))[0]
        actual = forward_ad.unpack_dual(dual).tangent
    whole = jacobian(lambda x: module(x)[0], x)
    expected = torch.einsum("tbhsci,sci->tbh", whole, direction)
    torch.testing.assert_close(actual, expected)


def test_the_probes_see_transforms():
    seen = []

    def look(x):
        seen.append(transforms_active())
        return x.sum()

    look(torch.zeros(2))
    torch.func.grad(look)(torch.zeros(2))
    torch.func.vmap(look)(torch.zeros(2, 2))
    with forward_ad.dual_level():
        look(torch.zeros(2))
    look(torch.zeros(2))
    assert seen == [False, True, True, True, False]


def layer_arguments(cell, *, bias=True):
    """Returns x, states, weights and biases of a layer: 3 steps, 2 samples, 2 inputs, 3 units."""
    torch.manual_seed(0)
    rows = 3 * cell.gates
    shapes = [(3, 2, 2), *[(2, 3)] * cell.states, (rows, 2), (rows, 3), *[(rows,)] * (2 * bias)]
    return [torch.randn(shape, dtype=DTYPE, requires_grad=True) for shape in shapes]


def flat_layer(layer, cell, reverse):
    """Makes ``layer`` a function of a flat list of tensors that returns a flat tuple."""

    def call(x, *tensors):
        states, weights = tensors[: cell.states], tensors[cell.states :]
        biases = weights[2:] or (None, None)
        inputs = LayerInputs(x, states, *weights[:2], *biases, reverse)
        y, finals, _ = layer(cell, inputs)
        return y, *finals

    return call


@fused
@quick_pairs(cell=[*CELLS], reverse=[False, True], bias=[False, True])
def test_first_and_second_derivatives(cell, reverse, bias):
    call = flat_layer(autograd.layer, CELLS[cell], reverse)
    arguments = layer_arguments(CELLS[cell], bias=bias)
    assert gradcheck(call, arguments)
    assert gradgradcheck(call, arguments)


@fused
@quick_values(cell=[*CELLS], result=[0, 1, -1])
def test_second_derivatives_of_one_result(cell, result):
    call = flat_layer(autograd.layer, CELLS[cell], reverse=False)
    assert gradgradcheck(lambda *a: call(*a)[result], layer_arguments(CELLS[cell]))


@fused
@cells
def test_derivatives_of_dependent_arguments(cell):
    """Every argument depends on one tensor; up to the fourth derivative."""
    row = CELLS[cell]
    values = [value.detach() for value in layer_arguments(row)]
    outcomes = []
    for layer in (autograd.layer, reference.layer):
        x = values[0].clone().requires_grad_()
        arguments = [x, *(value * x.mean() + x.sum() / 8 for value in values[1:])]
        total = sum(result.sin().sum() for result in flat_layer(layer, row, False)(*arguments))
        derivatives = []
        for _ in range(4):
            (derivative,) = torch.autograd.grad(total, x, create_graph=True)
            derivatives.append(derivative.detach())
            total = derivative.pow(2).sum()
        outcomes.append(derivatives)
    torch.testing.assert_close(outcomes[0], outcomes[1])


@fused
@cells
def test_gradients_of_one_result(cell):
    row = CELLS[cell]
    arguments = layer_arguments(row)
    for result in range(1 + row.states):
        gradients = [
            torch.autograd.grad(
                flat_layer(layer, row, True)(*arguments)[result].pow(2).sum(), arguments
            )
            for layer in (autograd.layer, reference.layer)
        ]
        torch.testing.assert_close(*gradients)


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@cells
@backends
def test_undefined_gradients(module, x):
    x.requires_grad_()
    inputs = [x, *module.parameters()]
    blocked = _NoGradient.apply(module(x)[0]).sum()
    assert torch.autograd.grad(blocked, inputs, allow_unused=True) == (None,) * len(inputs)


@cells
@backends
def test_checkpoint(module, x):
    x.requires_grad_()
    inputs = [x, *module.parameters()]
    expected = torch.autograd.grad(module(x)[0].pow(2).sum(), inputs)
    again = checkpoint(lambda x: module(x)[0], x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.pow(2).sum(), inputs), expected)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@quick_values(cell=[*CELLS], backend=BACKENDS, dynamic=[False, True])
def test_compiled_training_in_one_graph(cell, backend, dynamic):
    module = MODULES[cell](bidirectional=True, batch_first=True, dtype=DTYPE, backend=backend)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for steps in (5, 7):
        x = torch.randn(2, steps, 2, dtype=DTYPE, requires_grad=True)
        inputs = [x, *module.parameters()]
        results = [call(x)[0] for call in (compiled, module)]
        torch.testing.assert_close(*results)
        gradients = [torch.autograd.grad(r.pow(2).sum(), inputs) for r in results]
        torch.testing.assert_close(*gradients)


@pytest.mark.usefixtures("fresh_compiler")
@quick_values(cell=[*CELLS], backend=BACKENDS, dynamic=[True, False])
def test_compiled_inference_in_one_graph(module, dynamic):
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with torch.no_grad():
        for steps in (5, 7):
            x = torch.randn(steps, 2, 2, dtype=DTYPE)
            torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", [rnnfast.RNN, rnnfast.GRU, rnnfast.LSTM])
def test_compiled_training_on_torchs_kernels(kind):
    """The LSTM stays out of the graph, since torch cannot differentiate it there."""
    module = kind(2, 3, backend="aten")
    x = torch.randn(5, 2, 2, requires_grad=True)
    inputs = [x, *module.parameters()]
    if kind is rnnfast.LSTM:
        whole = torch.compile(module, fullgraph=True, backend="aot_eager")
        with pytest.raises(torch._dynamo.exc.Unsupported, match="cannot differentiate its oneDNN"):
            whole(x)
    results = [call(x)[0] for call in (torch.compile(module, backend="aot_eager"), module)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(
        *[torch.autograd.grad(result.pow(2).sum(), inputs) for result in results]
    )


@pytest.mark.usefixtures("fresh_compiler")
@quick_values(cell=[*ONE_STEP], backend=BACKENDS)
def test_compiled_single_cells(cell, backend):
    module = ONE_STEP[cell](dtype=DTYPE, backend=backend)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 2, dtype=DTYPE, requires_grad=True)
    gradients = [
        torch.autograd.grad(output(call(x)).sum(), [x, *module.parameters()])
        for call in (compiled, module)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.usefixtures("fresh_compiler")
@backends
def test_compiled_with_repeated_tensors(backend):
    module = rnnfast.LSTM(2, 3, dtype=DTYPE, backend=backend)
    module.bias_hh_l0 = module.bias_ih_l0
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 2, 2, dtype=DTYPE)
    h = torch.randn(1, 2, 3, dtype=DTYPE, requires_grad=True)
    gradients = [
        torch.autograd.grad(call(x, (h, h))[0].sum(), [h, *module.parameters()])
        for call in (compiled, module)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("cell", ["lstm"])
@backends
def test_compiled_per_sample_gradients(module, x):
    def per_sample(parameters, batch):
        gradient = torch.func.grad(lambda p, x: loss(module, p, x))
        return torch.func.vmap(gradient, in_dims=(None, 0))(parameters, batch)

    batch = torch.stack([x, -x])
    compiled = torch.compile(per_sample, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(values(module), batch), per_sample(values(module), batch))


@pytest.mark.usefixtures("fresh_compiler")
@quick_values(cell=[*CELLS], backend=BACKENDS)
def test_compiled_under_autocast(cell, backend):
    module = MODULES[cell](backend=backend)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = compiled(x)[0], module(x)[0]
    assert actual.dtype is torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-2)


@pytest.mark.usefixtures("fresh_compiler")
@cells
@backends
def test_export(module, x):
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), module(x))


@fused
@pytest.mark.usefixtures("fresh_compiler")
@cells
def test_export_keeps_the_operator(cell, x):
    program = torch.export.export(MODULES[cell](dtype=DTYPE, backend="fused"), (x,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert f"rnnfast.{cell}.default" in targets
