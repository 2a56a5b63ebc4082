"""Models whose recurrent modules are frozen in place, and get back what they replaced."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import rnnfast
from rnnfast.frozen import TYPES, FrozenCell, FrozenLayers


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Model(nn.Module):
    """With recurrent modules at several places, one of them under three names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.layers = nn.ModuleList([rnnfast.LSTM(8, 16), nn.GRU(16, 16, dropout=0.0)])
        self.again = self.layers[1]
        self.cells = nn.ModuleDict({"one": nn.GRUCell(16, 16), "other": nn.LSTMCell(16, 16)})
        self.cells["third"] = self.layers[1]
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        y, _ = self.layers[0](self.embedding(tokens))
        y, _ = self.layers[1](y)
        y, _ = self.again(y)
        h, _ = self.cells["other"](self.cells["one"](y[-1]))
        return self.head(h)


NAMES = {
    "layers.0": "LSTM",
    "layers.1": "GRU",
    "cells.one": "GRUCell",
    "cells.other": "LSTMCell",
}
TOKENS = torch.arange(15).reshape(5, 3)


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS)


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_save(model: nn.Module) -> nn.Module:
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    return torch.load(saved, weights_only=False)


@pytest.mark.parametrize("weights", TYPES)
def test_it_computes_what_a_frozen_copy_does(weights: str) -> None:
    model = Model().eval()
    frozen = rnnfast.freeze(model, weights)
    report = rnnfast.accelerate(model, weights=weights)
    assert report.module is model
    assert report.replaced == {name: f"{kind}, {weights}" for name, kind in NAMES.items()}
    assert report.left == {}
    assert torch.equal(run(model), run(frozen))
    assert repr(model) == repr(frozen)
    assert model.state_dict().keys() == frozen.state_dict().keys()


def test_a_module_with_several_names_is_replaced_under_all() -> None:
    model = Model()
    rnnfast.accelerate(model, weights="int8")
    assert isinstance(model.again, FrozenLayers)
    assert model.again is model.layers[1]
    assert model.again is model.cells["third"]
    assert isinstance(model.cells["one"], FrozenCell)


def test_the_rest_of_the_model_stays() -> None:
    model = Model()
    model.cells.eval()
    model.embedding.weight.requires_grad_(False)
    others = [*model.embedding.parameters(), *model.head.parameters()]
    modes = {name: each.training for name, each in model.named_modules()}
    rnnfast.accelerate(model, weights="int8")
    assert modes == {name: each.training for name, each in model.named_modules()}
    assert {id(p) for p in model.parameters()} == {id(p) for p in others}
    assert model.head.weight.requires_grad
    assert not model.embedding.weight.requires_grad
    model(TOKENS).sum().backward()  # frozen layers are in between, but get no gradients
    assert model.head.weight.grad is not None
    model.embedding.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="a frozen layer has no gradients"):
        model(TOKENS)


def test_types_by_name() -> None:
    model = Model()
    report = rnnfast.accelerate(model, weights={"layers.0": "int8", "cells.one": "bfloat16"})
    assert report.replaced == {
        "layers.0": "LSTM, int8",
        "layers.1": "GRU, float32",
        "cells.one": "GRUCell, bfloat16",
        "cells.other": "LSTMCell, float32",
    }
    assert str(report).splitlines()[0] == "replaced  layers.0     LSTM, int8"
    assert model.again.weights == "float32"


class Own(nn.LSTM):
    def forward(self, *args: Any) -> Any:
        return super().forward(*args)


class Foreign(nn.RNNBase):
    pass


