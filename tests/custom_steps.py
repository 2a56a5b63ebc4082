"""Steps of cells as users write them, for the tests of rnnfast.custom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class Case(NamedTuple):
    name: str
    step: Callable[..., Any]
    gates: int
    states: tuple[str, ...] = ("h",)
    parameters: tuple[str, ...] = ()
    saved: int | None = None
    """At most so many blocks are saved."""
    direct: bool | None = None
    reads_h: bool | None = None


def lstm(x, h, state):
    i = torch.sigmoid(x[0] + h[0])
    f = torch.sigmoid(x[1] + h[1])
    g = torch.tanh(x[2] + h[2])
    o = torch.sigmoid(x[3] + h[3])
    c = f * state.c + i * g
    return o * torch.tanh(c), c


def gru(x, h, state):
    r = torch.sigmoid(x[0] + h[0])
    z = torch.sigmoid(x[1] + h[1])
    n = torch.tanh(x[2] + r * h[2])
    return (1 - z) * n + z * state.h


def elman_tanh(x, h, state):
    return torch.tanh(x[0] + h[0])


def elman_relu(x, h, state):
    return torch.relu(x[0] + h[0])


def ligru(x, h, state):
    z = torch.sigmoid(x[0] + h[0])
    a = torch.relu(x[1] + h[1])
    return z * state.h + (1 - z) * a


def peephole(x, h, state, parameters):
    i = torch.sigmoid(x[0] + h[0] + parameters.p_i * state.c)
    f = torch.sigmoid(x[1] + h[1] + parameters.p_f * state.c)
    c = f * state.c + i * torch.tanh(x[2] + h[2])
    o = torch.sigmoid(x[3] + h[3] + parameters.p_o * c)
    return o * torch.tanh(c), c


def coupled(x, h, state):
    f, g, o = (a + b for a, b in zip(x, h, strict=True))
    f = f.sigmoid()
    c = torch.lerp(torch.tanh(g), state.c, f)
    return o.sigmoid() * c.tanh(), c


def slstm(x, h, state):
    i = x[0] + h[0]
    log_f = F.logsigmoid(x[1] + h[1])
    m = torch.maximum(log_f + state.m, i)
    i, f = torch.exp(i - m), torch.exp(log_f + state.m - m)
    c = f * state.c + i * torch.tanh(x[2] + h[2])
    n = f * state.n + i
    return torch.sigmoid(x[3] + h[3]) * c / n.clamp(min=1e-6), c, n, m


KEEP = torch.tensor(0.125)


def zoneout(x, h, state):
    new_h, new_c = lstm(x, h, state)
    return KEEP * state.h + (1 - KEEP) * new_h, 0.5 * state.c + 0.5 * new_c


def feedforward(x, h, state):
    return torch.sigmoid(x[0]) * state.h + x[1]


def unchanged(x, h, state):
    return torch.tanh(x[0] + h[0] * state.c), state.c


def unused_gate(x, h, state):
    return torch.tanh(x[0] + h[1]) * state.h


def constants(x, h, state):
    return torch.full_like(x[0], 0.5), torch.zeros_like(state.c)


def only_parameter(x, h, state, parameters):
    return parameters.p * 2


def stopped(x, h, state):
    return torch.tanh(x[0] + h[0]) * torch.sigmoid(state.h).detach()


def limits(x, h, state):
    s = x[0] + h[0]
    low = torch.where(s > 1, float("inf"), s).clamp(-2, 2)
    return low + torch.where(s == s, 0.25, float("nan")) + s.masked_fill(s < 0, -0.5)


def masks(x, h, state):
    a, b = x[0] > h[0], state.h >= 0
    s = (a & ~b) * x[0] + torch.logical_xor(a, b).to(x[0].dtype) * h[0]
    return torch.where((a | b) & (x[0] != h[0]), s, 1 / (2 + s * s)) + (x[0] <= 0) * s


def activations(x, h, state, parameters):
    a, b = x[0], h[0]
    parts = [
        *(F.relu6(a), F.elu(b), F.celu(a, 0.5), F.selu(b), F.silu(a), F.gelu(a), F.mish(a)),
        *(F.gelu(b, approximate="tanh"), F.softplus(a), F.logsigmoid(b), F.hardtanh(a)),
        *(F.hardsigmoid(a), F.hardswish(b), F.leaky_relu(a, 0.1), F.softsign(b), F.tanhshrink(a)),
    ]
    return sum(0.1 * k * part for k, part in enumerate(parts, 1)) * parameters.p


def arithmetic(x, h, state, parameters):
    a, b, p = x[0], h[0], parameters.p
    q = a.square() + 1
    parts = [
        *(a**3, q**-1, q**0.5, q**-0.5, q.sqrt(), q.rsqrt(), q.log(), (q - 1).log1p()),
        *(a.expm1(), b.exp(), a.abs(), b.sign(), a.sin(), b.cos(), a.erf(), -b, q.reciprocal()),
        *(torch.maximum(a, b), torch.minimum(a, p), torch.clip(a, max=b), a.clamp(min=b)),
        *(torch.logaddexp(a, b), torch.addcmul(a, b, p, value=0.5), torch.addcdiv(a, b, q)),
        *(torch.add(a, b, alpha=2), torch.sub(1.5, b), 3 - a, 2 / q, b / 4, torch.rsub(a, b)),
    ]
    return sum(0.1 * k * part for k, part in enumerate(parts, 1)) * state.h


CASES = {
    case.name: case
    for case in (
        Case("lstm", lstm, 4, ("h", "c"), saved=4, direct=False, reads_h=False),
        Case("gru", gru, 3, saved=4, direct=True, reads_h=False),
        Case("elman_tanh", elman_tanh, 1, saved=0, direct=False, reads_h=True),
        Case("elman_relu", elman_relu, 1, saved=0, direct=False, reads_h=True),
        Case("ligru_like", ligru, 2, saved=2, direct=True),
        Case("peephole", peephole, 4, ("h", "c"), ("p_i", "p_f", "p_o"), saved=4),
        Case("coupled", coupled, 3, ("h", "c"), saved=3),
        Case("slstm", slstm, 4, ("h", "c", "n", "m")),
        Case("zoneout", zoneout, 4, ("h", "c"), direct=True),
        Case("feedforward", feedforward, 2, saved=1),
        Case("unchanged", unchanged, 1, ("h", "c")),
        Case("unused gate", unused_gate, 2),
        Case("constants", constants, 1, ("h", "c"), saved=0),
        Case("only parameter", only_parameter, 1, ("h",), ("p",), saved=0),
        Case("stopped", stopped, 1, direct=True),
        Case("limits", limits, 1),
        Case("masks", masks, 1),
        Case("activations", activations, 1, ("h",), ("p",)),
        Case("arithmetic", arithmetic, 1, ("h",), ("p",)),
    )
}
