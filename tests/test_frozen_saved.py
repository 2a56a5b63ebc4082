"""Frozen modules: how their weights are saved, copied and loaded."""

from __future__ import annotations

import copy
import io
import pickle
from itertools import product

import pytest
import torch
from frozen_cases import TOKENS, assert_near, drawn, every_type, reader
from targets import FROZEN, running_on
from torch import nn

import rnnfast
from rnnfast.frozen import TYPES


@every_type
def test_state_dict_is_the_same_for_every_instruction_set(weights: str) -> None:
    module = nn.LSTM(9, 21, num_layers=2, bidirectional=True, proj_size=4)
    x = torch.randn(4, 3, 9)
    saved, outputs = {}, {}
    for name in FROZEN:
        with running_on(name):
            frozen = rnnfast.freeze(module, weights)
            saved[name], outputs[name] = frozen.state_dict(), frozen(x)[0]
    for one, other in product(FROZEN, FROZEN):
        with running_on(other):
            frozen = rnnfast.freeze(nn.LSTM(9, 21, 2, bidirectional=True, proj_size=4), weights)
            assert not torch.equal(frozen(x)[0], outputs[other])
            frozen.load_state_dict(saved[one])
            assert torch.equal(frozen(x)[0], outputs[other])
    first = saved[FROZEN[0]]
    assert first["weight_ih_l0"].dtype is TYPES[weights]
    assert ("weight_ih_l0_scale" in first) is (weights == "int8")
    without_scales = {name: value for name, value in first.items() if "_scale" not in name}
    assert {n: v.shape for n, v in without_scales.items()} == {
        n: v.shape for n, v in module.state_dict().items()
    }


@every_type
def test_other_instruction_set_than_at_freezing(weights: str) -> None:
    """As for a pickle from another machine."""
    module, x = nn.GRU(9, 21), torch.randn(4, 3, 9)
    for one, other in product(FROZEN, FROZEN):
        with running_on(one):
            frozen = rnnfast.freeze(module, weights)
            stored = pickle.dumps(frozen)
        with running_on(other):
            expected = rnnfast.freeze(module, weights)(x)[0]
            assert torch.equal(frozen(x)[0], expected)
            assert torch.equal(pickle.loads(stored)(x)[0], expected)


@every_type
def test_copies(weights: str) -> None:
    module, x = nn.Sequential(nn.LSTM(9, 21)), torch.randn(4, 3, 9)
    frozen = rnnfast.freeze(module, weights)
    file = io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    y = frozen(x)[0]
    for other in (
        copy.deepcopy(frozen),
        pickle.loads(pickle.dumps(frozen)),
        torch.load(file, weights_only=False),
        copy.deepcopy(frozen).share_memory(),
    ):
        assert torch.equal(other(x)[0], y)
    assert next(copy.deepcopy(frozen).share_memory().buffers()).is_shared()


def test_loading_takes_weights_that_are_not_frozen() -> None:
    one, other, x = nn.LSTM(9, 21), nn.LSTM(9, 21), torch.randn(4, 3, 9)
    for weights in TYPES:
        frozen, expected = rnnfast.freeze(one, weights), rnnfast.freeze(other, weights)
        frozen.load_state_dict(other.state_dict())
        assert torch.equal(frozen(x)[0], expected(x)[0])
        for source in TYPES:  # saved in one type, loaded in another
            frozen.load_state_dict(rnnfast.freeze(other, source).state_dict())
            assert_near(frozen(x)[0], expected(x)[0], 0.02)


@every_type
def test_loading_needs_no_float32_weights(weights: str) -> None:
    module, x = nn.LSTM(9, 21, num_layers=2), torch.randn(4, 3, 9)
    with torch.device("meta"):
        frozen = rnnfast.freeze(nn.LSTM(9, 21, num_layers=2), weights)
    assert frozen(x)[0].isnan().all()
    frozen.load_state_dict(rnnfast.freeze(module, weights).state_dict())
    assert_near(frozen(x), rnnfast.freeze(module, weights)(x), 0)


def test_what_loading_refuses() -> None:
    frozen = rnnfast.freeze(nn.Sequential(nn.GRU(9, 21)), "int8")
    good = frozen.state_dict()
    before = frozen(torch.ones(2, 1, 9))[0]
    for change, words in (
        (lambda d: d.pop("0.weight_hh_l0_scale"), 'Missing key.*"0.weight_hh_l0_scale"'),
        (lambda d: d.pop("0.bias_ih_l0"), 'Missing key.*"0.bias_ih_l0"'),
        (lambda d: d.update({"0.other": torch.ones(1)}), 'Unexpected key.*"0.other"'),
        (
            lambda d: d.update({"0.weight_ih_l0": torch.ones(63, 8)}),
            r"0.weight_ih_l0: expected size \(63, 9\), got \[63, 8\]",
        ),
        (
            lambda d: d.update({"0.weight_ih_l0_scale": torch.ones(3)}),
            r"0.weight_ih_l0_scale: expected size \(63,\), got \[3\]",
        ),
        (
            lambda d: d.update({"0.weight_ih_l0": torch.ones(63, 9, dtype=torch.int64)}),
            "expected floating-point or int8 numbers, got torch.int64",
        ),
    ):
        changed = dict(good)
        change(changed)
        with pytest.raises(RuntimeError, match=words):
            frozen.load_state_dict(changed)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"0.junk.a"'):
        frozen.load_state_dict({**good, "0.junk.a": torch.ones(1)})
    with pytest.raises(RuntimeError, match="bias_ih_l0: expected a tensor with memory, got list"):
        frozen.load_state_dict({**good, "0.bias_ih_l0": [0.0] * 63})
    with pytest.raises(RuntimeError, match=r"expected floating-point numbers, got torch.complex64"):
        frozen.load_state_dict({**good, "0.bias_ih_l0": torch.ones(63, dtype=torch.complex64)})
    frozen.load_state_dict(good)
    assert torch.equal(frozen(torch.ones(2, 1, 9))[0], before)


