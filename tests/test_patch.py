"""torch.nn's modules are accelerated in place and keep the semantics of torch.nn."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import rnnfast
from rnnfast import bases
from rnnfast.backend import EXTENSION, use_backend

LAYERS = [nn.RNN, nn.LSTM, nn.GRU]
CELLS = [nn.RNNCell, nn.LSTMCell, nn.GRUCell]
FORWARDS = {kind: kind.forward for kind in LAYERS + CELLS}

layers = pytest.mark.parametrize("kind", LAYERS)
kinds = pytest.mark.parametrize("kind", LAYERS + CELLS)


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    with use_backend("auto" if EXTENSION else "reference"):
        yield
    rnnfast.unpatch()
    assert {kind: kind.forward for kind in FORWARDS} == FORWARDS


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the classes for which rnnfast ran a call."""
    calls: list[str] = []

    def count(kind: type[nn.Module]) -> None:
        forward = kind.forward

        def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(type(self).__name__)
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", counted)

    count(bases.Layers)
    count(bases.OneStep)
    return calls


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
    return [*results, *(p.grad.clone() for p in module.parameters())]


def input_for(kind: type[nn.Module], **options: Any) -> Tensor:
    return torch.randn((2, 3) if kind in CELLS else (5, 2, 3), **options)


def state_for(kind: type[nn.Module], **options: Any) -> Any:
    h = torch.randn((2, 4) if kind in CELLS else (1, 2, 4), **options)
    return (h, h + 1) if kind in (nn.LSTM, nn.LSTMCell) else h


def check(module: nn.Module, *args: Any) -> None:
    """Checks that a call gives the same when patched."""
    expected = outcome(module, *args)
    with rnnfast.patch():
        torch.testing.assert_close(outcome(module, *args), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("given", [False, True])
@kinds
def test_numbers(kind: type[nn.Module], given: bool, dtype: torch.dtype, served: list[str]) -> None:
    module = kind(3, 4, dtype=dtype)
    state = [state_for(kind, dtype=dtype)] if given else []
    check(module, input_for(kind, dtype=dtype), *state)
    assert served == [kind.__name__]
    assert type(module) is kind


@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 2, "dropout": 0.5},
        {"bidirectional": True, "batch_first": True},
        {"bias": False},
    ],
    ids=str,
)
@layers
def test_inputs_of_layers(
    kind: type[nn.Module], options: dict[str, Any], served: list[str]
) -> None:
    module = kind(3, 4, **options)
    x = torch.randn(4, 5, 3)
    check(module, x)
    check(module, x[0])
    for enforce_sorted, lengths in ((True, [4, 2, 1, 1, 1]), (False, [1, 4, 2, 3, 1])):
        packed = pack_padded_sequence(
            x[:, : len(lengths)], torch.tensor(lengths), enforce_sorted=enforce_sorted
        )
        check(module, packed)
    assert len(served) == 4
    with rnnfast.patch():
        assert type(module(packed)[0]) is PackedSequence


@pytest.mark.parametrize("cell", CELLS)
def test_inputs_of_cells(cell: type[nn.Module], served: list[str]) -> None:
    check(cell(3, 4), torch.randn(3))
    check(cell(3, 4, bias=False), torch.randn(2, 3))
    assert len(served) == 2


def test_nonlinearity() -> None:
    check(nn.RNN(3, 4, nonlinearity="relu"), torch.randn(5, 2, 3))
    check(nn.RNNCell(3, 4, nonlinearity="relu"), torch.randn(2, 3))


def test_projection() -> None:
    check(nn.LSTM(3, 4, proj_size=2), torch.randn(5, 2, 3))


def test_context_and_calls(served: list[str]) -> None:
    """Existing and new modules; nested contexts; calls undone by hand, in any order."""
    module, x = nn.GRU(3, 4), torch.randn(5, 2, 3)
    with rnnfast.patch():
        with rnnfast.patch():
            module(x)
        nn.GRU(3, 4)(x)
        assert len(served) == 2
    module(x)
    assert len(served) == 2
    rnnfast.patch()
    with rnnfast.patch():
        pass
    module(x)
    assert len(served) == 3
    rnnfast.patch()
    rnnfast.unpatch()
    rnnfast.unpatch()
    module(x)
    assert len(served) == 3
    with pytest.raises(KeyError), rnnfast.patch():
        raise KeyError
    assert nn.GRU.forward is FORWARDS[nn.GRU]


