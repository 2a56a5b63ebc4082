"""Cells that users write, for `benchmarks.custom`: with rnnfast.cell, and as loops over time.

Each step is written once, with functions that are torch's or jax.numpy's. So rnnfast, the loop in
PyTorch and the scan in JAX compute the same formula.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rnnfast

from .steps import Case, Problem

States = tuple[Any, ...]
TORCH = SimpleNamespace(
    sigmoid=torch.sigmoid,
    tanh=torch.tanh,
    relu=torch.relu,
    exp=torch.exp,
    maximum=torch.maximum,
    logsigmoid=F.logsigmoid,
    chunk=lambda gates, count: gates.chunk(count, -1),
    add_product=lambda sums, h, weight: torch.addmm(sums, h, weight.t()),
    product=F.linear,
    norm=lambda gates, weight, bias, eps: F.layer_norm(gates, gates.shape[-1:], weight, bias, eps),
)
"""The functions of a step for tensors of torch."""


def jax_functions() -> SimpleNamespace:
    """The functions of a step for arrays of JAX."""
    import jax
    from jax import numpy as jnp

    def norm(gates: Any, weight: Any, bias: Any, eps: float) -> Any:
        mean, variance = gates.mean(-1, keepdims=True), gates.var(-1, keepdims=True)
        return (gates - mean) * jax.lax.rsqrt(variance + eps) * weight + bias

    return SimpleNamespace(
        sigmoid=jax.nn.sigmoid,
        tanh=jnp.tanh,
        relu=jax.nn.relu,
        exp=jnp.exp,
        maximum=jnp.maximum,
        logsigmoid=jax.nn.log_sigmoid,
        chunk=lambda gates, count: jnp.split(gates, count, -1),
        add_product=lambda sums, h, weight: sums + h @ weight.T,
        product=lambda h, weight, bias: h @ weight.T + bias,
        norm=norm,
    )


# Steps. `m` has the functions; `gates` are W_ih x + b_ih + W_hh h + b_hh.


def light_gru_step(m: Any, gates: Any, state: States, p: States) -> States:
    """Ravanelli et al., arXiv:1803.10225, without batch normalisation."""
    z = m.sigmoid(gates[0])
    return (z * state[0] + (1 - z) * m.relu(gates[1]),)


def peephole_lstm_step(m: Any, gates: Any, state: States, p: States) -> States:
    """Gers, Schraudolph and Schmidhuber, JMLR 3, 2002."""
    (_, c), (p_i, p_f, p_o) = state, p
    i = m.sigmoid(gates[0] + p_i * c)
    f = m.sigmoid(gates[1] + p_f * c)
    c = f * c + i * m.tanh(gates[2])
    return m.sigmoid(gates[3] + p_o * c) * m.tanh(c), c


def dreamer_gru_step(m: Any, gates: Any, state: States, p: States) -> States:
    """Hafner et al., arXiv:2010.02193: the gates are normalised, the update gate starts small."""
    candidate = m.tanh(m.sigmoid(gates[0]) * gates[1])
    z = m.sigmoid(gates[2] - 1)
    return (z * candidate + (1 - z) * state[0],)


def min_gru_step(m: Any, gates: Any, state: States, p: States) -> States:
    """Feng et al., arXiv:2410.01201."""
    z = m.sigmoid(gates[0])
    return ((1 - z) * state[0] + z * gates[1],)


def slstm_step(m: Any, gates: Any, state: States, p: States) -> States:
    """Beck et al., arXiv:2405.04517, with a sigmoid as the forget gate."""
    _, c, n, s = state
    forget = m.logsigmoid(gates[1]) + s
    s = m.maximum(forget, gates[0])
    i, f = m.exp(gates[0] - s), m.exp(forget - s)
    c, n = f * c + i * m.tanh(gates[2]), f * n + i
    return m.sigmoid(gates[3]) * c / n, c, n, s


def lstm_step(m: Any, gates: Any, state: States, p: States) -> States:
    """The LSTM of torch.nn."""
    c = m.sigmoid(gates[1]) * state[1] + m.sigmoid(gates[0]) * m.tanh(gates[2])
    return m.sigmoid(gates[3]) * m.tanh(c), c


def gru_step(m: Any, x: Any, h: Any, state: States) -> States:
    """The GRU of torch.nn, where the reset gate multiplies the product W_hh h + b_hh."""
    r, z = m.sigmoid(x[0] + h[0]), m.sigmoid(x[1] + h[1])
    n = m.tanh(x[2] + r * h[2])
    return (n + z * (state[0] - n),)


def sums(x: Any, h: Any) -> list[Any]:
    return [a + b for a, b in zip(x, h, strict=True)]


@rnnfast.cell(gates=2)
def light_gru(x: Any, h: Any, state: Any) -> Any:
    return light_gru_step(TORCH, sums(x, h), state, ())


@rnnfast.cell(gates=4, state=("h", "c"), parameters=("p_i", "p_f", "p_o"))
def peephole_lstm(x: Any, h: Any, state: Any, parameters: Any) -> Any:
    return peephole_lstm_step(TORCH, sums(x, h), state, parameters)


@rnnfast.cell(gates=3, norm="layer", eps=1e-3)
def dreamer_gru(gates: Any, state: Any) -> Any:
    return dreamer_gru_step(TORCH, gates, state, ())


@rnnfast.cell(gates=2, recurrent=False)
def min_gru(x: Any, state: Any) -> Any:
    return min_gru_step(TORCH, x, state, ())


@rnnfast.cell(gates=4, state=("h", "c", "n", "m"))
def slstm(x: Any, h: Any, state: Any) -> Any:
    return slstm_step(TORCH, sums(x, h), state, ())


@rnnfast.cell(gates=4, state=("h", "c"))
def lstm(x: Any, h: Any, state: Any) -> Any:
    return lstm_step(TORCH, sums(x, h), state, ())


@rnnfast.cell(gates=3)
def gru(x: Any, h: Any, state: Any) -> Any:
    return gru_step(TORCH, x, h, state)


class Kind(NamedTuple):
    """A cell, and what the loops need to know of it."""

    cell: Any
    step: Callable[..., States]
    splits: bool = False
    """Whether the step takes what x and h give by themselves, not their sum."""
    builtin: tuple[type[nn.Module], type[nn.Module]] | None = None
    """rnnfast's own layer and cell of the same formula."""


