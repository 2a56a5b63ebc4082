"""Cells that users might write, and layers of them as plain loops, for the tests of Layer.

The loops call the functions as they were written, without anything of rnnfast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import custom_steps as steps
import torch
import torch.nn.functional as F
from cases import assert_close, bound
from torch import Tensor

import rnnfast
from rnnfast import custom


class Written(NamedTuple):
    """A cell and the function that it was made from."""

    function: Callable[..., Any]
    gates: int
    state: tuple[str, ...] = ("h",)
    parameters: tuple[str, ...] = ()

    @property
    def cell(self) -> custom.CustomCell:
        decorate = rnnfast.cell(gates=self.gates, state=self.state, parameters=self.parameters)
        return decorate(self.function)

    def layer(self, *sizes: int, **options: Any) -> rnnfast.Layer:
        """A layer that must run its own kernels."""
        return rnnfast.Layer(self.cell, *sizes, **{"backend": "fused", **options})

    def step(self, *sizes: int, **options: Any) -> rnnfast.LayerCell:
        return rnnfast.LayerCell(self.cell, *sizes, **{"backend": "fused", **options})


def scaled_slstm(x, h, state, parameters):
    i = x[0] + h[0]
    log_f = F.logsigmoid(x[1] + h[1] + parameters.p)
    m = torch.maximum(log_f + state.m, i)
    i, f = torch.exp(i - m), torch.exp(log_f + state.m - m)
    c = f * state.c + i * torch.tanh(x[2] + h[2])
    n = f * state.n + i
    return torch.sigmoid(x[3] + h[3]) * c / n.clamp(min=0.5), c, n, m


def own_gru(x, h, state):
    r = torch.sigmoid(x[0] + h[0])
    z = torch.sigmoid(x[1] + h[1])
    n = torch.tanh(x[2] + r * h[2])
    return torch.lerp(n, state.h, z)


def unchanged(x, h, state):
    return torch.tanh(x[0] + h[0] * state.c + state.d), state.c, state.d * 0.5 + x[0]


def inputs_alone(x, h, state):
    return torch.sigmoid(x[0]) * x[1]


def clamped(x, h, state, parameters):
    s = (x[0] + h[0]).clamp(-0.8, 0.9)
    return torch.where(s > parameters.p * state.h, s, 0.5 * x[1] + h[1])


@rnnfast.cell(gates=3, state=("h", "c"), parameters=("p",))
def gated(x: Any, h: Any, state: Any, parameters: Any) -> Any:
    keep = torch.sigmoid(x[0] + h[0] + parameters.p * state.c)
    c = keep * state.c + torch.tanh(x[1] + h[1])
    return torch.sigmoid(x[2] + h[2]) * torch.tanh(c), c


@rnnfast.cell(gates=2, norm="layer")
def normal(gates: Any, state: Any) -> Any:
    update = torch.sigmoid(gates[0])
    return update * torch.tanh(gates[1]) + (1 - update) * state.h


CELLS = {
    "ligru": Written(steps.ligru, 2),
    "lstm": Written(steps.lstm, 4, ("h", "c")),
    "peephole": Written(steps.peephole, 4, ("h", "c"), ("p_i", "p_f", "p_o")),
    "slstm": Written(scaled_slstm, 4, ("h", "c", "n", "m"), ("p",)),
    "gru": Written(own_gru, 3),
    "elman": Written(steps.elman_tanh, 1),
    "unchanged": Written(unchanged, 1, ("h", "c", "d")),
    "inputs_alone": Written(inputs_alone, 2),
    "clamped": Written(clamped, 2, ("h",), ("p",)),
}


def inputs_of(
    written: Written, *sizes: int, rows: int = 1, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Any]:
    """x (T, B, I) and states (rows, B, H) for sizes T, B, I, H."""
    T, B, I, H = sizes
    x = torch.randn(T, B, I, dtype=torch.float64).to(dtype).requires_grad_()
    states = tuple(
        torch.randn(rows, B, H, dtype=torch.float64).to(dtype).requires_grad_()
        for _ in written.state
    )
    return x, states if len(states) > 1 else states[0]


def as_tuple(states: Any) -> tuple[Tensor, ...]:
    return (states,) if isinstance(states, Tensor) else tuple(states)


def run_step(
    written: Written, x: Tensor, states: Sequence[Tensor], weights: dict[str, Tensor]
) -> tuple[Tensor, ...]:
    """One step with the weights of one layer and direction."""
    gates_x = F.linear(x, weights["weight_ih"], weights.get("bias_ih"))
    gates_h = F.linear(states[0], weights["weight_hh"], weights.get("bias_hh"))
    arguments = [
        gates_x.chunk(written.gates, -1),
        gates_h.chunk(written.gates, -1),
        SimpleNamespace(**dict(zip(written.state, states, strict=True))),
    ]
    if written.parameters:
        own = {name: weights[name] for name in written.parameters}
        arguments.append(SimpleNamespace(**own))
    return as_tuple(written.function(*arguments))


def loop(
    written: Written,
    layer: rnnfast.Layer,
    x: Tensor,
    states: Sequence[Tensor],
    lengths: Sequence[int] | None = None,
    reset: Tensor | None = None,
    parameters: dict[str, Tensor] | None = None,
    rounded_to: torch.dtype = torch.float64,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What a layer should return for x (T, B, I): its output and final states.

    h is rounded after every step, without an effect on gradients, where ``rounded_to`` says so.
    """
    tensors = dict(layer.named_parameters()) if parameters is None else parameters
    directions = 2 if layer.bidirectional else 1
    T = x.shape[0]
    ends = torch.full((x.shape[1],), T) if lengths is None else torch.as_tensor(lengths)
    finals: list[tuple[Tensor, ...]] = []
    for k in range(layer.num_layers):
        outputs = []
        for direction in range(directions):
            suffix = f"_l{k}" + "_reverse" * direction
            names = [name for name in tensors if name.endswith(suffix)]
            weights = {name.removesuffix(suffix): tensors[name] for name in names}
            row = k * directions + direction
            current = tuple(state[row] for state in states)
            y: list[Tensor] = [x.new_zeros(())] * T
            for t in reversed(range(T)) if direction else range(T):
                border = t + 1 if direction else t
                before = current
                if reset is not None and border < T:
                    cut = (reset[border] & (border < ends)).unsqueeze(1)
                    before = tuple(torch.where(cut, 0, state) for state in current)
                after = run_step(written, x[t], before, weights)
                after = tuple(state.expand_as(current[0]) for state in after)
                after = (after[0] + (after[0].to(rounded_to) - after[0]).detach(), *after[1:])
                runs = (t < ends).unsqueeze(1)
                pairs = zip(after, current, strict=True)
                current = tuple(torch.where(runs, new, old) for new, old in pairs)
                y[t] = torch.where(runs, after[0], 0)
            outputs.append(torch.stack(y))
            finals.append(current)
        x = torch.cat(outputs, -1)
    return x, tuple(torch.stack(rows) for rows in zip(*finals, strict=True))


