"""Frozen modules: their values, and how they work with the rest of torch."""

from __future__ import annotations

import copy
import io
from itertools import product
from typing import Any

import pytest
import torch
from frozen_cases import (
    KINDS,
    SIZES,
    Model,
    assert_near,
    bound_of,
    calls_of,
    double_of,
    every_type,
    states_for,
)
from targets import FROZEN, check_on, running_on
from torch import Tensor, nn
from torch.nn.utils import parametrize

import rnnfast
from rnnfast.frozen import FrozenCell


@every_type
@pytest.mark.parametrize(
    ("kind", "options"), KINDS, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_values(kind: type[nn.Module], options: dict[str, Any], weights: str) -> None:
    for T, B, I, H in SIZES:
        module = kind(I, H, **options).requires_grad_(False)
        x = torch.randn(B, T, I) if module.batch_first else torch.randn(T, B, I)
        hx = states_for(module, B)

        def check(_: str, module: nn.Module = module, x: Tensor = x, hx: Any = hx) -> None:
            frozen = rnnfast.freeze(module, weights)
            oracle = double_of(module, frozen)
            doubles = tuple(s.double() for s in hx) if isinstance(hx, tuple) else hx.double()
            for states, expected in ((None, oracle(x.double())), (hx, oracle(x.double(), doubles))):
                results = frozen(x, states)
                assert results[0].abs().max() > 1e-3
                assert_near(results, expected, bound_of(weights))

        check_on(FROZEN, check)


@every_type
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(kind: type[nn.Module], weights: str) -> None:
    for (_, B, I, H), bias in product(SIZES, [True, False]):
        cell = kind(I, H, bias=bias).requires_grad_(False)
        x, h, c = torch.randn(B, I), torch.randn(B, H), torch.randn(B, H)
        hx = (h, c) if kind is nn.LSTMCell else h

        def check(_: str, cell: nn.Module = cell, x: Tensor = x, hx: Any = hx) -> None:
            frozen = rnnfast.freeze(cell, weights)
            assert isinstance(frozen, FrozenCell)
            oracle = double_of(cell, frozen)
            doubles = tuple(s.double() for s in hx) if isinstance(hx, tuple) else hx.double()
            assert_near(frozen(x, hx), oracle(x.double(), doubles), bound_of(weights))
            assert_near(frozen(x), oracle(x.double()), bound_of(weights))
            one = tuple(s[0] for s in hx) if isinstance(hx, tuple) else hx[0]
            first = oracle(x.double(), doubles)
            first = tuple(s[0] for s in first) if isinstance(first, tuple) else first[0]
            assert_near(frozen(x[0], one), first, bound_of(weights))

        check_on(FROZEN, check)


@every_type
def test_bits_do_not_depend_on_threads_or_the_batch(weights: str, threads: None) -> None:
    for kind in (nn.LSTM, nn.GRU):
        module, x = kind(33, 72).requires_grad_(False), torch.randn(6, 23, 33)
        for name in FROZEN:
            with running_on(name):
                frozen = rnnfast.freeze(module, weights)
                torch.set_num_threads(1)
                y, _ = frozen(x)
                assert torch.equal(torch.cat([frozen(x[:, :5])[0], frozen(x[:, 5:])[0]], 1), y)
                assert torch.equal(frozen(x[:, 3:4])[0], y[:, 3:4])
                for count in (2, 3, 4):
                    torch.set_num_threads(count)
                    assert torch.equal(frozen(x)[0], y)


@every_type
@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True, "num_layers": 2}, {"batch_first": True}, {"proj_size": 6}],
    ids=str,
)
def test_lengths_resets_packed_and_single_sequences(options: dict[str, Any], weights: str) -> None:
    module, plain = (rnnfast.LSTM(9, 20, **options).requires_grad_(False) for _ in range(2))
    calls = calls_of(options)

    def check(_: str) -> None:
        frozen = rnnfast.freeze(module, weights)
        rounded = {name: each.dense() for name, each in frozen.unpacked().items()}
        plain.load_state_dict({**module.state_dict(), **rounded})
        for call in calls:
            assert_near(call(frozen), call(plain), bound_of(weights))

    check_on(FROZEN, check)


def test_embedding() -> None:
    module, table = rnnfast.GRU(8, 16), nn.Embedding(30, 8).requires_grad_(False)
    tokens = torch.randint(30, (5, 3))
    frozen = rnnfast.freeze(module)
    assert_near(frozen(tokens, embedding=table), frozen(table(tokens)), 0)


