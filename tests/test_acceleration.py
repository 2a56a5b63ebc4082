"""Modules of torch.nn inside a model are replaced by rnnfast's, and back."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnnfast
from rnnfast import sequences
from rnnfast.acceleration import _OURS
from rnnfast.backend import EXTENSION

LAYERS = {
    "RNN": {},
    "RNN_relu": {"nonlinearity": "relu"},
    "GRU": {},
    "LSTM": {},
    "LSTM_proj": {"proj_size": 2},
}
CELLS = {"RNNCell": {}, "RNNCell_relu": {"nonlinearity": "relu"}, "GRUCell": {}, "LSTMCell": {}}
OPTIONS = [
    {},
    {"bias": False},
    {"batch_first": True},
    {"bidirectional": True},
    {"num_layers": 2, "dropout": 0.5},
    {
        "num_layers": 3,
        "dropout": 0.3,
        "bidirectional": True,
        "batch_first": True,
        "bias": False,
    },
]
MODULES = [
    *((name, own, options) for name, own in LAYERS.items() for options in OPTIONS),
    *((name, own, {"bias": bias}) for name, own in CELLS.items() for bias in (True, False)),
]

dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
kinds = pytest.mark.parametrize("theirs", _OURS, ids=lambda kind: kind.__name__)


def tensors(result: Any) -> Iterator[Tensor]:
    """Returns the tensors in nested containers, in order."""
    if isinstance(result, Tensor):
        yield result
    elif result is not None:
        for part in result:
            yield from tensors(part)


def outcome(model: nn.Module, *args: Any) -> dict[str, Tensor]:
    """Returns results for one seed, and gradients of a loss that weights them differently."""
    torch.manual_seed(1)
    model.zero_grad()
    results = list(tensors(model(*args)))
    sum((i + 1) * y.sin().sum() for i, y in enumerate(results) if y.is_floating_point()).backward()
    found = {f"result {i}": y.detach() for i, y in enumerate(results)}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad
    return found


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compares float32 with torch's tolerances, and float64 to rounding errors."""
    double = any(tensor.dtype == torch.float64 for tensor in expected.values())
    bounds = {"rtol": 1e-12, "atol": 1e-12} if double else {}
    torch.testing.assert_close(actual, expected, **bounds)


def assert_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_save(model: nn.Module) -> nn.Module:
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    return torch.load(saved, weights_only=False)