@every_type
def test_loading_a_part(weights: str) -> None:
    """With strict=False what is there is loaded, and the rest is named and stays."""
    one, other = nn.GRU(9, 21), nn.GRU(9, 21)
    frozen, x = rnnfast.freeze(one, weights), torch.randn(4, 3, 9)
    hooked = []
    frozen.register_load_state_dict_pre_hook(lambda *_: hooked.append(True))
    for name in ("weight_ih_l0", "bias_hh_l0"):
        missing, unexpected = frozen.load_state_dict({name: getattr(other, name)}, strict=False)
        assert name not in missing
        assert len(missing) >= 3
        assert not unexpected
    mixed = copy.deepcopy(one)
    mixed.load_state_dict(
        {"weight_ih_l0": other.weight_ih_l0, "bias_hh_l0": other.bias_hh_l0}, strict=False
    )
    assert torch.equal(frozen(x)[0], rnnfast.freeze(mixed, weights)(x)[0])
    assert hooked == [True, True]


def test_loading_writes_into_shared_memory() -> None:
    frozen, other = (rnnfast.freeze(nn.GRU(9, 21), "int8") for _ in range(2))
    block = frozen.share_memory().packed_hh_l0
    frozen.load_state_dict(other.state_dict())
    assert frozen.packed_hh_l0 is block
    assert torch.equal(block, other.packed_hh_l0)


def test_memory() -> None:
    module = nn.LSTM(512, 512, num_layers=2)
    floats = sum(p.nbytes for p in module.parameters())
    for weights, share in (
        ("float32", 1.01),
        ("bfloat16", 0.51),
        ("float16", 0.51),
        ("int8", 0.27),
    ):
        frozen = rnnfast.freeze(module, weights)
        assert not list(frozen.parameters())
        assert sum(b.nbytes for b in frozen.buffers()) < share * floats


# ---- layers that read tokens ----


@every_type
def test_state_dict_is_that_of_a_layer_that_reads_vectors(weights: str) -> None:
    options = {"num_layers": 2, "bidirectional": True, "proj_size": 4}
    module, vectors = reader(rnnfast.LSTM, **options), nn.LSTM(TOKENS.V, TOKENS.H, **options)
    vectors.load_state_dict(module.state_dict())
    tokens, saved, outputs = drawn(module), {}, {}
    for name in FROZEN:
        with running_on(name):
            frozen = rnnfast.freeze(module, weights)
            saved[name], outputs[name] = frozen.state_dict(), frozen(tokens)[0]
            expected = rnnfast.freeze(vectors, weights).state_dict()
            assert list(saved[name]) == list(expected)
            assert all(torch.equal(value, expected[n]) for n, value in saved[name].items())
    assert saved[FROZEN[0]]["weight_ih_l0"].dtype is TYPES[weights]
    for one, other in product(FROZEN, FROZEN):
        with running_on(other):
            frozen = rnnfast.freeze(reader(rnnfast.LSTM, **options), weights)
            assert not torch.equal(frozen(tokens)[0], outputs[other])
            frozen.load_state_dict(saved[one])
            assert torch.equal(frozen(tokens)[0], outputs[other])
    other = rnnfast.freeze(reader(rnnfast.LSTM, **options), weights)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(tokens)[0], rnnfast.freeze(module, weights)(tokens)[0])


@every_type
def test_copies_of_tables(weights: str) -> None:
    module = reader(rnnfast.GRU)
    tokens = drawn(module)
    for one, other in product(FROZEN, FROZEN):
        with running_on(one):
            frozen = rnnfast.freeze(module, weights)
            stored, block = pickle.dumps(frozen), frozen.packed_ih_l0
        with running_on(other):
            fresh = rnnfast.freeze(module, weights)
            assert torch.equal(frozen(tokens)[0], fresh(tokens)[0])
            assert torch.equal(pickle.loads(stored)(tokens)[0], fresh(tokens)[0])
            assert torch.equal(copy.deepcopy(frozen)(tokens)[0], fresh(tokens)[0])
            assert torch.equal(fresh.packed_ih_l0, block)  # a table is the same everywhere


@every_type
def test_loading_tables_needs_no_float32_weights(weights: str) -> None:
    module = reader(rnnfast.LSTM)
    tokens = drawn(module)
    frozen = rnnfast.freeze(reader(rnnfast.LSTM, device="meta"), weights)
    assert frozen(tokens)[0].isnan().all()
    frozen.load_state_dict(rnnfast.freeze(module, weights).state_dict())
    assert_near(frozen(tokens), rnnfast.freeze(module, weights)(tokens), 0)


def test_memory_of_tables() -> None:
    module = reader(rnnfast.LSTM, 256, 5000)
    floats = sum(p.nbytes for p in module.parameters())
    shares = {"float32": 1.01, "bfloat16": 0.51, "float16": 0.51, "int8": 0.27}
    for weights, share in shares.items():
        frozen = rnnfast.freeze(module, weights)
        assert sum(b.nbytes for b in frozen.buffers()) < share * floats