def test_whole_model() -> None:
    model = Model()
    tokens = torch.randint(20, (5, 3))
    before = copy.deepcopy(model.state_dict())
    frozen = rnnfast.freeze(model, {"layers.0": "int8", "cell": "bfloat16"})
    assert model.training
    assert not frozen.training
    assert frozen.again is frozen.layers[1]
    assert [m.weights for m in (*frozen.layers, frozen.cell)] == ["int8", "float32", "bfloat16"]
    model.eval()
    expected = model(tokens)
    torch.testing.assert_close(frozen(tokens), expected.detach(), rtol=0.02, atol=0.01)
    assert not frozen(tokens).requires_grad
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # does not reach the copy
    assert frozen(tokens).abs().max() > 0.01


def test_parametrized_and_accelerated_modules() -> None:
    x = torch.randn(4, 3, 9)
    for keep_class in (False, True):
        module = nn.LSTM(9, 21).requires_grad_(False)
        rnnfast.accelerate(module, keep_class=keep_class)
        parametrize.register_parametrization(module, "weight_hh_l0", nn.Tanh(), unsafe=True)
        assert_near(rnnfast.freeze(module)(x), module(x), 2e-6)


def test_the_model_does_not_change() -> None:
    """Parametrizations that change in training are read as in eval mode."""
    module = nn.utils.parametrizations.spectral_norm(nn.LSTM(9, 21), "weight_hh_l0")
    before, x = copy.deepcopy(module.state_dict()), torch.randn(4, 3, 9)
    frozen = rnnfast.freeze(module)
    assert module.training
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    assert_near(frozen(x), module.eval().requires_grad_(False)(x), 2e-6)


def test_trace() -> None:
    for module in (nn.LSTM(9, 21, proj_size=4), nn.GRUCell(9, 21)):
        frozen = rnnfast.freeze(module, "int8")
        x = torch.randn(3, 9) if isinstance(module, nn.GRUCell) else torch.randn(4, 3, 9)
        with torch.no_grad():
            traced = torch.jit.trace(frozen, x)
            assert_near(traced(x), frozen(x), 1e-6)


def test_backend_and_autocast() -> None:
    frozen, x = rnnfast.freeze(nn.LSTM(9, 21), "int8"), torch.randn(4, 3, 9)
    y = frozen(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        for input in (x, x.bfloat16()):
            result, (h, c) = frozen(input)
            assert {result.dtype, h.dtype, c.dtype} == {torch.bfloat16}
            torch.testing.assert_close(result.float(), y, rtol=0.02, atol=0.01)
        cell = rnnfast.freeze(nn.GRUCell(9, 21))
        assert cell(x[0].bfloat16()).dtype is torch.bfloat16


@every_type
def test_compile_and_export(weights: str) -> None:
    model = nn.LSTM(9, 21, num_layers=2, bidirectional=True, proj_size=4)
    frozen, x = rnnfast.freeze(model, weights), torch.randn(4, 3, 9)
    with torch.no_grad():
        y, (h, c) = torch.compile(frozen, fullgraph=True, backend="aot_eager")(x)
        assert_near([y, h, c], frozen(x), 1e-6)
        program = torch.export.export(frozen, (x,))
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        assert_near(loaded(x), frozen(x), 1e-6)
        cell = rnnfast.freeze(nn.GRUCell(9, 21), weights)
        compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
        assert_near(compiled(x[0]), cell(x[0]), 1e-6)


def test_operator() -> None:
    frozen = rnnfast.freeze(nn.LSTM(9, 21), "int8")
    w_ih, w_hh = (frozen.get_buffer(f"packed_{kind}_l0") for kind in ("ih", "hh"))
    h = torch.zeros(3, 21)
    arguments = "lstm", torch.randn(4, 3, 9), h, h, w_ih, w_hh, None, False
    torch.library.opcheck(torch.ops.rnnfast.frozen_layer.default, arguments)


def test_quantize_error() -> None:
    model, tokens = Model(), torch.randint(20, (50, 3))
    table = rnnfast.quantize_error(model, tokens)
    assert model.training
    assert [row.name for row in table] == ["layers.0", "layers.1", "cell", ""]
    assert all(0 < row.rms <= row.largest < 0.1 for row in table)
    assert all(0 < row.relative < 0.1 for row in table)
    lines = str(table).splitlines()
    assert len(lines) == 5
    assert lines[1].startswith("layers.0  int8")
    exact = rnnfast.quantize_error(model, tokens, weights="float32")
    assert all(row.relative < 1e-6 for row in exact)


def test_quantize_error_of_other_results() -> None:
    """A dict, nothing, and outputs that the model then changes in place."""

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(4, 8)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor, result: str) -> Any:
            self.calls += 1
            y, _ = self.layer(x)
            y *= 0
            return {"dict": {"y": y}, "none": None}[result]

    model, x = Other(), torch.randn(5, 3, 4)
    assert [row.name for row in rnnfast.quantize_error(model, x, "dict")] == ["layer", ""]
    (row,) = rnnfast.quantize_error(model, x, "none")
    assert row.relative > 1e-5
    assert model.calls == 0
    assert rnnfast.quantize_error(model, x[:, :0], "none") == []