def test_what_cannot_be_frozen_is_left() -> None:
    model = nn.ModuleDict(
        {
            "good": nn.GRU(2, 3),
            "own": Own(2, 3),
            "hooked": nn.GRU(2, 3),
            "doubles": nn.GRU(2, 3).double(),
            "foreign": Foreign("GRU", 2, 3),
            "scripted": torch.jit.script(nn.GRU(2, 3)),
            "frozen": rnnfast.freeze(nn.GRU(2, 3), "float16"),
            "linear": nn.Linear(2, 3),
        }
    )
    model["hooked"].register_forward_hook(lambda *_: None)
    before = dict(model.items())
    report = rnnfast.accelerate(model, weights="int8")
    assert report.replaced == {"good": "GRU, int8"}
    assert report.left == {
        "own": f"cannot be frozen: {Own} has its own forward",
        "hooked": "cannot be frozen: it has hooks, which a frozen module would not run",
        "doubles": "cannot be frozen: Expected float32 weights on the CPU, got weight_ih_l0 with "
        "torch.float64 on cpu. Convert the module first: module.float().cpu()",
        "foreign": f"cannot be frozen: {Foreign} is not of torch.nn or rnnfast",
        "scripted": "is compiled by TorchScript",
        "frozen": "is frozen already, with weights='float16'",
    }
    assert [name for name, each in model.items() if each is not before[name]] == ["good"]
    assert str(rnnfast.accelerate(nn.Linear(2, 3), weights="int8")) == "no recurrent modules"


def test_a_second_call_changes_nothing() -> None:
    model = Model()
    rnnfast.accelerate(model, weights="int8")
    before = dict(model.named_modules())
    again = rnnfast.accelerate(model, weights="float16", keep_float=True)
    assert again.replaced == {}
    assert set(again.left) == set(NAMES)
    assert set(again.left.values()) == {"is frozen already, with weights='int8'"}
    plain = rnnfast.accelerate(model)
    assert plain.replaced == {}
    assert set(plain.left.values()) == {"is frozen already"}
    assert before == dict(model.named_modules())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "int4"}, "expected weights float32, bfloat16, float16, int8, got 'int4'"),
        ({"weights": {"layers.0": "int4"}}, "expected weights float32.*got 'int4'"),
        ({"weights": {"head": "int8"}}, r"no recurrent module is named 'head'; .*'layers.0'"),
        ({"weights": "int8", "backend": "fused"}, "weights and backend='fused' exclude each other"),
        ({"weights": "int8", "keep_class": True}, "weights and keep_class=True exclude each other"),
        ({"keep_float": True}, "keep_float=True needs weights"),
        ({"weights": "int8", "backend": "quick"}, "quick"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    model = Model()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=words):
        rnnfast.accelerate(model, **options)
    assert before == dict(model.named_modules())


def test_a_root_cannot_be_replaced() -> None:
    for root in (nn.LSTM(2, 3), rnnfast.GRUCell(2, 3), Own(2, 3)):
        with pytest.raises(ValueError, match=r"is the root.*rnnfast\.freeze\(module, weights="):
            rnnfast.accelerate(root, weights="int8")
    model = nn.Sequential(nn.LSTM(2, 3))
    rnnfast.accelerate(model, weights="int8", keep_float=True)
    assert rnnfast.restore(model[0]).left == {
        "": "is frozen and the root: restore the model that holds it"
    }
    assert rnnfast.accelerate(model[0], weights="int8").left == {
        "": "is frozen already, with weights='int8'"
    }


# ---- the modules that are kept ----


def test_restore_puts_the_same_modules_back() -> None:
    model = Model()
    before, expected = dict(model.named_modules(remove_duplicate=False)), run(model)
    rnnfast.accelerate(model, weights="int8", keep_float=True)
    assert not torch.equal(run(model), expected)
    report = rnnfast.restore(model)
    assert report.replaced == NAMES
    assert report.left == {}
    assert dict(model.named_modules(remove_duplicate=False)) == before
    assert torch.equal(run(model), expected)
    assert rnnfast.restore(model).left == {"layers.0": "was not torch.nn's before"}


def test_restore_undoes_both_ways_of_accelerating() -> None:
    model = nn.ModuleDict({"a": nn.LSTM(4, 5), "b": nn.LSTM(4, 5), "c": Inherits(4, 5)})
    before = {name: (each, type(each)) for name, each in model.items()}
    rnnfast.accelerate(nn.Sequential(model["a"]))
    rnnfast.accelerate(nn.Sequential(model["c"]), keep_class=True)
    rnnfast.accelerate(model, weights="float32", keep_float=True)
    assert all(isinstance(each, FrozenLayers) for each in model.values())
    report = rnnfast.restore(model)
    assert report.replaced.keys() == {"a", "b", "c"}
    assert report.replaced["a"] == "LSTM"
    assert report.replaced["c"].endswith("Inherits")
    assert {name: (each, type(each)) for name, each in model.items()} == before


