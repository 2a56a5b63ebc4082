"""Modules that torch.ao has quantized dynamically are frozen with the weights that they have."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from frozen_cases import bound_of, row_steps
from torch import Tensor, nn
from torch.ao import quantization
from torch.ao.nn.quantized import dynamic

import rnnfast
from rnnfast.frozen import FrozenCell, FrozenLayers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

KINDS: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (nn.LSTM, {}),
    (nn.GRU, {}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    (nn.GRU, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    (nn.LSTMCell, {}),
    (nn.GRUCell, {}),
    (nn.RNNCell, {}),
    (nn.RNNCell, {"nonlinearity": "relu"}),
]
SIZES = [(4, 3, 9, 20), (20, 5, 64, 64), (30, 2, 33, 70)]
"""(T, B, I, H)"""
CONFIGS = {
    "tensor": quantization.default_dynamic_qconfig,
    "channel": quantization.per_channel_dynamic_qconfig,
    "half": quantization.float16_dynamic_qconfig,
}
every_kind = pytest.mark.parametrize(
    ("kind", "options"), KINDS, ids=lambda value: getattr(value, "__name__", str(value))
)
every_config = pytest.mark.parametrize("config", CONFIGS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def quantized_of(module: nn.Module, config: str) -> nn.Module:
    kinds = dict.fromkeys((nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell), CONFIGS[config])
    dtype = torch.float16 if config == "half" else torch.qint8
    return quantization.quantize_dynamic(nn.Sequential(module), kinds, dtype=dtype)[0]


def double_of(module: nn.Module, quantized: nn.Module) -> nn.Module:
    """torch.nn's module in float64 with the weights of a quantized one."""
    weights = {name: weight.dequantize() for name, weight in quantized.get_weight().items()}
    result = copy.deepcopy(module)
    result.load_state_dict({**weights, **quantized.get_bias()})
    return result.double()


def output_of(module: nn.Module, x: Tensor) -> Tensor:
    results = module(x)
    return results[0] if isinstance(results, tuple) else results


def rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


@every_config
@every_kind
def test_values(kind: type[nn.Module], options: dict[str, Any], config: str) -> None:
    """torch rounds the input of a product to 7 bits, and frozen layers to 8 or 13: less error.

    States are rounded again in every step, and torch takes one scale for the whole batch, so the
    ratio is not exact.
    """
    for T, B, I, H in SIZES:
        module = kind(I, H, **options).requires_grad_(False)
        x = torch.randn(T, B, I) if issubclass(kind, nn.RNNBase) else torch.randn(B, I)
        quantized = quantized_of(module, config)
        frozen = rnnfast.freeze(quantized, "float16" if config == "half" else "int8")
        assert type(frozen) is (FrozenLayers if issubclass(kind, nn.RNNBase) else FrozenCell)
        assert frozen.torch_class is kind
        exact = output_of(double_of(module, quantized), x.double())
        ours, theirs = (output_of(each, x) - exact for each in (frozen, quantized))
        if config == "half":
            assert ours.abs().max() < 2e-6
            assert theirs.abs().max() < 2e-6
        else:
            assert ours.abs().max() < bound_of("int8")
            assert 1e-3 < theirs.abs().max() < 0.04
            assert rms(ours) < rms(theirs) * 1.6 * 63 / row_steps()


@every_config
@every_kind
def test_weights_are_taken_as_they_are(
    kind: type[nn.Module], options: dict[str, Any], config: str
) -> None:
    quantized = quantized_of(kind(9, 20, **options), config)
    frozen = rnnfast.freeze(quantized, "float16" if config == "half" else "int8")
    found, biases = frozen.unpacked(), quantized.get_bias()
    weights = quantized.get_weight()
    assert found.keys() == weights.keys()
    for name, theirs in weights.items():
        assert torch.equal(found[name].bias, biases[name.replace("weight", "bias")])
        assert not found[name].bias.requires_grad
        if config == "half":
            assert found[name].weight.dtype is torch.float16
            assert torch.equal(found[name].weight.float(), theirs)
            continue
        assert torch.equal(found[name].weight, theirs.int_repr())
        scale = theirs.q_per_channel_scales() if config == "channel" else theirs.q_scale()
        expected = torch.zeros(len(theirs), dtype=torch.float64) + scale
        assert torch.equal(found[name].scale, expected.float())


def test_the_smallest_integer_does_not_overflow() -> None:
    """torch's integers begin at -128, and those that `freeze` makes at -127."""
    for K in (4096, 9001):
        weight = torch.quantize_per_tensor(-torch.ones(3, K), 1 / 128, 0, torch.qint8)
        assert weight.int_repr().eq(-128).all()
        quantized = dynamic.RNNCell(K, 3, nonlinearity="relu")
        names = quantized.get_weight()
        zeros = torch.zeros(3)
        quantized.set_weight_bias(
            {
                "weight": {**names, "weight_ih": weight},
                "bias": {"bias_ih": zeros, "bias_hh": zeros},
            }
        )
        x = -torch.ones(2, K)
        x[1, ::2] = 1
        result = rnnfast.freeze(quantized, "int8")(x)
        expected = torch.tensor([[float(K)], [0.0]]).expand(2, 3)
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=2e-4)


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "float16"])
def test_other_types_round_what_the_integers_stand_for(weights: str) -> None:
    module = nn.LSTM(9, 20).requires_grad_(False)
    quantized = quantized_of(module, "channel")
    rounded = double_of(module, quantized).float()
    frozen, expected = rnnfast.freeze(quantized, weights), rnnfast.freeze(rounded, weights)
    for name, each in frozen.unpacked().items():
        torch.testing.assert_close(
            each.dense(), expected.unpacked()[name].dense(), rtol=1e-7, atol=0
        )


