"""The cells of rnnfast.custom.library by other definitions than the library's."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

I, H = 4, 5  # inputs and units

Weights = dict[str, Tensor]
States = list[Tensor]
Definition = Callable[[Weights, Tensor, States], tuple[Tensor, States]]
"""From the weights of a layer, its input (T, B, I) and states (B, H): its output and new states."""


def gates_of_x(w: Weights, x: Tensor, count: int) -> tuple[Tensor, ...]:
    return (x @ w["weight_ih"].T + w["bias_ih"]).chunk(count, -1)


def steps(
    w: Weights, x: Tensor, states: States, step: Callable[..., tuple[Tensor, ...]]
) -> tuple[Tensor, States]:
    """Calls ``step(gates, *states)`` for each time, with one tensor for all gates."""
    outputs = []
    for x_t in x:
        parts = x_t @ w["weight_ih"].T + w["bias_ih"]
        if "weight_hh" in w:
            parts = parts + states[0] @ w["weight_hh"].T + w["bias_hh"]
        states = list(step(parts, *states))
        outputs.append(states[0])
    return torch.stack(outputs), states


def with_torch(kind: type[nn.Module], w: Weights, x: Tensor, states: States, **options: str):
    """Runs a layer of torch.nn whose weights are computed from those of the cell."""
    module = kind(I, H, dtype=x.dtype, **options)
    w = {f"{name}_l0": tensor for name, tensor in w.items()}
    hx = tuple(state.unsqueeze(0) for state in states)
    y, finals = torch.func.functional_call(module, w, (x, hx if len(hx) > 1 else hx[0]))
    return y, [final[0] for final in (finals if len(hx) > 1 else [finals])]


def peephole_lstm(w: Weights, x: Tensor, states: States):
    def step(parts: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        i, f, g, o = parts.chunk(4, -1)
        new = c * (f + torch.diag(w["p_f"]).matmul(c.T).T).sigmoid()
        new = new + g.tanh() * (i + torch.diag(w["p_i"]).matmul(c.T).T).sigmoid()
        return new.tanh() * (o + torch.diag(w["p_o"]).matmul(new.T).T).sigmoid(), new

    return steps(w, x, states, step)


def coupled_lstm(w: Weights, x: Tensor, states: States):
    """sigmoid(-a) is 1 - sigmoid(a)."""
    w = {name: torch.cat([-tensor[:H], tensor]) for name, tensor in w.items()}
    return with_torch(nn.LSTM, w, x, states)


def hard_lstm(w: Weights, x: Tensor, states: States):
    def step(parts: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        i, f, g, o = parts.chunk(4, -1)
        i, f, o = (F.hardtanh(a / 2.5) / 2 + 0.5 for a in (i, f, o))
        c = f * c + i * g.tanh()
        return o * c.tanh(), c

    return steps(w, x, states, step)


def normalised(parts: Tensor, w: Weights, eps: float) -> Tensor:
    parts = parts - parts.mean(-1, keepdim=True)
    parts = parts / (parts.square().mean(-1, keepdim=True) + eps).sqrt()
    return parts * w["norm_weight"] + w["norm_bias"]


def layer_norm_lstm(w: Weights, x: Tensor, states: States):
    def step(parts: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        i, f, g, o = normalised(parts, w, 1e-5).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    return steps(w, x, states, step)


def slstm(w: Weights, x: Tensor, states: States):
    """Without the stabiliser: m is 0, and exp may overflow."""

    def step(parts: Tensor, h: Tensor, c: Tensor, n: Tensor) -> tuple[Tensor, ...]:
        i, f, z, o = parts.chunk(4, -1)
        c = f.sigmoid() * c + i.exp() * z.tanh()
        n = f.sigmoid() * n + i.exp()
        return o.sigmoid() * c / n, c, n

    h, c, n, m = states
    y, (h, c, n) = steps(w, x, [h, c * m.exp(), n * m.exp()], step)
    return y, [h, c, n, torch.zeros_like(m)]


def janet(w: Weights, x: Tensor, states: States):
    """As the authors' program has it."""

    def step(parts: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        f, j = parts.chunk(2, -1)
        return (h * f.sigmoid() + torch.sigmoid(1 - f) * j.tanh(),)

    return steps(w, x, states, step)


def ugrnn(w: Weights, x: Tensor, states: States):
    """A GRU whose reset gate is 1."""
    w = {name: F.pad(t, (0, 0) * (t.dim() - 1) + (H, 0)) for name, t in w.items()}
    w["bias_ih"] = w["bias_ih"] + torch.cat([torch.full((H,), 100.0), torch.zeros(2 * H)])
    return with_torch(nn.GRU, w, x, states)


def light_gru(w: Weights, x: Tensor, states: States):
    """As SpeechBrain computes it: the input's part for all steps first."""
    parts, (h,), outputs = F.linear(x, w["weight_ih"], w["bias_ih"]), states, []
    for part in parts:
        a, z = (part + F.linear(h, w["weight_hh"], w["bias_hh"])).chunk(2, 1)
        z = z.sigmoid()
        h = z * h + (1 - z) * a.relu()
        outputs.append(h)
    return torch.stack(outputs), [h]


def layer_norm_gru(w: Weights, x: Tensor, states: States):
    """As Dreamer has it: one matrix for the input and the state, and torch's normalisation."""
    layer, bias = torch.cat([w["weight_ih"], w["weight_hh"]], 1), w["bias_ih"] + w["bias_hh"]
    (state,), outputs = states, []
    for x_t in x:
        parts = F.linear(torch.cat([x_t, state], -1), layer, bias)
        parts = F.layer_norm(parts, (3 * H,), w["norm_weight"], w["norm_bias"], eps=1e-3)
        reset, candidate, update = torch.split(parts, [H] * 3, -1)
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        update = torch.sigmoid(update - 1)
        state = update * candidate + (1 - update) * state
        outputs.append(state)
    return torch.stack(outputs), [state]


def in_log_space(log_kept: Tensor, log_new: Tensor, h: Tensor) -> tuple[Tensor, States]:
    """The scan of Feng et al., appendix B: h' = exp(log_kept) * h + exp(log_new)."""
    sums = F.pad(log_kept.cumsum(0), (0, 0, 0, 0, 1, 0))
    values = torch.cat([h.log().unsqueeze(0), log_new]) - sums
    y = (sums + values.logcumsumexp(0)).exp()[1:]
    return y, [y[-1]]


def log_g(a: Tensor) -> Tensor:
    return torch.where(a >= 0, (F.relu(a) + 0.5).log(), -F.softplus(-a))


def min_gru(w: Weights, x: Tensor, states: States):
    z, n = gates_of_x(w, x, 2)
    return in_log_space(-F.softplus(z), -F.softplus(-z) + log_g(n), states[0])


def min_lstm(w: Weights, x: Tensor, states: States):
    f, i, n = gates_of_x(w, x, 3)
    difference = F.softplus(-f) - F.softplus(-i)
    log_new = -F.softplus(-difference) + log_g(n)
    return in_log_space(-F.softplus(difference), log_new, states[0])


def ind_rnn(w: Weights, x: Tensor, states: States):
    """An Elman network whose W_hh is diagonal."""
    own = {"weight_hh": torch.diag(w["u"]), "bias_hh": torch.zeros_like(w["u"])}
    own |= {name: w[name] for name in ("weight_ih", "bias_ih")}
    return with_torch(nn.RNN, own, x, states, nonlinearity="relu")


def sru(w: Weights, x: Tensor, states: States):
    def step(parts: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        new, forget, reset, highway = parts.chunk(4, -1)
        forget = torch.sigmoid(forget + w["v_f"] * c)
        reset = torch.sigmoid(reset + w["v_r"] * c)
        c = new + (c - new) * forget
        return highway + (c - highway) * reset, c

    return steps(w, x, states, step)


def qrnn(w: Weights, x: Tensor, states: States):
    """c_t is the sum of (1 - f_s) z_s over s, each times all f between s and t."""
    z, f, o = gates_of_x(w, x, 3)
    f, o = f.sigmoid(), o.sigmoid()
    terms = [states[1], *((1 - f) * z.tanh())]
    cells = torch.stack(
        [
            sum(terms[s] * f[s : t + 1].prod(0) for s in range(t + 1)) + terms[t + 1]
            for t in range(len(x))
        ]
    )
    return o * cells, [(o * cells)[-1], cells[-1]]


def zoneout_lstm(w: Weights, x: Tensor, states: States):
    def step(parts: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        i, f, g, o = parts.chunk(4, -1)
        new = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return torch.lerp(o.sigmoid() * new.tanh(), h, 0.1), torch.lerp(new, c, 0.3)

    return steps(w, x, states, step)


DEFINITIONS: dict[str, Definition] = {
    each.__name__: each
    for each in (
        *(peephole_lstm, coupled_lstm, hard_lstm, layer_norm_lstm, slstm, janet, ugrnn, light_gru),
        *(layer_norm_gru, min_gru, min_lstm, ind_rnn, sru, qrnn, zoneout_lstm),
    )
}