class Inherits(nn.LSTM):
    pass


def test_restore_says_what_was_not_kept() -> None:
    model = Model()
    rnnfast.accelerate(model, weights="int8")
    before = dict(model.named_modules())
    report = rnnfast.restore(model)
    assert report.replaced == {}
    assert report.left == dict.fromkeys(NAMES, "is frozen, and its float module was not kept")
    assert before == dict(model.named_modules())


def test_float_weights_are_freed_unless_they_are_kept() -> None:
    for keep_float in (False, True):
        model = Model()
        weight = weakref.ref(model.again.weight_hh_l0)
        rnnfast.accelerate(model, weights="int8", keep_float=keep_float)
        assert (weight() is not None) is keep_float


def test_what_is_kept_is_no_part_of_the_model() -> None:
    model, plain = Model(), Model()
    rnnfast.accelerate(model, weights="int8", keep_float=True)
    rnnfast.accelerate(plain, weights="int8")
    for names in (
        lambda m: [name for name, _ in m.named_parameters()],
        lambda m: [name for name, _ in m.named_buffers()],
        lambda m: [name for name, _ in m.named_modules()],
        lambda m: list(m.state_dict()),
        repr,
    ):
        assert names(model) == names(plain)


def test_what_is_kept_stays_as_it_was() -> None:
    model, other = Model(), Model()
    weight = model.layers[1].weight_hh_l0.detach().clone()
    rnnfast.accelerate(model, weights="int8", keep_float=True)
    y = model.layers[1](torch.ones(2, 1, 16))[0]
    model.double().half().float()
    assert torch.equal(model.layers[1](torch.ones(2, 1, 16))[0], y)
    rnnfast.accelerate(other, weights="int8")
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.layers[1](torch.ones(2, 1, 16))[0], run_layer(other))
    rnnfast.restore(model)
    assert torch.equal(model.layers[1].weight_hh_l0, weight)
    assert model.layers[1].weight_hh_l0.dtype is torch.float32


def run_layer(model: nn.Module) -> Tensor:
    return model.layers[1](torch.ones(2, 1, 16))[0]


def test_modes_pass_through_what_is_frozen() -> None:
    model = Model()
    model.layers[0].eval()
    rnnfast.accelerate(model, weights="int8", keep_float=True)
    assert not model.layers[0].training
    assert model.layers[1].training
    rnnfast.restore(model)
    assert not model.layers[0].training
    assert model.layers[1].training
    rnnfast.accelerate(model, weights="int8", keep_float=True)
    model.eval()
    rnnfast.restore(model)
    assert not any(each.training for each in model.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_save])
def test_copies_keep_it_too(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = Model()
    exact = run(model)
    rnnfast.accelerate(model, weights="int8", keep_float=True)
    other = copied(model)
    assert torch.equal(run(other), run(model))
    report = rnnfast.restore(other)
    assert report.replaced == NAMES
    assert other.again is other.layers[1]
    assert torch.equal(run(other), exact)
    assert isinstance(model.again, FrozenLayers)
    with torch.no_grad():
        other.again.weight_hh_l0.zero_()
    rnnfast.restore(model)
    assert torch.equal(run(model), exact)


def test_parametrized_modules() -> None:
    model = nn.Sequential(nn.LSTM(4, 5))
    parametrizations.spectral_norm(model[0], "weight_hh_l0")
    x, before = torch.randn(3, 2, 4), model[0]
    expected = model.eval()(x)[0].detach()
    rnnfast.accelerate(model.train(), weights="float32", keep_float=True)
    torch.testing.assert_close(model(x)[0], expected, rtol=2e-6, atol=2e-6)
    rnnfast.restore(model)
    assert model[0] is before
    assert all(each.training for each in model.modules())
    assert torch.equal(model.eval()(x)[0], expected)


def test_compile_and_export_with_what_is_kept() -> None:
    model = Model().eval().requires_grad_(False)
    rnnfast.accelerate(model, weights="int8", keep_float=True)
    expected = run(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), expected, rtol=1e-6, atol=1e-6)
    program = torch.export.export(model, (TOKENS,))
    assert len(list(program.parameters())) == len(list(model.parameters()))
    torch.testing.assert_close(program.module()(TOKENS), expected, rtol=1e-6, atol=1e-6)
