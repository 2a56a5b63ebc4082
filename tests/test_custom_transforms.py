"""Cells that users write under torch.func, torch.compile, export, autocast and derived twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from custom_layers import CELLS, as_tuple, inputs_of, loop, loss_of
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

DOUBLE = torch.float64
some_cells = pytest.mark.parametrize("name", ["slstm", "peephole", "ligru"])


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in module.named_parameters()}


def call(module: nn.Module, weights: dict[str, Tensor], x: Tensor) -> Any:
    return functional_call(module, weights, (x,))


@some_cells
@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck(name: str, recompute: bool) -> None:
    layer = CELLS[name].layer(2, 3, dtype=DOUBLE, recompute=recompute)
    x, hx = inputs_of(CELLS[name], 2, 2, 2, 3)
    weights = values(layer)
    leaves = [weight.requires_grad_() for weight in weights.values()]
    count = len(CELLS[name].state)

    def run(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        states = tensors[:count] if count > 1 else tensors[0]
        given = dict(zip(weights, tensors[count:], strict=True))
        output, finals = functional_call(layer, given, (x, states))
        return output, *as_tuple(finals)

    inputs = (x, *as_tuple(hx), *leaves)
    assert gradcheck(run, inputs, fast_mode=True)
    assert gradgradcheck(run, inputs, fast_mode=True)


@some_cells
def test_gradcheck_of_single_steps(name: str) -> None:
    step = CELLS[name].step(2, 3, dtype=DOUBLE)
    x, hx = inputs_of(CELLS[name], 2, 2, 2, 3)
    states = tuple(state[0].detach().requires_grad_() for state in as_tuple(hx))

    def run(x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        return as_tuple(step(x, states if len(states) > 1 else states[0]))

    inputs = (x[0].detach().requires_grad_(), *states)
    assert gradcheck(run, inputs, fast_mode=True)
    assert gradgradcheck(run, inputs, fast_mode=True)


@some_cells
def test_functional_transforms(name: str) -> None:
    layer = CELLS[name].layer(2, 3, dtype=DOUBLE, num_layers=2)
    weights, x = values(layer), torch.randn(4, 2, 2, dtype=DOUBLE)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss_of(call(layer, weights, x))

    batch = torch.stack([x, 2 * x, -x])
    every = vmap(grad(loss), in_dims=(None, 0))(weights, batch)
    for i, sample in enumerate(batch):
        gradients = torch.autograd.grad(loss_of(layer(sample)), list(layer.parameters()))
        for key, expected in zip(weights, gradients, strict=True):
            torch.testing.assert_close(every[key][i], expected)
    torch.testing.assert_close(
        vmap(lambda x: layer(x)[0])(batch), torch.stack([layer(one)[0] for one in batch])
    )
    ensemble = {key: torch.stack([value, -value]) for key, value in weights.items()}
    both = vmap(lambda weights: call(layer, weights, x)[0])(ensemble)
    negative = {key: -value for key, value in weights.items()}
    torch.testing.assert_close(both, torch.stack([layer(x)[0], call(layer, negative, x)[0]]))

    def output(x: Tensor) -> Tensor:
        return layer(x)[0]

    jacobian = jacrev(output)(x)
    torch.testing.assert_close(jacfwd(output)(x), jacobian)
    direction = torch.randn_like(x)
    _, tangent = jvp(output, (x,), (direction,))
    torch.testing.assert_close(tangent, torch.tensordot(jacobian, direction, 3))


def test_batched_gradients() -> None:
    layer = CELLS["slstm"].layer(2, 3, dtype=DOUBLE)
    x = torch.randn(3, 2, 2, dtype=DOUBLE)
    expected = torch.autograd.functional.jacobian(lambda x: layer(x)[0], x)
    actual = torch.autograd.functional.jacobian(lambda x: layer(x)[0], x, vectorize=True)
    torch.testing.assert_close(actual, expected)


@some_cells
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile(name: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    options = {"bidirectional": True} if name == "peephole" else {"num_layers": 2}
    layer = CELLS[name].layer(2, 5, dtype=DOUBLE, **options)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for T, B in [(4, 3), (6, 2), (5, 7)] if dynamic else [(4, 3)]:
        x, hx = inputs_of(CELLS[name], T, B, 2, 5, rows=2)
        inputs = [x, *as_tuple(hx), *layer.parameters()]
        results, expected = compiled(x, hx), layer(x, hx)
        torch.testing.assert_close(results, expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss_of(results), inputs),
            torch.autograd.grad(loss_of(expected), inputs),
        )


@some_cells
def test_torch_compile_of_single_steps(name: str) -> None:
    torch._dynamo.reset()
    step = CELLS[name].step(2, 5, dtype=DOUBLE)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for B in (3, 2):
        x, hx = inputs_of(CELLS[name], 1, B, 2, 5)
        states = tuple(state[0] for state in as_tuple(hx))
        states = states if len(states) > 1 else states[0]
        torch.testing.assert_close(compiled(x[0], states), step(x[0], states))


@pytest.mark.full
def test_torch_compile_with_inductor() -> None:
    torch._dynamo.reset()
    layer = CELLS["slstm"].layer(2, 5)
    x = torch.randn(4, 3, 2)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


@some_cells
def test_torch_export(name: str) -> None:
    layer = CELLS[name].layer(2, 5, dtype=DOUBLE, num_layers=2)
    T, B = torch.export.Dim("T", min=2), torch.export.Dim("B", min=2)
    x = torch.randn(4, 3, 2, dtype=DOUBLE)
    program = torch.export.export(layer, (x,), dynamic_shapes={"input": {0: T, 1: B}})
    other = torch.randn(6, 5, 2, dtype=DOUBLE)
    torch.testing.assert_close(program.module()(other), layer(other))


def test_autocast() -> None:
    written = CELLS["slstm"]
    layer, step = written.layer(3, 5), written.step(3, 5)
    x, hx = inputs_of(written, 4, 3, 3, 5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, states = layer(x, hx)
        after = step(x[0], tuple(state[0] for state in hx))
    assert {t.dtype for t in (output, *states, *after)} == {torch.bfloat16}
    weights = {key: value.double() for key, value in values(layer).items()}
    expected, _ = loop(written, layer, x.double(), [t.double() for t in hx], parameters=weights)
    torch.testing.assert_close(output.double(), expected, rtol=0.05, atol=0.05)
    loss_of((output, states)).backward()
    assert {weight.grad.dtype for weight in layer.parameters()} == {torch.float32}


def test_symbolic_traces_have_the_layer_as_one_node() -> None:
    written = CELLS["slstm"]
    layer, step = written.layer(2, 5, dtype=DOUBLE), written.step(2, 5, dtype=DOUBLE)
    x = torch.randn(4, 3, 2, dtype=DOUBLE)
    for module, given in ((layer, x), (step, x[0])):
        graph = torch.fx.symbolic_trace(nn.Sequential(module))
        assert [node.op for node in graph.graph.nodes].count("call_module") == 1
        torch.testing.assert_close(graph(given), module(given))
