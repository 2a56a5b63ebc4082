"""Cells whose gates are normalised, and cells without recurrent weights, beside plain loops."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import dtype_name
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast


class Case(NamedTuple):
    """A cell, and the same step of gates, states and learnable vectors in one list each."""

    cell: rnnfast.custom.CustomCell
    step: Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]


@rnnfast.cell(gates=3, norm="layer", eps=1e-3)
def dreamer_gru(gates: Any, state: Any) -> Any:
    reset, candidate = torch.sigmoid(gates[0]), gates[1]
    update = torch.sigmoid(gates[2] - 1)
    return update * torch.tanh(reset * candidate) + (1 - update) * state.h


@rnnfast.cell(gates=4, state=("h", "c"), norm="layer", parameters=("p",))
def norm_lstm(gates: Any, state: Any, parameters: Any) -> Any:
    i, f, g, o = gates
    c = torch.sigmoid(f) * state.c + torch.sigmoid(i) * torch.tanh(g) + parameters.p * state.h
    return torch.sigmoid(o) * torch.tanh(c), c


@rnnfast.cell(gates=1, norm="layer")
def norm_rnn(gates: Any, state: Any) -> Any:
    return torch.tanh(gates[0])


@rnnfast.cell(gates=2, recurrent=False)
def min_gru(x: Any, state: Any) -> Any:
    z = torch.sigmoid(x[0])
    return (1 - z) * state.h + z * torch.where(x[1] >= 0, x[1] + 0.5, torch.sigmoid(x[1]))


@rnnfast.cell(gates=1, recurrent=False, parameters={"u": 0.7})
def ind_rnn(x: Any, state: Any, parameters: Any) -> Any:
    return torch.relu(x[0] + parameters.u * state.h)


@rnnfast.cell(gates=3, state=("h", "c", "n"), recurrent=False)
def three_states(x: Any, state: Any) -> Any:
    i, f = torch.sigmoid(x[0]), torch.sigmoid(x[1])
    c, n = f * state.c + i * torch.tanh(x[2]), f * state.n + i
    return c / (n.abs() + 1), c, n


@rnnfast.cell(gates=2, recurrent=False, norm="layer")
def norm_min_gru(gates: Any, state: Any) -> Any:
    z = torch.sigmoid(gates[0])
    return (1 - z) * state.h + z * gates[1]


def lstm_of(g: Sequence[Tensor], s: Sequence[Tensor], p: Sequence[Tensor]) -> list[Tensor]:
    c = g[1].sigmoid() * s[1] + g[0].sigmoid() * g[2].tanh() + p[0] * s[0]
    return [g[3].sigmoid() * c.tanh(), c]


def dreamer_of(g: Sequence[Tensor], s: Sequence[Tensor], p: Sequence[Tensor]) -> list[Tensor]:
    update = (g[2] - 1).sigmoid()
    return [torch.lerp(s[0], (g[0].sigmoid() * g[1]).tanh(), update)]


def min_gru_of(g: Sequence[Tensor], s: Sequence[Tensor], p: Sequence[Tensor]) -> list[Tensor]:
    candidate = F.relu(g[1]) + torch.minimum(g[1], torch.zeros(())).sigmoid()
    return [torch.lerp(s[0], candidate, g[0].sigmoid())]


def three_of(g: Sequence[Tensor], s: Sequence[Tensor], p: Sequence[Tensor]) -> list[Tensor]:
    c = g[1].sigmoid() * s[1] + g[0].sigmoid() * g[2].tanh()
    n = g[1].sigmoid() * s[2] + g[0].sigmoid()
    return [c / (n.abs() + 1), c, n]


CASES = {
    "dreamer_gru": Case(dreamer_gru, dreamer_of),
    "norm_lstm": Case(norm_lstm, lstm_of),
    "norm_rnn": Case(norm_rnn, lambda g, s, p: [g[0].tanh()]),
    "min_gru": Case(min_gru, min_gru_of),
    "ind_rnn": Case(ind_rnn, lambda g, s, p: [(g[0] + p[0] * s[0]).relu()]),
    "three_states": Case(three_states, three_of),
    "norm_min_gru": Case(norm_min_gru, lambda g, s, p: [torch.lerp(s[0], g[1], g[0].sigmoid())]),
}
# of each dtype: the allowed error beside the largest value
BOUNDS = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.bfloat16: 0.1,
    torch.float16: 0.02,
}


def make(case: Case, inputs: int, hidden: int, **options: Any) -> rnnfast.Layer:
    layer = rnnfast.Layer(case.cell, inputs, hidden, backend="fused", **options)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("norm"):
                parameter.uniform_(0.5, 1.5)
    return layer


def loop(
    case: Case, layer: rnnfast.Layer, x: Tensor, states: Sequence[Tensor], lengths: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """One layer of both directions if it has them, in plain PyTorch."""
    outputs, finals = [], []
    for direction, suffix in enumerate(("_l0", "_l0_reverse")[: 1 + layer.bidirectional]):
        own = {
            name[: -len(suffix)]: p for name, p in layer.named_parameters() if name.endswith(suffix)
        }
        vectors = [own[name] for name in case.cell.parameter_names]
        current = [state[direction] for state in states]
        y: list[Tensor] = [torch.empty(0)] * len(x)
        for t in reversed(range(len(x))) if direction else range(len(x)):
            gates = x[t] @ own["weight_ih"].T + own["bias_ih"]
            if case.cell.recurrent:
                gates = gates + current[0] @ own["weight_hh"].T + own["bias_hh"]
            if case.cell.norm_eps is not None:
                centred = gates - gates.mean(-1, keepdim=True)
                variance = centred.square().mean(-1, keepdim=True)
                gates = centred / (variance + case.cell.norm_eps).sqrt()
                gates = gates * own["norm_weight"] + own["norm_bias"]
            following = case.step(gates.chunk(case.cell.gates, -1), current, vectors)
            runs = torch.tensor([t < length for length in lengths]).unsqueeze(1)
            current = [
                torch.where(runs, new, old) for new, old in zip(following, current, strict=True)
            ]
            y[t] = torch.where(runs, following[0], 0)
        outputs.append(torch.stack(y))
        finals.append(current)
    return torch.cat(outputs, -1), [torch.stack(state) for state in zip(*finals, strict=True)]


def check(
    case: Case,
    layer: rnnfast.Layer,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    lengths: Sequence[int] | None = None,
) -> None:
    """Compares outputs, final states and all gradients with those of the loop in float64."""
    steps, batch, inputs, hidden = shape
    directions = 1 + layer.bidirectional
    x = torch.randn(steps, batch, inputs, dtype=dtype, requires_grad=True)
    states = [
        torch.randn(directions, batch, hidden, dtype=dtype, requires_grad=True)
        for _ in case.cell.state
    ]
    exact = copy.deepcopy(layer).double()
    exact_x, *exact_states = (t.detach().double().requires_grad_() for t in (x, *states))

    hx = states[0] if len(states) == 1 else tuple(states)
    y, finals = layer(x, hx, lengths=lengths)
    finals = list(finals) if isinstance(finals, tuple) else [finals]
    expected, expected_finals = loop(case, exact, exact_x, exact_states, lengths or [steps] * batch)
    weights = [torch.randn_like(t) for t in (expected, *expected_finals)]

    def gradients(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
        total = sum((o * w.to(o.dtype)).sum() for o, w in zip(outputs, weights, strict=True))
        return list(torch.autograd.grad(total, inputs, materialize_grads=True))

    got = [y, *finals, *gradients([y, *finals], [x, *states, *layer.parameters()])]
    wanted = [
        expected,
        *expected_finals,
        *gradients([expected, *expected_finals], [exact_x, *exact_states, *exact.parameters()]),
    ]
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype is dtype
        bound = BOUNDS[dtype] * max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=bound)


# One cell of each kind, for each has to be compiled; the others run in the long suite.
FEW = ("dreamer_gru", "norm_lstm", "min_gru", "three_states")
NAMES = [name if name in FEW else pytest.param(name, marks=pytest.mark.full) for name in CASES]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(4, 3, 5, 1), (6, 5, 7, 13), (3, 20, 9, 40), (5, 1, 3, 70)])
def test_values_and_gradients(name: str, shape: tuple[int, int, int, int]) -> None:
    torch.manual_seed(0)
    layer = make(CASES[name], *shape[2:], dtype=torch.float64, bidirectional=shape[1] == 5)
    check(CASES[name], layer, shape, torch.float64)


@pytest.mark.parametrize(
    "name",
    ["dreamer_gru", *(pytest.param(n, marks=pytest.mark.full) for n in ("norm_lstm", "min_gru"))],
)
@pytest.mark.parametrize("dtype", list(BOUNDS)[1:], ids=dtype_name)
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shape = (6, 9, 5, 37)
    check(CASES[name], make(CASES[name], *shape[2:], dtype=dtype), shape, dtype)


@pytest.mark.parametrize("name", NAMES)
def test_lengths(name: str) -> None:
    torch.manual_seed(0)
    shape = (6, 4, 5, 19)
    layer = make(CASES[name], *shape[2:], dtype=torch.float64, bidirectional=True)
    check(CASES[name], layer, shape, torch.float64, [2, 6, 0, 3])


@pytest.mark.parametrize("name", ["norm_lstm", "three_states"])
def test_packed_and_reset_like_the_reference(name: str) -> None:
    torch.manual_seed(0)
    layer = make(CASES[name], 5, 19, dtype=torch.float64, num_layers=2)
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    packed = pack_padded_sequence(x, [6, 5, 5, 2])
    reset = torch.rand(6, 4) < 0.3
    for arguments in ({"input": packed}, {"input": x, "reset": reset}):
        results = []
        for backend in ("fused", "reference"):
            layer.backend = backend
            output, finals = layer(**arguments)
            results.append([getattr(output, "data", output), *finals])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_a_single_step_is_the_first_of_a_sequence(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    layer = make(case, 5, 19, dtype=torch.float64)
    step = rnnfast.LayerCell(case.cell, 5, 19, dtype=torch.float64, backend="fused")
    step.load_state_dict({key[:-3]: value for key, value in layer.state_dict().items()})
    x, *states = (torch.randn(3, n, dtype=torch.float64) for n in (5, *[19] * len(case.cell.state)))
    hx = states[0] if len(states) == 1 else tuple(states)
    expected = layer(x.unsqueeze(0), torch.utils._pytree.tree_map(lambda t: t.unsqueeze(0), hx))[1]
    results = step(x, hx)
    for ours, theirs in zip(
        results if isinstance(results, tuple) else [results],
        expected if isinstance(expected, tuple) else [expected],
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs.squeeze(0))


@pytest.mark.parametrize("name", ["dreamer_gru", "three_states"])
def test_second_derivatives_and_compiled_code(name: str) -> None:
    torch.manual_seed(0)
    layer = make(CASES[name], 3, 4, dtype=torch.float64)
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], x)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], layer(x)[0])


def test_the_same_bits_on_any_number_of_threads() -> None:
    torch.manual_seed(0)
    layer, x = make(CASES["dreamer_gru"], 30, 200), torch.randn(20, 5, 30)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            layer.zero_grad()
            y, _ = layer(x)
            y.square().sum().backward()
            results.append([y.detach(), *(p.grad.clone() for p in layer.parameters())])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_recompute() -> None:
    torch.manual_seed(0)
    for name in ("norm_lstm", "three_states"):
        layer = make(CASES[name], 5, 19, dtype=torch.float64, recompute=True)
        check(CASES[name], layer, (6, 4, 5, 19), torch.float64)


def test_parameters_and_options() -> None:
    layer = rnnfast.Layer(dreamer_gru, 5, 7, num_layers=2)
    assert layer.norm_weight_l1.tolist() == [1.0] * 21
    assert layer.norm_bias_l0.tolist() == [0.0] * 21
    names = [name for name, _ in rnnfast.Layer(ind_rnn, 5, 7).named_parameters()]
    assert names == ["weight_ih_l0", "bias_ih_l0", "u_l0"]
    assert rnnfast.LayerCell(ind_rnn, 5, 7).u.tolist() == pytest.approx([0.7] * 7)
    with pytest.raises(ValueError, match="norm should be None or 'layer', got 'batch'"):
        rnnfast.cell(gates=1, norm="batch")
    with pytest.raises(ValueError, match="eps should be positive, got 0"):
        rnnfast.cell(gates=1, norm="layer", eps=0)
    with pytest.raises(ValueError, match=r"called with \(x, state\)"):
        rnnfast.cell(gates=1, recurrent=False)(lambda x, h, state: x[0])
    with pytest.raises(ValueError, match=r"gates\[1\] is beyond the gates"):
        rnnfast.cell(gates=1, norm="layer")(lambda gates, state: gates[1])
