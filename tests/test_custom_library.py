"""The cells of rnnfast.custom.library, beside definitions that are written in another way."""

from __future__ import annotations

import re

import pytest
import torch
from library_definitions import DEFINITIONS, H, I, States
from torch import nn

import rnnfast
from rnnfast.custom import CustomCell, library

T, B = 6, 3

COMPILED = ("peephole_lstm", "layer_norm_gru", "slstm", "ind_rnn")
"""The cells whose kernels the default tests compile: each is of another kind."""


def cell_of(name: str) -> CustomCell:
    found = getattr(library, name)
    return found if isinstance(found, CustomCell) else found(0.1, 0.3)


def comparable(name: str, states: States) -> States:
    """The parts of the states that do not depend on how they are scaled."""
    if name != "slstm":
        return states
    h, c, n, m = states
    return [h, c / n, n.log() + m]


def check(name: str, dtype: torch.dtype, backend: str) -> None:
    """Compares values and gradients with those of the definition in float64."""
    cell = cell_of(name)
    layer = rnnfast.Layer(cell, I, H, dtype=dtype, backend=backend)
    for parameter in layer.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    x = torch.randn(T, B, I, dtype=dtype)
    states = [torch.randn(B, H, dtype=dtype) for _ in cell.state]
    if name in ("slstm", "min_gru", "min_lstm"):  # n, and h in log space, are positive
        place = 2 if name == "slstm" else 0
        states[place] = states[place].abs() + 0.5
    inputs = [x.requires_grad_(), *(state.requires_grad_() for state in states)]

    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    w = {
        key.removesuffix("_l0"): parameter.detach().double().requires_grad_()
        for key, parameter in layer.named_parameters()
    }
    y, finals = DEFINITIONS[name](w, wide[0], wide[1:])
    want = [y, *comparable(name, finals)]

    hx = tuple(state.unsqueeze(0) for state in states)
    y, last = layer(x, hx if len(hx) > 1 else hx[0])
    got = [y, *comparable(name, [final[0] for final in (last if len(hx) > 1 else [last])])]

    factors = [torch.randn_like(tensor) for tensor in want]
    for results, leaves in ((want, [*wide, *w.values()]), (got, [*inputs, *layer.parameters()])):
        loss = sum((a.double() * b).sum() for a, b in zip(results, factors, strict=True))
        results += torch.autograd.grad(loss, leaves, materialize_grads=True)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}[dtype]
    for ours, theirs in zip(got, want, strict=True):
        close = {"rtol": tolerance, "atol": tolerance * max(1.0, theirs.abs().max().item())}
        torch.testing.assert_close(ours, theirs.to(dtype), **close)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_cell_computes_its_definition(name: str) -> None:
    check(name, torch.float64, "reference")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            name,
            dtype,
            marks=[] if name in COMPILED and dtype is torch.float32 else [pytest.mark.full],
            id=f"{name}-{dtype}",
        )
        for name in DEFINITIONS
        for dtype in (torch.float32, torch.float64)
    ],
)
def test_kernels_compute_the_definition(name: str, dtype: torch.dtype) -> None:
    check(name, dtype, "fused")


def test_table_describes_the_cells() -> None:
    table = re.findall(r"^``(\w+)[^`]*`` +(.*)$", library.__doc__ or "", re.MULTILINE)
    assert sorted(name for name, _ in table) == sorted(library.__all__) == sorted(DEFINITIONS)
    for name, row in table:
        cell = cell_of(name)
        gates, states, parameters, *_ = re.split(r"  +", row)
        assert (len(gates.split()), tuple(states.split(", "))) == (cell.gates, cell.state), name
        assert cell.norm_eps is None or parameters == "(of the norm)"
        assert not cell.parameters or tuple(parameters.split(", ")) == cell.parameter_names


def test_first_values_of_parameters_make_plain_cells() -> None:
    lstm, layer = nn.LSTM(I, H), rnnfast.Layer(library.peephole_lstm, I, H, backend="reference")
    layer.load_state_dict(lstm.state_dict(), strict=False)
    x = torch.randn(T, B, I)
    torch.testing.assert_close(layer(x)[0], lstm(x)[0])
    assert library.zoneout_lstm(0.1, 0.3) == library.zoneout_lstm(0.1, 0.3)
    assert library.zoneout_lstm(0.1, 0.3) != library.zoneout_lstm(0.3, 0.1)
    with pytest.raises(ValueError, match="zoneout_c should be a probability between 0 and 1"):
        library.zoneout_lstm(0, 1.5)


@pytest.mark.parametrize("size", [0.0, 90.0, 1e4])
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("slstm", "reference"),
        ("slstm", "fused"),
        ("min_lstm", "reference"),
        pytest.param("min_lstm", "fused", marks=pytest.mark.full),
    ],
)
def test_large_gates_neither_overflow_nor_vanish(name: str, backend: str, size: float) -> None:
    layer = rnnfast.Layer(cell_of(name), I, H, backend=backend)
    for sign in (-size, size, -size):
        with torch.no_grad():
            layer.bias_ih_l0[: 2 * H] = sign
            layer.bias_ih_l0[2 * H : 3 * H] = 0.3
        layer.zero_grad()
        y, _ = layer(torch.zeros(T, B, I))
        y.sum().backward()
        assert y.isfinite().all()
        assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    if name == "min_lstm":  # f and i are equal, so h goes half of the way to g(0.3) = 0.8
        torch.testing.assert_close(y[:, 0, 0], 0.8 * (1 - 0.5 ** torch.arange(1.0, T + 1)))