class Tagger(nn.Module):
    """Labels the tokens of sequences of several lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5, padding_idx=0)
        self.lstm = nn.LSTM(5, 6, 2, batch_first=True, bidirectional=True, dropout=0.3)
        self.head = nn.Linear(12, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        lengths = (tokens != 0).sum(1)
        packed = pack_padded_sequence(
            self.embedding(tokens), lengths, batch_first=True, enforce_sorted=False
        )
        output, (h_n, _) = self.lstm(packed)
        padded, _ = pad_packed_sequence(output, batch_first=True)
        return self.head(padded) + h_n.mean()


class Translator(nn.Module):
    """A bidirectional encoder, and a decoder that attends to it step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.encoder = nn.GRU(5, 6, bidirectional=True, batch_first=True)
        self.bridge = nn.Linear(12, 6)
        self.keys = nn.Linear(12, 6, bias=False)
        self.queries = nn.Linear(6, 6)
        self.energy = nn.Linear(6, 1)
        self.decoder = nn.LSTMCell(5 + 12, 6)
        self.head = nn.Linear(6, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        memory, h_n = self.encoder(self.embedding(tokens))
        state = self.bridge(torch.cat([h_n[0], h_n[1]], dim=1))
        h, c = state, torch.zeros_like(state)
        keys, logits = self.keys(memory), []
        for embedded in self.embedding(tokens.flip(1)).unbind(1):
            weights = self.energy(torch.tanh(keys + self.queries(h)[:, None])).softmax(1)
            context = (weights * memory).sum(1)
            h, c = self.decoder(torch.cat([embedded, context], dim=1), (h, c))
            logits.append(self.head(h))
        return torch.stack(logits, dim=1)


class Zoo(nn.Module):
    """Recurrent modules in every container, reached by names, by a property and by a list."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.stack = nn.ModuleList([nn.RNN(5, 5), nn.LSTM(5, 5)])
        self.by_name = nn.ModuleDict({"gru": nn.GRU(5, 5), "cell": nn.GRUCell(5, 5)})
        self.rounds = [self.core, self.by_name["gru"], self.core]

    @property
    def core(self) -> nn.Module:
        return self.stack[1]

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens)
        for module in [*self.stack, *self.rounds]:
            x = x + module(x)[0]
        return x, self.by_name["cell"](x[0])


MODELS = {
    Tagger: {"lstm": "LSTM"},
    Translator: {"encoder": "GRU", "decoder": "LSTMCell"},
    Zoo: {"stack.0": "RNN", "stack.1": "LSTM", "by_name.gru": "GRU", "by_name.cell": "GRUCell"},
}
TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [7, 8, 0, 0, 0]])


class Cell(nn.LSTMCell):
    """A class of the user, with any code of its own."""


class OwnBase(nn.RNNBase):
    def __init__(self) -> None:
        super().__init__("GRU", 3, 4)


@dtypes
@pytest.mark.parametrize(("name", "own", "options"), MODULES, ids=str)
def test_numbers_stay(
    name: str, own: dict[str, Any], options: dict[str, Any], dtype: torch.dtype
) -> None:
    kind = name.split("_")[0]
    module = getattr(nn, kind)(3, 4, **own, **options, dtype=dtype)
    x = torch.randn((2, 3) if name in CELLS else (5, 2, 3), dtype=dtype)
    before = outcome(module, x)
    rnnfast.accelerate(module)
    assert type(module) is getattr(rnnfast, kind)
    assert_close(outcome(module, x), before)
    rnnfast.restore(module)
    assert type(module) is getattr(nn, kind)
    assert_bits(outcome(module, x), before)


@dtypes
@pytest.mark.parametrize(("name", "own"), LAYERS.items(), ids=str)
def test_packed_sequences(name: str, own: dict[str, Any], dtype: torch.dtype) -> None:
    module = getattr(nn, name.split("_")[0])(3, 4, 2, bidirectional=True, **own, dtype=dtype)
    x = torch.randn(5, 3, 3, dtype=dtype)
    packed = pack_padded_sequence(x, torch.tensor([2, 5, 3]), enforce_sorted=False)
    before = outcome(module, packed)
    rnnfast.accelerate(module)
    assert isinstance(module(packed)[0], PackedSequence)
    assert_close(outcome(module, packed), before)


@dtypes
@pytest.mark.parametrize("model", MODELS)
def test_models_are_unchanged(model: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    module = model().to(dtype)
    before, state = outcome(module, TOKENS), module.state_dict()
    named = list(module.named_parameters())
    report = rnnfast.accelerate(module)
    assert report == (module, MODELS[model], {})
    for name, kind in MODELS[model].items():
        assert type(module.get_submodule(name)) is getattr(rnnfast, kind)
    for (name, parameter), (other, now) in zip(named, module.named_parameters(), strict=True):
        assert name == other
        assert parameter is now
    assert list(module.state_dict()) == list(state)
    assert_close(outcome(module, TOKENS), before)
    assert rnnfast.restore(module) == report
    assert_bits(outcome(module, TOKENS), before)
    module.load_state_dict(state)


@pytest.mark.parametrize("model", MODELS)
def test_training_goes_on(model: Callable[[], nn.Module]) -> None:
    ours = model().double()
    theirs = copy.deepcopy(ours)
    for module in (ours, theirs):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
        for step in range(6):
            if module is ours and step == 2:
                rnnfast.accelerate(ours)
            if module is ours and step == 4:
                rnnfast.restore(ours)
            torch.manual_seed(step)
            loss = next(tensors(module(TOKENS))).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-9, atol=1e-9)


def test_flags_stay() -> None:
    model = Zoo()
    model.stack[0].eval()
    model.stack[1].weight_hh_l0.requires_grad_(False)
    model.core.register_buffer("steps", torch.tensor(3))
    flags = [(name, each.training) for name, each in model.named_modules()]
    rnnfast.accelerate(model)
    assert [(name, each.training) for name, each in model.named_modules()] == flags
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["stack.1.weight_hh_l0"]
    assert [name for name, _ in model.named_buffers()] == ["stack.1.steps"]


@kinds
def test_hooks_fire(theirs: type[nn.Module]) -> None:
    model = nn.Sequential(theirs(3, 4))
    module, events = model[0], []

    def hook(name: str) -> Callable[..., None]:
        return lambda *_: events.append(name)

    module.register_forward_pre_hook(hook("forward pre"))
    module.register_forward_hook(hook("forward"))
    module.register_full_backward_pre_hook(hook("backward pre"))
    module.register_full_backward_hook(hook("backward"))
    module.register_state_dict_pre_hook(hook("state_dict pre"))
    module.register_state_dict_post_hook(hook("state_dict"))
    module.register_load_state_dict_pre_hook(hook("load_state_dict pre"))
    module.register_load_state_dict_post_hook(hook("load_state_dict"))

    def run() -> list[str]:
        events.clear()
        outcome(model, torch.randn(2, 3, requires_grad=True))
        model.load_state_dict(model.state_dict())
        return list(events)

    before = run()
    assert len(set(before)) == 8
    rnnfast.accelerate(model)
    assert run() == before
    rnnfast.restore(model)
    assert run() == before


def test_ties_stay() -> None:
    gru, other = nn.GRU(3, 3), nn.GRU(3, 3)
    other.weight_hh_l0 = gru.weight_hh_l0
    model = nn.ModuleDict({"a": gru, "b": nn.ModuleList([gru]), "c": other})
    names = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    report = rnnfast.accelerate(model)
    assert report.replaced == {"a": "GRU", "c": "GRU"}
    assert model["a"] is model["b"][0] is gru
    assert type(gru) is rnnfast.GRU
    assert other.weight_hh_l0 is gru.weight_hh_l0
    assert (list(model.state_dict()), [name for name, _ in model.named_parameters()]) == names


def test_what_is_not_registered_stays() -> None:
    model = nn.Module()
    model.hidden = [nn.GRU(3, 4)]
    assert rnnfast.accelerate(model) == (model, {}, {})
    assert type(model.hidden[0]) is nn.GRU


def _old_weight_norm(module: nn.Module) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(module, "weight_hh_l0")


PARAMETRIZATIONS = {
    "weight_norm": lambda module: parametrizations.weight_norm(module, "weight_hh_l0"),
    "orthogonal": lambda module: parametrizations.orthogonal(module, "weight_hh_l0"),
    "spectral_norm": lambda module: parametrizations.spectral_norm(module, "weight_hh_l0"),
    "two": lambda module: [
        parametrizations.weight_norm(module, name) for name in ("weight_hh_l0", "weight_ih_l0")
    ],
    "old weight_norm": _old_weight_norm,
    "old spectral_norm": lambda module: nn.utils.spectral_norm(module, "weight_hh_l0"),
    "pruning": lambda module: prune.l1_unstructured(module, "weight_hh_l0", 0.5),
}


@pytest.mark.parametrize("how", PARAMETRIZATIONS)
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_parametrizations_stay(kind: str, how: str) -> None:
    module = getattr(nn, kind)(3, 4, dtype=torch.float64)
    PARAMETRIZATIONS[how](module)
    module.eval()  # in training, every forward of spectral_norm advances its power iteration
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    before, state = outcome(module, x), copy.deepcopy(module.state_dict())
    parameters = list(module.parameters())
    report = rnnfast.accelerate(module)
    assert report.replaced == {"": kind}
    assert isinstance(module, getattr(rnnfast, kind))
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert_bits(module.state_dict(), state)
    assert_close(outcome(module, x), before)
    rnnfast.restore(module)
    assert isinstance(module, getattr(nn, kind))
    assert_bits(outcome(module, x), before)


def test_parametrized_copies_are_their_own() -> None:
    module = parametrizations.weight_norm(nn.GRU(3, 4), "weight_hh_l0")
    other = copy.deepcopy(module)
    rnnfast.accelerate(module)
    assert isinstance(other, nn.GRU)
    third = copy.deepcopy(module)
    rnnfast.restore(module)
    assert isinstance(third, rnnfast.GRU)
    x = torch.randn(5, 2, 3)
    for each in (other, third):
        assert_close(outcome(each, x), outcome(module, x))


@kinds
def test_parametrizations_come_and_go(theirs: type[nn.Module]) -> None:
    module = theirs(3, 4)
    name = next(name for name, _ in module.named_parameters() if "weight_hh" in name)
    x = torch.randn(2, 3)
    before = outcome(module, x)
    rnnfast.accelerate(module)
    parametrizations.weight_norm(module, name)
    rnnfast.restore(module)
    assert isinstance(module, theirs)
    rnnfast.accelerate(module)
    parametrize.remove_parametrizations(module, name)
    assert type(module) is _OURS[theirs]
    after = outcome(module, x)
    assert_close({key: after[key] for key in before}, before)


@pytest.mark.parametrize("through", [copy.deepcopy, through_pickle, through_save])
@pytest.mark.parametrize("model", MODELS)
def test_copies(model: Callable[[], nn.Module], through: Callable[[nn.Module], nn.Module]) -> None:
    module = model().double()
    before = outcome(module, TOKENS)
    report = rnnfast.accelerate(module, backend="aten")
    other = through(module)
    assert {other.get_submodule(name).backend for name in report.replaced} == {"aten"}
    accelerated = outcome(module, TOKENS)
    assert_bits(outcome(other, TOKENS), accelerated)
    assert rnnfast.restore(other) == (other, *report[1:])
    for name, kind in report.replaced.items():
        assert type(other.get_submodule(name)) is getattr(nn, kind)
        assert type(module.get_submodule(name)) is getattr(rnnfast, kind)
    assert_bits(outcome(other, TOKENS), before)
    assert_bits(outcome(module, TOKENS), accelerated)


@kinds
def test_restored_is_as_new(theirs: type[nn.Module]) -> None:
    module = theirs(3, 4)
    before = dict(vars(module))
    rnnfast.accelerate(module, backend="aten")
    rnnfast.restore(module)
    assert vars(module).keys() == before.keys()
    assert all(vars(module)[name] is value for name, value in before.items())


def test_backend_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    reference = sequences._LAYERS["reference"]
    monkeypatch.setitem(
        sequences._LAYERS, "reference", lambda *args: ran.append(args[0].name) or reference(*args)
    )
    model = Zoo()
    rnnfast.accelerate(model, backend="reference")
    model(TOKENS)
    assert ran == ["elman_tanh", "lstm", "lstm", "gru", "lstm", "gru"]


def test_twice() -> None:
    model = nn.ModuleList([nn.GRU(3, 4), rnnfast.GRU(3, 4, backend="aten")])
    first = rnnfast.accelerate(model, backend="reference")
    assert [module.backend for module in model] == ["reference", "aten"]
    assert rnnfast.accelerate(model) == first
    assert [module.backend for module in model] == [None, "aten"]
    assert rnnfast.restore(model).replaced == {"0": "GRU"}
    assert rnnfast.restore(model).replaced == {}
    assert [type(module) for module in model] == [nn.GRU, rnnfast.GRU]
    assert model[1].backend == "aten"


def test_unknown_backend_changes_nothing() -> None:
    model = Zoo()
    with pytest.raises(ValueError, match="backend should be one of"):
        rnnfast.accelerate(model, backend="cudnn")
    assert type(model.core) is nn.LSTM


def test_class_of_the_result() -> None:
    module = rnnfast.accelerate(nn.LSTM(3, 4)).module
    assert not isinstance(module, nn.LSTM)
    assert isinstance(module, nn.RNNBase)


def test_what_is_left() -> None:
    patched, hooked, named = nn.GRU(3, 4), nn.LSTM(3, 4), nn.RNN(3, 4)
    patched.forward = lambda x: x
    hooked.permute_hidden = lambda hx, permutation: hx
    named.backend = "the user's"
    model = nn.ModuleDict(
        {
            "subclass": Cell(3, 4),
            "parametrized": parametrizations.weight_norm(Cell(3, 4), "weight_hh"),
            "base": OwnBase(),
            "quantizable": torch.ao.nn.quantizable.LSTMCell(3, 4),
            "quantized": torch.ao.nn.quantized.dynamic.GRU(3, 4),
            "traced": torch.jit.trace(nn.GRU(3, 4), torch.randn(5, 2, 3)),
            "traced_linear": torch.jit.trace(nn.Linear(3, 4), torch.randn(5, 3)),
            "patched": patched,
            "hooked": hooked,
            "named": named,
            "ours": rnnfast.GRU(3, 4),
            "linear": nn.Linear(3, 4),
            "gru": nn.GRU(3, 4),
        }
    )
    classes = {name: type(module) for name, module in model.named_modules()}
    report = rnnfast.accelerate(model)
    ao = "torch.ao.nn"
    assert report.replaced == {"gru": "GRU"}
    assert report.left == {
        "subclass": f"{__name__}.Cell is a subclass of torch.nn.LSTMCell",
        "parametrized": f"{__name__}.Cell is a subclass of torch.nn.LSTMCell",
        "base": f"{__name__}.OwnBase is not of torch.nn",
        "quantizable": f"{ao}.quantizable.modules.rnn.LSTMCell is not of torch.nn",
        "quantized": f"{ao}.quantized.dynamic.modules.rnn.GRU is not of torch.nn",
        "traced": "is compiled by TorchScript",
        "patched": "has its own forward, set on the instance",
        "hooked": "has its own permute_hidden, set on the instance",
        "named": "has an attribute backend",
        "ours": "is rnnfast's already",
    }
    now = {name: type(module) for name, module in model.named_modules()}
    assert now == {**classes, "gru": rnnfast.GRU}
    assert rnnfast.restore(model) == (
        model,
        {"gru": "GRU"},
        {"ours": "was not torch.nn's before"},
    )
    assert {name: type(module) for name, module in model.named_modules()} == classes


def test_restore_leaves_what_was_changed_since() -> None:
    model = nn.ModuleList([nn.GRU(3, 4), nn.GRU(3, 4)])
    rnnfast.accelerate(model)
    former = model[0].forward
    model[0].forward = lambda x: former(2 * x)
    model[1].__class__ = type("Sharded", (rnnfast.GRU,), {})
    x = torch.randn(5, 2, 3)
    before = outcome(model[0], x)
    assert rnnfast.restore(model).left == {
        "0": "has its own forward, set on the instance",
        "1": f"its class is {__name__}.Sharded by now",
    }
    assert_bits(outcome(model[0], x), before)
    assert isinstance(model[1], rnnfast.GRU)


def test_report_reads_well() -> None:
    assert str(rnnfast.accelerate(nn.Linear(3, 4))) == "no recurrent modules"
    assert str(rnnfast.accelerate(nn.GRU(3, 4))) == "replaced  (root)  GRU"
    model = nn.ModuleDict({"encoder": nn.GRU(3, 4), "cell": Cell(3, 4)})
    assert str(rnnfast.accelerate(model)).splitlines() == [
        "replaced  encoder  GRU",
        f"left      cell     {__name__}.Cell is a subclass of torch.nn.LSTMCell",
    ]


@kinds
def test_compiled(theirs: type[nn.Module]) -> None:
    model = nn.Sequential(theirs(3, 4))
    x = torch.randn(2, 3) if issubclass(theirs, nn.RNNCellBase) else torch.randn(5, 2, 3)
    before = outcome(model, x)
    # torch's own LSTM, which runs without the extension, breaks the graph
    rnnfast.accelerate(model, backend=None if EXTENSION else "reference")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    after = outcome(compiled, x)
    assert_close({name.removeprefix("_orig_mod."): t for name, t in after.items()}, before)


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_before(in_place: bool) -> None:
    """A model compiled before acceleration is compiled again, in both directions."""
    torch.compiler.reset()
    targets = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
        targets.extend(str(node.target) for part in parts for node in part.graph.nodes)
        return graph.forward

    model = nn.Sequential(nn.GRU(3, 4, dtype=torch.float64))
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    before = outcome(model, x)
    if in_place:
        model.compile(backend=backend)
    compiled = model if in_place else torch.compile(model, backend=backend)
    for change in (None, rnnfast.accelerate, rnnfast.restore):
        if change:
            assert len(change(compiled).replaced) == 1
        after = outcome(compiled, x)
        assert_close({name.removeprefix("_orig_mod."): t for name, t in after.items()}, before)
        fused = change is rnnfast.accelerate and EXTENSION is not None
        assert ("rnnfast.gru.default" in targets) == fused
        targets.clear()


@kinds
def test_data_parallel(theirs: type[nn.Module]) -> None:
    module = theirs(3, 4)
    x = torch.randn(2, 3)
    before = outcome(module, x)
    parallel = nn.DataParallel(module)
    assert rnnfast.accelerate(parallel).replaced == {"module": theirs.__name__}
    after = outcome(parallel, x)
    assert_close({name.removeprefix("module."): t for name, t in after.items()}, before)
    # A replica as devices get it: a module whose parameters are plain attributes.
    replica = module._replicate_for_data_parallel()
    for name, parameter in module.named_parameters():
        setattr(replica, name, parameter * 1)
    assert not list(replica.parameters())
    expected = list(tensors(module(x)))
    torch.testing.assert_close(list(tensors(replica(x))), expected, rtol=0, atol=0)


@pytest.mark.parametrize("model", MODELS)
def test_functional_call(model: Callable[[], nn.Module]) -> None:
    module = model().eval()
    other = {name: torch.randn_like(value) for name, value in module.named_parameters()}

    def run() -> list[Tensor]:
        return list(tensors(torch.func.functional_call(module, other, (TOKENS,))))

    before = run()
    rnnfast.accelerate(module)
    torch.testing.assert_close(run(), before)


@kinds
def test_meta_and_dtype(theirs: type[nn.Module]) -> None:
    module = theirs(3, 4, device="meta")
    rnnfast.accelerate(module)
    x = torch.randn(2, 3)
    shapes = [y.shape for y in tensors(module(x.to("meta")))]
    module.to_empty(device="cpu").reset_parameters()
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}
    module.double()
    before = outcome(module, x.double())
    assert shapes == [y.shape for name, y in before.items() if name.startswith("result")]
    rnnfast.restore(module)
    assert_close(outcome(module, x.double()), before)


class Regressor(nn.Module):
    """A layer or a cell inside a model, to be traced."""

    def __init__(self, theirs: type[nn.Module]) -> None:
        super().__init__()
        self.rnn = theirs(4, 8)
        self.out = nn.Linear(8, 2)
        self.several = theirs not in (nn.RNNCell, nn.GRUCell)  # whether there are several results

    def forward(self, x: Tensor) -> Tensor:
        y = self.rnn(x)
        return self.out(y[0] if self.several else y)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("direct", [False, True])
@kinds
def test_jit_trace(theirs: type[nn.Module], direct: bool, grad: bool) -> None:
    """A trace holds the computation, not its result: it is right for other inputs and sizes."""
    is_cell = issubclass(theirs, nn.RNNCellBase)
    shapes = [(3, 4), (5, 4)] if is_cell else [(5, 3, 4), (2, 6, 4)]
    model = Regressor(theirs).eval()
    other = [torch.randn(shape) for shape in shapes]
    expected = [model(x) for x in other]
    if direct:
        ours = getattr(rnnfast, theirs.__name__)(4, 8)
        ours.load_state_dict(model.rnn.state_dict())
        model.rnn = ours
    else:
        rnnfast.accelerate(model)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, torch.randn(shapes[0]))
        torch.testing.assert_close([traced(x) for x in other], expected)


@kinds
def test_fx_trace(theirs: type[nn.Module]) -> None:
    """Modules are leaves of torch.fx graphs, like torch.nn's."""
    model = Regressor(theirs)
    x = torch.randn((3, 4) if issubclass(theirs, nn.RNNCellBase) else (5, 3, 4))
    expected = model(x)
    rnnfast.accelerate(model)
    graph = torch.fx.symbolic_trace(model)
    assert "rnn" in {node.target for node in graph.graph.nodes if node.op == "call_module"}
    torch.testing.assert_close(graph(x), expected)


def test_an_emptied_flatten_parameters_does_not_matter() -> None:
    """Weight-drop layers replace the method on the instance by one that does nothing."""
    module = nn.LSTM(3, 4)
    module.flatten_parameters = lambda: None
    assert rnnfast.accelerate(module).replaced == {"": "LSTM"}
    assert rnnfast.restore(module).replaced == {"": "LSTM"}
