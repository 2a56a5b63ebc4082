"""Modules that are accelerated and remain instances of their former classes."""

from __future__ import annotations

import copy
import io
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnfast
from rnnfast import acceleration
from rnnfast.acceleration import _OURS

kinds = pytest.mark.parametrize("theirs", _OURS, ids=lambda kind: kind.__name__)


def keep(module: nn.Module) -> nn.Module:
    report = rnnfast.accelerate(module, keep_class=True)
    assert report.left == {}
    assert report.replaced
    return module


def tensors(result: Any) -> list[Tensor]:
    """Returns the floating-point tensors in nested containers, in order."""
    if isinstance(result, Tensor):
        return [result] if result.is_floating_point() else []
    return [] if result is None else [tensor for part in result for tensor in tensors(part)]


def outcome(module: nn.Module, *args: Any) -> list[Tensor]:
    """Returns results for one seed, and gradients of a loss that weights them differently."""
    torch.manual_seed(1)
    module.zero_grad()
    results = tensors(module(*args))
    sum((i + 1) * y.sin().sum() for i, y in enumerate(results)).backward()
    return [*results, *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


def input_for(theirs: type[nn.Module]) -> Tensor:
    return torch.randn((2, 3) if issubclass(theirs, nn.RNNCellBase) else (5, 2, 3))


@kinds
def test_both_classes(theirs: type[nn.Module]) -> None:
    module, x = theirs(3, 4), input_for(theirs)
    before, attributes, text = outcome(module, x), dict(vars(module)), repr(module)
    keep(module)
    assert isinstance(module, theirs)
    assert isinstance(module, _OURS[theirs])
    assert type(module).forward is _OURS[theirs].forward
    assert repr(module) == text
    torch.testing.assert_close(outcome(module, x), before)
    report = rnnfast.restore(module)
    assert report.replaced == {"": theirs.__name__}
    assert type(module) is theirs
    assert vars(module).keys() == attributes.keys()
    assert all(vars(module)[name] is value for name, value in attributes.items())
    torch.testing.assert_close(outcome(module, x), before, rtol=0, atol=0)


def test_what_only_ours_offer() -> None:
    module, x = keep(nn.LSTM(3, 4)), torch.randn(5, 2, 3)
    assert module(x, lengths=[5, 2], return_cells=True)[2].shape == (5, 2, 4)
    with rnnfast.explain.record_gates(module) as record:
        module(x)
    assert record["l0"]["forget"].shape == (5, 2, 4)


def test_one_class_for_each_former_one() -> None:
    first, second, other = (keep(kind(3, 4)) for kind in (nn.GRU, nn.GRU, Named))
    assert type(first) is type(second)
    assert type(first) is not type(other)


class Named(nn.GRU):
    """A subclass without a forward, with attributes and methods of its own."""

    label = "names"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.activation = nn.Tanh()

    def init_hidden(self, batch: int) -> Tensor:
        return torch.zeros(1, batch, self.hidden_size)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.label}"


class NamedCell(nn.LSTMCell):
    pass


class ZeroLength(ABC, nn.RNNBase):
    """A class like those of pytorch-forecasting, whose forward calls torch.nn's through super()."""

    @abstractmethod
    def init_hidden_state(self, x: Tensor) -> Any: ...

    def forward(self, x: Any, hx: Any = None, lengths: Any = None) -> Any:
        if lengths is None:
            return super().forward(x, hx=hx)
        packed = pack_padded_sequence(
            x, lengths.clamp(min=1), batch_first=self.batch_first, enforce_sorted=False
        )
        output, state = super().forward(packed, hx=hx)
        kept = [s.masked_fill((lengths == 0)[None, :, None], 0) for s in state]
        return pad_packed_sequence(output, batch_first=self.batch_first)[0], tuple(kept)


class ZeroLengthLSTM(ZeroLength, nn.LSTM):
    def init_hidden_state(self, x: Tensor) -> Any:
        zeros = torch.zeros(self.num_layers, x.shape[0], self.hidden_size)
        return zeros, zeros


SUBCLASSES: dict[type[nn.Module], Callable[[], tuple[Any, ...]]] = {
    Named: lambda: (torch.randn(5, 2, 3),),
    NamedCell: lambda: (torch.randn(2, 3),),
    ZeroLengthLSTM: lambda: (torch.randn(5, 2, 3), None, torch.tensor([5, 0])),
}