@kinds
def test_what_others_see(kind: type[nn.Module]) -> None:
    """Names, signature, documentation, pickles and copies are those of torch.nn."""
    module = kind(3, 4)
    attributes, saved = vars(module).keys(), pickle.dumps(module)
    with rnnfast.patch():
        module(input_for(kind))
        assert vars(module).keys() == attributes
        assert type(copy.deepcopy(module)) is type(pickle.loads(saved)) is kind
        assert pickle.dumps(module) == saved
        assert kind.forward.__qualname__ == f"{kind.__name__}.forward"
        assert kind.forward.__doc__ == FORWARDS[kind].__doc__
        with pytest.raises(TypeError, match="unexpected keyword argument 'lengths'"):
            module(input_for(kind), lengths=[5, 5])


class NoForward(nn.LSTM):
    """A subclass that adds attributes, but does not change the computation."""

    tokens = "the user's"
    backend = "the user's"

    def init_hidden(self) -> Tensor:
        return torch.zeros(1, 2, 4)


class Doubling(nn.LSTM):
    def forward(self, x: Any, hx: Any = None, scale: float = 2.0) -> Any:
        y, state = super().forward(x, hx=hx)
        return scale * y, state


class Reordering(nn.LSTM):
    """A subclass that changes a method which torch.nn's forward calls."""

    def permute_hidden(self, hx: Any, permutation: Any) -> Any:
        return tuple(-state for state in hx)


