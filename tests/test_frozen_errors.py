"""What frozen modules refuse, and with which errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rnnfast


def test_what_freeze_refuses() -> None:
    class Own(nn.LSTM):
        def forward(self, *args: Any) -> Any:
            return super().forward(*args)

    class Called(nn.GRU):
        def __call__(self, *args: Any) -> Any:
            return super().__call__(*args)

    changed, hooked, dropped = nn.GRU(2, 3), nn.GRU(2, 3), nn.GRU(2, 3)
    changed.forward = lambda x: x  # type: ignore[method-assign]
    hooked.register_forward_hook(lambda *_: None)
    weight = dropped._parameters.pop("weight_hh_l0")
    dropped.weight_hh_l0 = weight.detach()  # as a wrapper that drops weights does
    for module, weights, words in (
        (nn.Linear(2, 3), "int8", "Linear has no RNN, LSTM, GRU or cell to freeze"),
        (Called(2, 3), "int8", "GRU cannot be frozen|Called cannot be frozen: .* its own __call__"),
        (rnnfast.freeze(nn.GRU(2, 3)), "int8", "FrozenLayers is frozen already"),
        (nn.GRU(2, 3), torch.int8, "expected weights float32.*got torch.int8"),
        (nn.GRU(2, 3), "int4", "expected weights float32, bfloat16, float16, int8, got 'int4'"),
        (
            nn.Sequential(nn.GRU(2, 3)),
            {"1": "int8"},
            r"no recurrent module is named '1'; .*\['0'\]",
        ),
        (nn.GRU(2, 3).double(), "int8", "Expected float32 weights on the CPU.*torch.float64"),
        (nn.Sequential(Own(2, 3)), "int8", "0 cannot be frozen: .*Own.* has its own forward"),
        (changed, "int8", "GRU cannot be frozen: it has its own forward, set on the instance"),
        (hooked, "int8", "GRU cannot be frozen: it has hooks"),
        (dropped, "int8", "weight_hh_l0 is no parameter of the module"),
    ):
        with pytest.raises(ValueError, match=words):
            rnnfast.freeze(module, weights)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_malformed_calls_raise_what_torch_raises(kind: type[nn.Module]) -> None:
    module = kind(9, 21).requires_grad_(False)
    frozen = rnnfast.freeze(module, "int8")
    x, h = torch.randn(4, 3, 9), torch.randn(1, 3, 21)
    good = (h, h) if kind is nn.LSTM else h
    bad = (h[:, :2], h[:, :2]) if kind is nn.LSTM else h[:, :2]
    for arguments in (
        (x[0, 0],),
        (x[..., :8],),
        (x.double(), good),
        (x, bad),
        (x[:0], good),
        (x.unsqueeze(0),),
        (x[:, 0], good),
        (None,),
    ):
        with pytest.raises(Exception, match=r".") as expected:
            module(*arguments)
        with pytest.raises(type(expected.value)) as found:
            frozen(*arguments)
        assert str(found.value) == str(expected.value)


def test_gradients_are_refused() -> None:
    frozen, x = rnnfast.freeze(nn.LSTM(9, 21)), torch.randn(4, 3, 9, requires_grad=True)
    cell = rnnfast.freeze(nn.GRUCell(9, 21))
    for call in (
        lambda: frozen(x),
        lambda: frozen(x.detach(), (torch.ones(1, 3, 21, requires_grad=True),) * 2),
        lambda: cell(x[0]),
    ):
        with pytest.raises(RuntimeError, match="a frozen layer has no gradients"):
            call()
    with pytest.raises(RuntimeError, match="a frozen layer has no derivatives"):
        torch.func.jvp(lambda x: frozen(x)[0], (x.detach(),), (x.detach(),))
    with torch.no_grad():
        assert not frozen(x)[0].requires_grad


def test_other_devices_are_refused() -> None:
    frozen = rnnfast.freeze(nn.LSTM(9, 21)).to("meta")
    with pytest.raises(RuntimeError, match="run on the CPU, and this one was moved to meta"):
        frozen(torch.randn(4, 3, 9))


def test_damaged_and_foreign_weights_are_refused() -> None:
    frozen = rnnfast.freeze(nn.GRU(9, 21))
    good, x = frozen.packed_hh_l0, torch.randn(4, 3, 9)
    other = rnnfast.freeze(nn.GRU(9, 22)).packed_hh_l0
    for block, words in (
        (good[:-1].clone(), "damaged"),
        (torch.zeros_like(good), "expected packed weights"),
        (torch.zeros(3, dtype=torch.uint8), "expected packed weights"),
        (rnnfast.freeze(nn.GRU(9, 21), "int8").packed_hh_l0, "expected w_ih of shape.*Char"),
        (other, r"Expected|expected"),
    ):
        frozen._buffers["packed_hh_l0"] = block
        with pytest.raises((RuntimeError, ValueError), match=words):
            frozen(x)
    for place in range(44):  # every byte of the header that says what follows
        block = good.clone()
        block[place] += 1
        frozen._buffers["packed_hh_l0"] = block
        with pytest.raises((RuntimeError, ValueError), match=r"packed weights|expected w_"):
            frozen(x)
    frozen._buffers["packed_hh_l0"] = good
    frozen(x)


def test_other_operators_refuse_packed_weights() -> None:
    frozen = rnnfast.freeze(nn.GRU(9, 21))
    w_ih, w_hh = (frozen.get_buffer(f"packed_{kind}_l0") for kind in ("ih", "hh"))
    x, h = torch.randn(4, 3, 9), torch.zeros(3, 21)
    with pytest.raises(RuntimeError, match="frozen_layer takes packed weights"):
        torch.ops.rnnfast.gru(x, h, w_ih, w_hh, None, None, False, False)