@pytest.mark.parametrize("kind", SUBCLASSES)
def test_subclasses(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    module, args = kind(3, 4), SUBCLASSES[kind]()
    before, text = outcome(module, *args), repr(module)
    path = f"{__name__}.{kind.__name__}"
    theirs = acceleration.torch_class_of(kind)
    assert rnnfast.accelerate(module).left == {
        "": f"{path} is a subclass of torch.nn.{theirs.__name__}"
    }
    assert rnnfast.accelerate(module, keep_class=True).replaced == {"": path}
    assert isinstance(module, kind)
    assert repr(module) == text
    torch.testing.assert_close(outcome(module, *args), before)
    monkeypatch.setattr(theirs, "forward", lambda *args: pytest.fail("torch.nn's forward ran"))
    outcome(module, *args)
    monkeypatch.undo()
    assert rnnfast.restore(module).replaced == {"": path}
    assert type(module) is kind
    torch.testing.assert_close(outcome(module, *args), before, rtol=0, atol=0)


class OwnForward(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:
        return x


class OwnCheck(nn.LSTM):
    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        raise ValueError


class OwnTokens(nn.LSTM):
    tokens = ("a", "b")


class OwnOptions(nn.LSTM):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._options = {"a": 1}


class Final(nn.LSTM):
    def __init_subclass__(cls) -> None:
        raise TypeError("final")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (OwnForward, "{} has its own forward, which does not call super().forward"),
        (OwnCheck, "{} has its own check_input"),
        (OwnTokens, "{} has an attribute tokens"),
        (OwnOptions, "has an attribute _options"),
        (Final, "no class can be derived from {}: final"),
    ],
)
def test_subclasses_that_are_left(kind: type[nn.Module], reason: str) -> None:
    module = kind(3, 4)
    report = rnnfast.accelerate(module, keep_class=True)
    assert report.left == {"": reason.format(f"{__name__}.{kind.__name__}")}
    assert type(module) is kind


class Encoder(nn.Module):
    """A class like d2l's RNNModel and many others, which checks the class to know the state."""

    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.recurrent = recurrent

    def begin_state(self, batch: int) -> Any:
        shape = (self.recurrent.num_layers, batch, self.recurrent.hidden_size)
        if not isinstance(self.recurrent, nn.LSTM):
            return torch.zeros(shape)
        return torch.zeros(shape), torch.zeros(shape)

    def forward(self, x: Tensor) -> Any:
        return self.recurrent(x, self.begin_state(x.shape[1]))


@pytest.mark.parametrize("theirs", [nn.RNN, nn.LSTM, nn.GRU])
def test_the_state_of_a_model_that_asks_for_the_class(theirs: type[nn.Module]) -> None:
    model, x = Encoder(theirs(3, 4, 2)), torch.randn(5, 2, 3)
    before = outcome(model, x)
    torch.testing.assert_close(outcome(keep(model), x), before)


