"""Layers whose inputs are gates: they do what the same layer with its own W_ih does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from custom_layers import gated, normal
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast
from rnnfast.explain import record_gates


@rnnfast.cell(gates=2, recurrent=False)
def leaky(x: Any, state: Any) -> Any:
    z = torch.sigmoid(x[0])
    return (1 - z) * state.h + z * x[1]


CELLS = {"gated": gated, "normal": normal, "leaky": leaky}


def pair(name: str, **options: Any) -> tuple[rnnfast.Layer, rnnfast.Layer]:
    """A layer, and one that takes gates with the same parameters."""
    own = rnnfast.Layer(CELLS[name], 5, 13, dtype=torch.float64, **options)
    takes = rnnfast.Layer(CELLS[name], None, 13, dtype=torch.float64, **options)
    state = own.state_dict()
    missing, unexpected = takes.load_state_dict(state, strict=False)
    assert missing == []
    assert set(unexpected) <= {"weight_ih_l0", "bias_ih_l0"}
    return own, takes


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("kind", ["batch", "lengths", "packed", "single", "batch_first"])
@pytest.mark.parametrize("name", CELLS)
def test_like_a_layer_with_its_own_weights(name: str, kind: str, backend: str) -> None:
    torch.manual_seed(0)
    own, takes = pair(
        name,
        num_layers=2,
        bias=kind != "single",
        batch_first=kind == "batch_first",
        backend=backend,
    )
    bias = own.bias_ih_l0 if own.bias else None
    x = torch.randn(*((6, 5) if kind == "single" else (6, 3, 5)), dtype=torch.float64)
    x.requires_grad_()

    def gates(x: Tensor) -> Tensor:
        return F.linear(x, own.weight_ih_l0, bias)

    results = []
    for layer in (own, takes):
        given: Any = x if kind != "packed" else pack_padded_sequence(x, [6, 4, 1])
        if layer is takes:
            given = given._replace(data=gates(given.data)) if kind == "packed" else gates(given)
        y, h_n = layer(given, **({"lengths": [6, 0, 3]} if kind == "lengths" else {}))
        y = y.data if isinstance(y, PackedSequence) else y
        h = h_n[0] if isinstance(h_n, tuple) else h_n
        loss = (y * torch.arange(y.numel()).view_as(y).sin()).sum() + h.square().sum()
        of = [x, own.weight_ih_l0, *([bias] if bias is not None else [])]
        others = [p for n, p in layer.named_parameters() if n not in ("weight_ih_l0", "bias_ih_l0")]
        results.append([y, h, *torch.autograd.grad(loss, [*of, *others])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_recurrence_alone_has_no_parameters() -> None:
    torch.manual_seed(0)
    layer = rnnfast.Layer(leaky, None, 7, bias=False)
    gates = torch.randn(4, 2, 14, dtype=torch.float64)
    assert list(layer.parameters()) == []
    assert repr(layer) == "Layer(leaky, None, 7, bias=False)"
    h, expected = torch.zeros(2, 7, dtype=torch.float64), []
    for z, a in (g.chunk(2, -1) for g in gates):
        h = torch.lerp(h, a, z.sigmoid())
        expected.append(h)
    torch.testing.assert_close(layer(gates)[0], torch.stack(expected))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(gates)[0], torch.stack(expected))


def test_derivatives_and_gates() -> None:
    torch.manual_seed(0)
    layer = rnnfast.Layer(gated, None, 3, dtype=torch.float64, backend="fused")
    gates = torch.randn(3, 2, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], gates)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], gates)
    with record_gates(layer) as record:
        y, _ = layer(gates)
    torch.testing.assert_close(record["l0"]["hidden"], y.detach())


def test_what_does_not_fit() -> None:
    layer = rnnfast.Layer(leaky, None, 7)
    with pytest.raises(RuntimeError, match=r"Expected 14, got \[4, 2, 13\]"):
        layer(torch.randn(4, 2, 13))
    with pytest.raises(ValueError, match="the input is gates: no embedding"):
        layer(torch.randn(4, 2, 14), embedding=torch.nn.Embedding(3, 14))
    with pytest.raises(RuntimeError, match="not the same dtype"):
        rnnfast.Layer(gated, None, 7)(torch.randn(4, 2, 21, dtype=torch.float64))
    for option in ("tokens", "bidirectional"):
        with pytest.raises(ValueError, match=f"input_size=None cannot be combined with {option}"):
            rnnfast.Layer(leaky, None, 7, **{option: True})