class OwnAttributes(nn.LSTM):
    """A subclass that uses rnnfast's attribute names for something else."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.tokens, self.backend, self.recompute = ["a"], object(), 3


@pytest.mark.parametrize(
    ("kind", "ours"),
    [(NoForward, True), (Doubling, True), (Reordering, False), (OwnAttributes, False)],
)
def test_subclasses(kind: type[nn.LSTM], ours: bool, served: list[str]) -> None:
    module = kind(3, 4)
    check(module, torch.randn(5, 2, 3))
    assert served == ["LSTM"] * ours


def test_methods_set_on_the_instance(served: list[str]) -> None:
    module = nn.LSTM(3, 4)
    module.permute_hidden = lambda hx, permutation: tuple(-state for state in hx)
    check(module, torch.randn(5, 2, 3))
    assert served == []
    module = nn.LSTM(3, 4)
    former = module.forward
    module.forward = lambda x: former(2 * x)
    check(module, torch.randn(5, 2, 3))


@layers
def test_weights_are_those_of_torch(kind: type[nn.Module], served: list[str]) -> None:
    """Weights are read from the flat list, which weight-drop layers and functional_call change."""
    x = torch.randn(5, 2, 3)
    normed = parametrizations.weight_norm(kind(3, 4), "weight_hh_l0")
    check(normed, x)
    dropped = kind(3, 4)
    raw = dropped.weight_hh_l0
    del dropped._parameters["weight_hh_l0"]
    dropped.weight_hh_l0_raw = nn.Parameter(raw.detach())
    dropped.weight_hh_l0 = dropped.weight_hh_l0_raw * 0.5
    expected = tensors(dropped(x))
    with rnnfast.patch():
        torch.testing.assert_close(tensors(dropped(x)), expected)
    module = kind(3, 4)
    other = {name: torch.randn_like(value) for name, value in module.named_parameters()}
    expected = tensors(torch.func.functional_call(module, other, (x,)))
    with rnnfast.patch():
        actual = tensors(torch.func.functional_call(module, other, (x,)))
        torch.testing.assert_close(actual, expected)
    module._flat_weights[1] = module._flat_weights[1] * 0  # only the flat list is changed
    check(module, x)
    module = kind(3, 4)
    replica = module._replicate_for_data_parallel()
    for name, parameter in module.named_parameters():
        setattr(replica, name, parameter * 2)  # plain attributes, not parameters
    expected = tensors(replica(x))
    with rnnfast.patch():
        torch.testing.assert_close(tensors(replica(x)), expected)
    assert len(served) == 5


@kinds
def test_outputs_may_be_changed_in_place(kind: type[nn.Module]) -> None:
    """nn.ReLU(inplace=True) and ``state.detach_()`` between two chunks of a sequence do so."""
    module, x = kind(3, 4, dtype=torch.float64), input_for(kind, dtype=torch.float64)

    def run() -> list[Tensor]:
        module.zero_grad()
        first, *rest = tensors(module(x))
        if kind is not nn.RNNCell:  # torch.nn refuses this for the others
            first.mul_(2)
        (first.sum() + sum(r.sum() for r in rest)).backward()
        grads = [p.grad.clone() for p in module.parameters()]
        for state in rest if kind in LAYERS else [first, *rest]:
            state.detach_()
        return grads

    expected = run()
    with rnnfast.patch():
        torch.testing.assert_close(run(), expected)


@pytest.mark.parametrize(
    ("kind", "args"),
    [
        (nn.LSTM, lambda: (torch.randn(5, 2, 7),)),
        (nn.LSTM, lambda: (torch.randn(5, 2, 3).double(),)),
        (nn.LSTM, lambda: (torch.randn(5, 2, 3), torch.randn(1, 2, 4))),
        (nn.LSTM, lambda: (torch.randn(5, 2, 3), (torch.randn(1, 2, 4),) * 3)),
        (nn.GRU, lambda: (torch.randn(5, 2, 3), torch.randn(1, 3, 4))),
        (nn.GRU, lambda: (torch.randn(5, 2, 3), (torch.randn(1, 2, 4),))),
        (nn.RNN, lambda: (torch.randn(3),)),
        (nn.RNN, lambda: (None,)),
        (nn.RNN, lambda: ([[1.0]],)),
        (nn.GRUCell, lambda: (torch.randn(2, 7),)),
        (nn.LSTMCell, lambda: (torch.randn(2, 3), torch.randn(2, 4))),
        (nn.RNNCell, lambda: (torch.randn(2, 2, 3),)),
    ],
)
def test_errors_are_torchs(kind: type[nn.Module], args: Callable[[], Any]) -> None:
    module, given = kind(3, 4), args()
    with pytest.raises(Exception) as expected:  # noqa: PT011
        module(*given)
    with rnnfast.patch(), pytest.raises(type(expected.value)) as actual:
        module(*given)
    assert str(actual.value) == str(expected.value)


class Labelled(Tensor):
    """A tensor subclass that records the functions called with it."""

    seen: list[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize(("kind", "name"), [(nn.LSTM, "lstm"), (nn.GRUCell, "gru_cell")])
def test_subclasses_of_tensor(kind: type[nn.Module], name: str) -> None:
    x = input_for(kind).as_subclass(Labelled)
    Labelled.seen = []
    with rnnfast.patch():
        assert type(tensors(kind(3, 4)(x))[0]) is Labelled
    assert name in Labelled.seen


@pytest.mark.parametrize("device", ["cpu", "meta"])
@kinds
def test_default_device(kind: type[nn.Module], device: str) -> None:
    module, x = kind(3, 4), input_for(kind)
    expected = tensors(module(x))
    with torch.device(device), rnnfast.patch():
        torch.testing.assert_close(tensors(module(x)), expected)


@kinds
def test_autocast(kind: type[nn.Module]) -> None:
    """Under autocast torch.nn's modules give other dtypes than rnnfast's, or an error."""
    module, x = kind(3, 4), input_for(kind)

    def run() -> Any:
        try:
            return tensors(module(x))
        except RuntimeError as error:
            return str(error)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = run()
        with rnnfast.patch():
            actual = run()
    assert type(actual) is type(expected)
    if isinstance(expected, list):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_operations_are_counted() -> None:
    counts = []
    module, x = nn.GRU(3, 4), torch.randn(5, 2, 3)
    for patched in (False, True):
        if patched:
            rnnfast.patch()
        with FlopCounterMode(display=False) as counter:
            module(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


class Model(nn.Module):
    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x: Tensor):
        return self.recurrent(x)


@kinds
def test_torchscript(kind: type[nn.Module]) -> None:
    """Archives can be loaded without this package."""
    model, x = Model(kind(3, 4)), input_for(kind)
    expected = tensors(model(x))
    with rnnfast.patch():
        for compiled in (torch.jit.script(model), torch.jit.trace(model, x)):
            assert "rnnfast::" not in str(compiled.inlined_graph)
            saved = io.BytesIO()
            torch.jit.save(compiled, saved)
            saved.seek(0)
            torch.testing.assert_close(tensors(torch.jit.load(saved)(x)), expected)


@kinds
def test_compiled(kind: type[nn.Module]) -> None:
    torch.compiler.reset()
    model, x = Model(kind(3, 4)), input_for(kind)
    expected = outcome(model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=kind in CELLS)
    with rnnfast.patch():
        torch.testing.assert_close(outcome(compiled, x), expected)
    torch.testing.assert_close(outcome(compiled, x), expected)


@kinds
def test_exported(kind: type[nn.Module]) -> None:
    module, x = kind(3, 4), input_for(kind)
    with rnnfast.patch(), torch.no_grad():
        assert "rnnfast" not in str(torch.export.export(module, (x,)).graph)


def test_fx() -> None:
    with rnnfast.patch():
        graph = torch.fx.symbolic_trace(nn.Sequential(nn.GRU(3, 4)))
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "output"]


@kinds
def test_transforms(kind: type[nn.Module]) -> None:
    """Under torch.func and forward-mode AD torch.nn's own forward runs, and may fail."""
    module, x = kind(3, 4).double(), input_for(kind, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return tensors(module(x))[0].sum()

    for transformed in (torch.func.grad(loss), lambda x: torch.func.jvp(loss, (x,), (x,))):
        try:
            expected = transformed(x)
        except Exception as error:
            with rnnfast.patch(), pytest.raises(type(error)):
                transformed(x)
        else:
            with rnnfast.patch():
                torch.testing.assert_close(transformed(x), expected)


def test_hooks(served: list[str]) -> None:
    module, events = nn.LSTM(3, 4), []
    module.register_forward_pre_hook(lambda *_: events.append("pre"))
    module.register_forward_hook(lambda *_: events.append("forward"))
    module.register_full_backward_hook(lambda *_: events.append("backward"))
    with rnnfast.patch():
        module(torch.randn(5, 2, 3, requires_grad=True))[0].sum().backward()
    assert events == ["pre", "forward", "backward"]
    assert served == ["LSTM"]


def test_quantization() -> None:
    with rnnfast.patch():
        model = nn.Sequential(nn.LSTM(3, 4))
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM})
        assert type(quantized[0]) is torch.ao.nn.quantized.dynamic.LSTM