def test_a_model_that_masks_what_is_no_lstm() -> None:
    """A model like TorchRL's LSTMModule, for batches with resets."""

    def run(module: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
        if isinstance(module, nn.LSTM):
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return pad_packed_sequence(module(packed)[0], batch_first=True)[0]
        return module(x, mask=torch.arange(x.shape[1]) < lengths[:, None])[0]

    module, x = nn.LSTM(3, 4, batch_first=True), torch.randn(2, 5, 3)
    lengths = torch.tensor([3, 5])
    before = run(module, x, lengths)
    torch.testing.assert_close(run(keep(module), x, lengths), before)


def test_initialisers_find_the_modules() -> None:
    model = keep(nn.Sequential(nn.LSTM(3, 4), NamedCell(3, 4)))

    def initialise(module: nn.Module) -> None:
        if isinstance(module, (nn.LSTM, nn.LSTMCell)):
            for parameter in module.parameters():
                nn.init.constant_(parameter, 0.5)

    model.apply(initialise)
    assert all((parameter == 0.5).all() for parameter in model.parameters())


def through_save(module: nn.Module) -> nn.Module:
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    return torch.load(saved, weights_only=False)


COPIES = [
    copy.copy,
    copy.deepcopy,
    through_save,
    *(lambda m, p=p: pickle.loads(pickle.dumps(m, p)) for p in range(pickle.HIGHEST_PROTOCOL + 1)),
]


@pytest.mark.parametrize("through", COPIES)
@pytest.mark.parametrize("kind", [nn.LSTM, *SUBCLASSES])
def test_copies(kind: type[nn.Module], through: Callable[[nn.Module], nn.Module]) -> None:
    args = SUBCLASSES.get(kind, SUBCLASSES[Named])()
    module = kind(3, 4)
    rnnfast.accelerate(module, keep_class=True, backend="reference")
    before = outcome(module, *args)
    other = through(module)
    assert type(other) is type(module)
    assert other.backend == "reference"
    torch.testing.assert_close(outcome(other, *args), before, rtol=0, atol=0)
    rnnfast.restore(other)
    assert type(other) is kind


@pytest.mark.parametrize("kind", [nn.LSTM, nn.RNNCell, *SUBCLASSES])
def test_more_of_the_same_class(kind: type[nn.Module]) -> None:
    """``type(module)(...)`` makes what the former class would make, accelerated."""
    module = keep(kind(3, 4))
    torch.manual_seed(2)
    other = type(module)(3, 4, bias=False)
    torch.manual_seed(2)
    expected = kind(3, 4, bias=False)
    assert type(other) is type(module)
    torch.testing.assert_close(other.state_dict(), expected.state_dict(), rtol=0, atol=0)
    args = SUBCLASSES[kind]() if kind in SUBCLASSES else (input_for(kind),)
    torch.testing.assert_close(outcome(other, *args), outcome(expected, *args))
    assert rnnfast.restore(other).replaced
    assert type(other) is kind


@pytest.mark.parametrize("kind", [nn.LSTM, *SUBCLASSES])
def test_parametrizations(kind: type[nn.Module]) -> None:
    module, args = kind(3, 4), SUBCLASSES.get(kind, SUBCLASSES[Named])()
    name = next(name for name, _ in module.named_parameters() if "weight_hh" in name)
    parametrizations.weight_norm(module, name)
    before = outcome(module, *args)
    torch.testing.assert_close(outcome(keep(module), *args), before)
    assert isinstance(module, kind)
    rnnfast.restore(module)
    assert parametrize.type_before_parametrizations(module) is kind
    keep(module)
    parametrize.remove_parametrizations(module, name)
    assert isinstance(module, kind)
    rnnfast.restore(module)
    assert type(module) is kind


def test_from_one_mode_to_the_other() -> None:
    model = nn.ModuleList([nn.GRU(3, 4), Named(3, 4)])
    assert rnnfast.accelerate(model).replaced == {"0": "GRU"}
    assert rnnfast.accelerate(model, keep_class=True, backend="aten").replaced.keys() == {"0", "1"}
    assert [isinstance(module, nn.GRU) for module in model] == [True, True]
    assert [module.backend for module in model] == ["aten", "aten"]
    report = rnnfast.accelerate(model)
    assert (report.replaced, report.left.keys()) == ({"0": "GRU"}, {"1"})
    assert [type(module) for module in model] == [rnnfast.GRU, Named]


@pytest.mark.parametrize("keep_class", [False, True])
def test_settings_survive_a_second_call(keep_class: bool) -> None:
    module = nn.GRU(3, 4)
    rnnfast.accelerate(module, keep_class=keep_class)
    module.recompute = True
    rnnfast.accelerate(module, keep_class=keep_class, backend="aten")
    assert (module.recompute, module.backend) == (True, "aten")
    rnnfast.restore(module)
    assert not hasattr(module, "recompute")


def test_errors_are_torchs() -> None:
    module = keep(nn.LSTM(3, 4))
    with pytest.raises(RuntimeError, match=r"input\.size\(-1\) must be equal to input_size"):
        module(torch.randn(5, 2, 7))


def test_compiled() -> None:
    """The graph breaks at the module, like at torch.nn's."""
    torch.compiler.reset()
    model, x = nn.Sequential(nn.LSTM(3, 4)), torch.randn(5, 2, 3)
    before = outcome(model, x)
    keep(model)
    torch.testing.assert_close(outcome(torch.compile(model, backend="aot_eager"), x), before)
    with pytest.raises(Exception, match="RNN, GRU, or LSTM"):
        torch.compile(model, backend="eager", fullgraph=True)(x)
