"""What int8 weights round, and what they do not.

The oracle rounds weights, inputs and states as the kernels do: see `int8_oracle`.
"""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from frozen_cases import (
    SIZES,
    assert_near,
    bound_of,
    row_steps,
)
from targets import FROZEN, check_on, running_on
from torch import Tensor, nn

import rnnfast
from rnnfast.frozen import FrozenLayers
from rnnfast.reference import CELLS


def rounded_rows(rows: Tensor) -> Tensor:
    """Rows as the kernels quantise them: to steps of their largest number."""
    scale = rows.abs().amax(-1, keepdim=True) / row_steps()
    return torch.where(scale > 0, (rows / scale).round() * scale, 0)


def int8_oracle(module: nn.Module, frozen: FrozenLayers, x: Tensor) -> Tensor:
    """A layer in float64 with rounded weights, inputs and states."""
    cell = CELLS["lstm" if module.mode == "LSTM" else "gru"]
    w = {name: (each.dense().double(), each.bias) for name, each in frozen.unpacked().items()}
    w_ih, b_ih = w["weight_ih_l0"]
    w_hh, b_hh = w["weight_hh_l0"]
    states = (torch.zeros(x.shape[1], module.hidden_size, dtype=torch.double),) * cell.states
    outputs = []
    for x_t in x.double():
        gates_x = rounded_rows(x_t) @ w_ih.T + b_ih.double()
        gates_h = rounded_rows(states[0]) @ w_hh.T + b_hh.double()
        states = cell.step(gates_x, gates_h, *states)
        outputs.append(states[0])
    return torch.stack(outputs)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_int8_is_exact_but_for_what_it_rounds(kind: type[nn.Module]) -> None:
    for T, B, I, H in SIZES:
        module, x = kind(I, H).requires_grad_(False), torch.randn(T, B, I)

        def check(_: str, module: nn.Module = module, x: Tensor = x) -> None:
            frozen = rnnfast.freeze(module, "int8")
            # A state may be rounded to the other side, which is worth a step of one weight.
            assert_near(frozen(x)[0], int8_oracle(module, frozen, x), 2e-4)

        check_on(FROZEN, check)


def test_int8_does_not_saturate() -> None:
    """Sums of as many and as large integers as there can be, over several chains of them."""
    for K in (4095, 4096, 4097, 9001, 131072, 131073, 140001):
        cell = nn.RNNCell(K, 3, bias=False, nonlinearity="relu").requires_grad_(False)
        cell.weight_ih[0], cell.weight_ih[1], cell.weight_ih[2] = 1, -1, 0.5
        x = torch.ones(2, K)
        x[1, ::2] = -1

        def check(_: str, K: int = K, x: Tensor = x, cell: nn.Module = cell) -> None:
            result = rnnfast.freeze(cell, "int8")(x)
            odd = K % 2
            expected = torch.tensor([[K, 0, K / 2], [0, odd, 0]])
            torch.testing.assert_close(result, expected.float(), rtol=1e-6, atol=2e-4)

        check_on(FROZEN, check)


def test_int8_error_after_200_steps() -> None:
    """At most what the most exact int8 layer of others loses: 1.4 % of the outputs."""
    for kind, (H, B) in product((nn.LSTM, nn.GRU), ((64, 4), (512, 2))):
        module, x = kind(H, H), torch.randn(200, B, H)
        (row,) = rnnfast.quantize_error(module, x)
        assert 1e-5 < row.relative < 0.014


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_int8_row_that_is_not_finite(value: float) -> None:
    """It gives what float32 gives, and no other row changes."""
    module = nn.LSTM(40, 36).requires_grad_(False)
    x = torch.randn(3, 7, 40)
    x[1, 2, 5] = value

    def check(_: str) -> None:
        frozen, bound = rnnfast.freeze(module, "int8"), bound_of("int8")
        dense = copy.deepcopy(module)
        dense.load_state_dict(
            {**module.state_dict(), **{n: w.dense() for n, w in frozen.unpacked().items()}}
        )
        found, expected = frozen(x)[0], dense(x)[0]
        torch.testing.assert_close(found, expected, rtol=bound, atol=bound, equal_nan=True)
        others = [0, 1, 3, 4, 5, 6]
        assert torch.equal(found[:, others], frozen(x[:, others])[0])
        h = torch.zeros(1, 7, 36)
        h[0, 3, 1] = value
        found, expected = (m(x[:1], (h, torch.zeros(1, 7, 36)))[0] for m in (frozen, dense))
        torch.testing.assert_close(found, expected, rtol=bound, atol=bound, equal_nan=True)

    check_on(FROZEN, check)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_int8_weights_that_are_not_finite(value: float) -> None:
    cell = nn.RNNCell(5, 6).requires_grad_(False)
    cell.weight_ih[2, 3] = value
    result = rnnfast.freeze(cell, "int8")(torch.randn(4, 5))
    assert result[:, 2].isnan().all()
    assert result[:, [0, 1, 3, 4, 5]].isfinite().all()


def test_rows_without_a_scale() -> None:
    """Zeros, and numbers too small to be divided by."""
    cell = nn.RNNCell(5, 4, bias=False).requires_grad_(False)
    cell.weight_ih[0] = 0
    cell.weight_ih[1] = 1e-44
    x = torch.randn(3, 5)
    x[1], x[2] = 0, 1e-40
    for name in FROZEN:
        with running_on(name):
            result = rnnfast.freeze(cell, "int8")(x)
            assert result[:, :2].abs().max() < 1e-30
            assert result[1:].abs().max() < 1e-30
            assert result[0, 2:].abs().min() > 1e-4