KINDS = {
    "light GRU": Kind(light_gru, light_gru_step),
    "peephole LSTM": Kind(peephole_lstm, peephole_lstm_step),
    "layer-norm GRU": Kind(dreamer_gru, dreamer_gru_step),
    "minGRU": Kind(min_gru, min_gru_step),
    "sLSTM": Kind(slstm, slstm_step),
    "LSTM": Kind(lstm, lstm_step, builtin=(rnnfast.LSTM, rnnfast.LSTMCell)),
    "GRU": Kind(gru, gru_step, splits=True, builtin=(rnnfast.GRU, rnnfast.GRUCell)),
}


def project(m: Any, kind: Kind, w: dict[str, Any], x: Any) -> Any:
    """The part of the gates that x gives, of all steps at once."""
    bias = w["bias_ih"]
    if kind.cell.recurrent and not kind.splits:
        bias = bias + w["bias_hh"]
    return m.product(x, w["weight_ih"], bias)


def advance(m: Any, kind: Kind, w: dict[str, Any], from_x: Any, state: States) -> States:
    """The states after one step."""
    cell, gates = kind.cell, from_x
    if kind.splits:
        from_h = m.product(state[0], w["weight_hh"], w["bias_hh"])
        return kind.step(m, m.chunk(from_x, cell.gates), m.chunk(from_h, cell.gates), state)
    if cell.recurrent:
        gates = m.add_product(from_x, state[0], w["weight_hh"])
    if cell.norm_eps is not None:
        gates = m.norm(gates, w["norm_weight"], w["norm_bias"], cell.norm_eps)
    vectors = tuple(w[name] for name in cell.parameter_names)
    return kind.step(m, m.chunk(gates, cell.gates), state, vectors)


class Loop(nn.Module):
    """A cell in plain PyTorch, with parameters, arguments and results of a module of rnnfast.

    The module is a `rnnfast.Layer` or a `rnnfast.LayerCell`; the weights are copies of its own.
    """

    def __init__(self, name: str, module: rnnfast.Layer | rnnfast.LayerCell) -> None:
        super().__init__()
        self.name, self.single = name, isinstance(module, rnnfast.LayerCell)
        self.input_size, self.hidden_size = module.input_size, module.hidden_size
        for key, weight in module.named_parameters():
            self.register_parameter(key, nn.Parameter(weight.detach().clone()))

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    def forward(self, x: Tensor, state: Any = None) -> Any:
        """One step from a state if the module is a cell, else all steps from zeros."""
        kind = self.kind
        w = {key.removesuffix("_l0"): weight for key, weight in self.named_parameters()}
        from_x = project(TORCH, kind, w, x)
        if self.single:
            given = state if isinstance(state, tuple) else (state,)
            result = advance(TORCH, kind, w, from_x, given)
            return result if len(result) > 1 else result[0]
        states: States = (x.new_zeros(x.shape[1], self.hidden_size),) * len(kind.cell.state)
        ys = []
        for from_x_t in from_x.unbind(0):
            states = advance(TORCH, kind, w, from_x_t, states)
            ys.append(states[0])
        finals = tuple(value.unsqueeze(0) for value in states)
        return torch.stack(ys), finals if len(finals) > 1 else finals[0]


def make_problem(name: str, case: Case, mode: str, single: bool, input_grad: bool) -> Problem:
    """Makes a problem with random weights and values, whose module is a `Loop`."""
    torch.manual_seed(0)
    T, B, I, H = case
    cell = KINDS[name].cell
    x = torch.randn(T, B, I)
    if not single:
        loop = Loop(name, rnnfast.Layer(cell, I, H))
        return Problem(loop, x, torch.randn(T, B, H), mode, input_grad)
    # positive, as the normaliser of an sLSTM is
    state = tuple(torch.rand(B, H) + 0.5 for _ in cell.state)
    loop = Loop(name, rnnfast.LayerCell(cell, I, H))
    return Problem(loop, x, torch.randn(B, H), mode, input_grad, state)