def loss_of(results: Any) -> Tensor:
    """A loss in which all results count differently."""
    output, states = results
    total = torch.zeros((), dtype=torch.float64)
    for tensor in (output, *as_tuple(states)):
        numbers = torch.arange(1, tensor.numel() + 1, dtype=torch.float64)
        total = total + (tensor.double().flatten() * torch.sin(numbers)).sum()
    return total


class Found(NamedTuple):
    """Results of a call and the gradients of `loss_of`."""

    results: list[Tensor]
    grads: list[Tensor]


def found(results: Any, inputs: Sequence[Tensor]) -> Found:
    grads = torch.autograd.grad(
        loss_of(results), list(inputs), allow_unused=True, materialize_grads=True
    )
    return Found([t.detach().double() for t in (results[0], *as_tuple(results[1]))], list(grads))


def double(tensors: Any) -> Any:
    """Leaves of the same values in float64."""
    if isinstance(tensors, dict):
        return {name: double(tensor) for name, tensor in tensors.items()}
    if isinstance(tensors, (tuple, list)):
        return tuple(double(tensor) for tensor in tensors)
    return tensors.detach().double().requires_grad_()


def check_layer(
    written: Written,
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float64,
    lengths: Sequence[int] | None = None,
    reset: Tensor | None = None,
    **options: Any,
) -> None:
    """Compares results and gradients of a layer with the loop, for sizes T, B, I, H."""
    layer = written.layer(sizes[2], sizes[3], dtype=dtype, **options)
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    x, hx = inputs_of(written, *sizes, rows=rows, dtype=dtype)
    weights = dict(layer.named_parameters())
    extras = {"lengths": lengths, "reset": reset}
    given = {name: value for name, value in extras.items() if value is not None}
    actual = found(layer(x, hx, **given), [x, *as_tuple(hx), *weights.values()])
    leaves = double(x), double(as_tuple(hx)), double(weights)
    results = loop(written, layer, *leaves[:2], lengths, reset, leaves[2], dtype)
    expected = found(results, [leaves[0], *leaves[1], *leaves[2].values()])
    check_found(actual, expected, dtype, ["x", *written.state, *weights])


def check_found(actual: Found, expected: Found, dtype: torch.dtype, names: Sequence[str]) -> None:
    for one, other in zip(actual.results, expected.results, strict=True):
        assert_close(one, other, 2 * bound(dtype), dtype)
    for name, one, other in zip(names, actual.grads, expected.grads, strict=True):
        try:
            assert_close(one, other, 6 * bound(dtype), dtype)
        except AssertionError as error:
            raise AssertionError(f"the gradient of {name} is {error}") from None