def test_no_bias() -> None:
    """torch quantizes no such module itself, but a module made by hand may have none."""
    quantized = dynamic.GRUCell(9, 20, bias=False)
    frozen, x = rnnfast.freeze(quantized, "int8"), torch.randn(3, 9) / 100
    assert not frozen.bias
    assert [each.bias for each in frozen.unpacked().values()] == [None, None]
    oracle = nn.GRUCell(9, 20, bias=False).double()
    oracle.load_state_dict({n: w.dequantize() for n, w in quantized.get_weight().items()})
    torch.testing.assert_close(frozen(x).double(), oracle(x.double()), rtol=2e-3, atol=2e-3)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(8, 16)
        self.cell = nn.GRUCell(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(self.inner(x)[0][-1]))


def quantized_model() -> nn.Module:
    kinds = {nn.LSTM, nn.GRUCell, nn.Linear}
    return quantization.quantize_dynamic(Model().eval(), kinds)


def test_models() -> None:
    model, x = quantized_model(), torch.randn(5, 3, 8)
    expected = model(x)
    frozen = rnnfast.freeze(model, "int8")
    assert type(model.inner) is dynamic.LSTM
    assert type(frozen.head) is dynamic.Linear
    report = rnnfast.accelerate(model, weights="int8", keep_float=True)
    assert report.replaced == {"inner": "LSTM, int8", "cell": "GRUCell, int8"}
    assert report.left == {}
    assert torch.equal(model(x), frozen(x))
    torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.05)
    other = copy.deepcopy(model)
    module = "torch.ao.nn.quantized.dynamic.modules.rnn"
    for each in (model, other):
        report = rnnfast.restore(each)
        assert report.replaced == {"inner": f"{module}.LSTM", "cell": f"{module}.GRUCell"}
        assert torch.equal(each(x), expected)
    (inner, cell, whole) = rnnfast.quantize_error(model, x)
    assert (inner.name, cell.name, whole.name) == ("inner", "cell", "")
    assert 0 < whole.relative < 0.1


def test_loading_into_a_frozen_quantized_module() -> None:
    quantized, x = quantized_of(nn.GRU(9, 20), "channel"), torch.randn(4, 3, 9)
    frozen = rnnfast.freeze(quantized, "int8")
    other = rnnfast.freeze(nn.GRU(9, 20), "int8")
    other.load_state_dict(frozen.state_dict())
    assert torch.equal(other(x)[0], frozen(x)[0])


@pytest.mark.parametrize(
    ("observer", "qscheme"),
    [
        (quantization.MinMaxObserver, torch.per_tensor_affine),
        (quantization.PerChannelMinMaxObserver, torch.per_channel_affine),
    ],
)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRUCell])
def test_zero_points_are_refused(kind: type[nn.Module], observer: Any, qscheme: Any) -> None:
    config = quantization.QConfig(
        activation=quantization.default_dynamic_quant_observer,
        weight=observer.with_args(dtype=torch.qint8, qscheme=qscheme),
    )
    module = kind(5, 6)
    with torch.no_grad():
        next(module.parameters())[:] += 0.1
    model = quantization.quantize_dynamic(nn.Sequential(module), {kind: config})
    words = (
        "cannot be frozen: weight_ih(_l0)? has zero points other than 0, and frozen integers have "
        "none: quantize with a symmetric qscheme, such as torch.per_tensor_symmetric"
    )
    with pytest.raises(ValueError, match=f"^0 {words}$"):
        rnnfast.freeze(model, "int8")
    report = rnnfast.accelerate(model, weights="int8")
    assert report.replaced == {}
    assert report.left.keys() == {"0"}
    assert report.left["0"].startswith("cannot be frozen: weight_ih")


def test_weights_that_cannot_be_read_are_refused() -> None:
    quantized = dynamic.LSTM(5, 6)
    quantized._all_weight_values[0].param = None
    with pytest.raises(ValueError, match="LSTM cannot be frozen: its packed weights cannot be rea"):
        rnnfast.freeze(quantized, "int8")
    hooked = dynamic.LSTM(5, 6)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="LSTM cannot be frozen: it has hooks"):
        rnnfast.freeze(hooked, "int8")
    model = nn.ModuleDict({"cell": torch.ao.nn.quantizable.LSTMCell(3, 4)})
    path = "torch.ao.nn.quantizable.modules.rnn.LSTMCell"
    assert rnnfast.accelerate(model, weights="int8").left == {"cell": f"{path} is not of torch.nn"}