def test_ours_in_a_patched_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a patched process, rnnfast's modules call torch.nn's real forward, not the patched one."""
    packed = pack_padded_sequence(torch.randn(5, 2, 3), torch.tensor([5, 3]))
    module = rnnfast.LSTM(3, 4, backend="aten")
    expected = tensors(module(packed))
    kept = rnnfast.accelerate(nn.LSTM(3, 4), keep_class=True, backend="aten").module
    kept.load_state_dict(module.state_dict())
    with rnnfast.patch():
        for each in (module, kept):
            torch.testing.assert_close(tensors(each(packed)), expected, rtol=0, atol=0)


def test_backend_in_force(served: list[str]) -> None:
    with rnnfast.patch():
        with use_backend("aten"):
            nn.GRU(3, 4)(torch.randn(5, 2, 3))
        assert served == []
        with use_backend("reference"):
            nn.GRU(3, 4)(torch.randn(5, 2, 3))
        assert served == ["GRU"]


def test_a_forward_that_others_exchanged_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: nn.Module, input: Any, hx: Any = None) -> str:
        return "theirs"

    monkeypatch.setattr(nn.GRU, "forward", forward)
    with pytest.warns(UserWarning, match=r"leaves torch\.nn\.GRU as it is.*exchanged for"):
        rnnfast.patch()
    assert nn.GRU(3, 4)(torch.randn(5, 2, 3)) == "theirs"
    assert nn.LSTM.forward is not FORWARDS[nn.LSTM]
    rnnfast.unpatch()
    assert nn.GRU.forward is forward


def test_a_forward_that_others_put_around_ours(
    monkeypatch: pytest.MonkeyPatch, served: list[str]
) -> None:
    """A wrapper around the patched forward stays; the patch below it is switched off and on."""
    module, x = nn.GRU(3, 4), torch.randn(5, 2, 3)
    rnnfast.patch()
    inner, around = nn.GRU.forward, []
    nn.GRU.forward = lambda self, *args: around.append(1) or inner(self, *args)
    module(x)
    rnnfast.unpatch()
    module(x)
    rnnfast.patch()
    module(x)
    assert (len(around), len(served)) == (3, 2)
    nn.GRU.forward = inner


def test_importing_does_not_patch() -> None:
    assert not any(hasattr(forward, "__wrapped__") for forward in FORWARDS.values())
