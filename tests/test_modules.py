"""The modules compared with torch.nn's, with the same weights."""

import copy
import io
import os
import pickle

import pytest
import torch
from cases import OVERLAP_SHAPES
from covering import quick_pairs
from targets import TARGETS
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import rnnfast
from rnnfast import functional, sequences
from rnnfast.backend import EXTENSION

EXPECT_FUSED = EXTENSION is not None or os.environ.get("RNNFAST_EXPECT_EXTENSION") != "0"
BACKENDS = [None, "aten", "reference", *(["fused"] if EXPECT_FUSED else [])]
LAYERS = {
    "RNN_TANH": ("RNN", {}),
    "RNN_RELU": ("RNN", {"nonlinearity": "relu"}),
    "GRU": ("GRU", {}),
    "LSTM": ("LSTM", {}),
}
OPTIONS = [
    {},
    {"bias": False},
    {"batch_first": True},
    {"bidirectional": True},
    {"num_layers": 2},
    {"num_layers": 3, "bidirectional": True, "batch_first": True, "bias": False},
]

backends = pytest.mark.parametrize("backend", BACKENDS)
modes = pytest.mark.parametrize("mode", LAYERS)


def pair(mode, suffix="", *, backend=None, dtype=torch.float64, **options):
    """Returns torch.nn's module and rnnfast's, with the same weights."""
    kind, own = LAYERS[mode]
    theirs = getattr(nn, kind + suffix)(3, 4, **own, **options, dtype=dtype)
    ours = getattr(rnnfast, kind + suffix)(3, 4, **own, **options, dtype=dtype, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def tensors(result):
    """Returns the tensors in nested tuples, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result for tensor in tensors(part)]


def random_state(mode, *shape, dtype=torch.float64, requires_grad=True):
    states = [
        torch.randn(shape, dtype=dtype, requires_grad=requires_grad)
        for _ in range(2 if mode == "LSTM" else 1)
    ]
    return tuple(states) if mode == "LSTM" else states[0]


def assert_same(theirs, ours, x, hx=None):
    """Checks results, and gradients of a loss that weights every result differently."""
    outcomes = []
    for module in (theirs, ours):
        results = tensors(module(x, hx))
        loss = sum((i + 1) * result.sin().sum() for i, result in enumerate(results))
        leaves = [t for t in [x, *([] if hx is None else tensors(hx))] if t.requires_grad]
        gradients = torch.autograd.grad(loss, [*leaves, *module.parameters()], allow_unused=True)
        outcomes.append([*results, *gradients])
    torch.testing.assert_close(outcomes[1], outcomes[0])


@backends
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@modes
def test_layers_agree(mode, options, backend):
    theirs, ours = pair(mode, backend=backend, **options)
    rows = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    batch = 5 if options.get("batch_first") else 2
    assert_same(theirs, ours, x)
    assert_same(theirs, ours, x, random_state(mode, rows, batch, 4))
    assert_same(theirs, ours, x[:, 0], random_state(mode, rows, 4))
    assert_same(theirs, ours, x[0])


@backends
@pytest.mark.parametrize("bias", [True, False])
@modes
def test_cells_agree(mode, bias, backend):
    theirs, ours = pair(mode, "Cell", backend=backend, bias=bias)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert_same(theirs, ours, x)
    assert_same(theirs, ours, x, random_state(mode, 2, 4))
    assert_same(theirs, ours, x[0], random_state(mode, 4))


@backends
@modes
def test_no_batch(mode, backend):
    theirs, ours = pair(mode, backend=backend, bidirectional=True)
    assert_same(theirs, ours, torch.randn(5, 0, 3, dtype=torch.float64, requires_grad=True))
    theirs, ours = pair(mode, "Cell", backend=backend)
    assert_same(theirs, ours, torch.randn(0, 3, dtype=torch.float64, requires_grad=True))


@backends
@modes
def test_inputs_of_any_strides(mode, backend):
    theirs, ours = pair(mode, backend=backend)
    x = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    views = [x.permute(1, 2, 0), x[:, :1, ::2].expand(3, 5, 2).permute(1, 2, 0)]
    state = random_state(mode, 4, 2, 1)
    expand = [s.permute(2, 1, 0) for s in tensors(state)]
    for view in views:
        assert_same(theirs, ours, view)
    assert_same(theirs, ours, views[1], tuple(expand) if mode == "LSTM" else expand[0])


@backends
@modes
def test_dropout_draws_what_torch_draws(mode, backend):
    theirs, ours = pair(mode, backend=backend, num_layers=3, dropout=0.5, bidirectional=True)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    results = []
    for module in (theirs, ours):
        torch.manual_seed(0)
        results.append(tensors(module(x)))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(tensors(ours.eval()(x)), tensors(theirs.eval()(x)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("reference", "fused")])
@modes
def test_half_types(mode, backend, dtype):
    exact, ours = pair(mode, backend=backend)
    ours.to(dtype)
    exact.load_state_dict(ours.state_dict())
    x = torch.randn(5, 2, 3, dtype=dtype)
    expected = [tensor.to(dtype) for tensor in tensors(exact(x.double()))]
    torch.testing.assert_close(tensors(ours(x)), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("reference", "fused")])
@pytest.mark.parametrize("suffix", ["", "Cell"])
@modes
def test_autocast_returns_its_dtype(mode, suffix, backend, dtype):
    _, ours = pair(mode, suffix, backend=backend, dtype=torch.float32)
    low = copy.deepcopy(ours).to(dtype)
    x = torch.randn((2, 3) if suffix else (5, 2, 3))
    with torch.autocast("cpu", dtype=dtype):
        results = tensors(ours(x))
    assert {result.dtype for result in results} == {dtype}
    torch.testing.assert_close(results, tensors(low(x.to(dtype))), rtol=0, atol=0)
    gradients = torch.autograd.grad(results[0].float().sum(), list(ours.parameters()))
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
@modes
def test_autocast_on_aten_is_as_torch(mode, packed, dtype):
    """Results, or the error, are torch's: its LSTM needs AVX-512 for half types."""
    theirs, ours = pair(mode, backend="aten", dtype=torch.float32)
    x = torch.randn(5, 2, 3)
    x = pack_padded_sequence(x, [5, 3]) if packed else x

    def call(module):
        y, finals = module(x)
        return [tensor.to(dtype) for tensor in tensors([y.data if packed else y, finals])]

    exact = call(theirs)
    with torch.autocast("cpu", dtype=dtype):
        outcomes = []
        for module in (theirs, ours):
            try:
                outcomes.append(call(module))
            except RuntimeError as error:
                outcomes.append(str(error))
        if isinstance(outcomes[0], str):
            assert outcomes[1] == outcomes[0]
        else:
            torch.testing.assert_close(*outcomes, rtol=0, atol=0)
        for name in BACKENDS:
            if name != "aten":
                ours.backend = name
                torch.testing.assert_close(call(ours), exact, rtol=0, atol=2e-2)


@backends
@modes
def test_nan_and_inf_pass_through(mode, backend):
    theirs, ours = pair(mode, backend=backend)
    x = torch.randn(5, 3, 3, dtype=torch.float64)
    x[2, 0, 1], x[3, 1, 2] = float("nan"), float("inf")
    torch.testing.assert_close(tensors(ours(x)), tensors(theirs(x)), equal_nan=True)


@pytest.mark.parametrize("suffix", ["", "Cell"])
@modes
def test_same_seed_same_module(mode, suffix):
    kind, own = LAYERS[mode]
    arguments = [(3, 4), {**own, "bias": True}]
    modules = []
    for namespace in (nn, rnnfast):
        torch.manual_seed(0)
        modules.append(getattr(namespace, kind + suffix)(*arguments[0], **arguments[1]))
    theirs, ours = modules
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    theirs.load_state_dict(ours.state_dict())


def test_positional_arguments():
    theirs = nn.RNN(3, 4, 2, "relu", False, True, 0.25, True)
    ours = rnnfast.RNN(3, 4, 2, "relu", False, True, 0.25, True)
    assert repr(ours) == repr(theirs)
    assert ours.mode == "RNN_RELU"
    assert repr(rnnfast.LSTM(3, 4, 2, True, True, 0.25, True, 2)) == repr(
        nn.LSTM(3, 4, 2, True, True, 0.25, True, 2)
    )
    assert rnnfast.RNNCell(3, 4, False, "relu").nonlinearity == "relu"


def test_backend_shows_in_repr():
    assert repr(rnnfast.GRU(3, 4, backend="aten")) == "GRU(3, 4, backend='aten')"


@modes
def test_copies_and_pickles(mode):
    _, ours = pair(mode, backend="reference", num_layers=2)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(saved, weights_only=False),
    ):
        assert other.backend == "reference"
        torch.testing.assert_close(tensors(other(x)), tensors(ours(x)), rtol=0, atol=0)


@modes
def test_packed_sequences(mode):
    theirs, ours = pair(mode, bidirectional=True)
    x = torch.randn(5, 3, 3, dtype=torch.float64, requires_grad=True)
    packed = pack_padded_sequence(x, torch.tensor([2, 5, 3]), enforce_sorted=False)
    expected, actual = theirs(packed), ours(packed)
    torch.testing.assert_close(
        tensors([pad_packed_sequence(actual[0])[0], actual[1]]),
        tensors([pad_packed_sequence(expected[0])[0], expected[1]]),
    )


def test_projection():
    theirs, ours = pair("LSTM", proj_size=2, num_layers=2)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    assert_same(theirs, ours, x)


class _Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


@backends
@modes
def test_parametrized_weights_are_used(mode, backend):
    theirs, ours = pair(mode, backend=backend)
    with torch.no_grad():
        theirs.weight_hh_l0.mul_(2)
    parametrize.register_parametrization(ours, "weight_hh_l0", _Double())
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(tensors(ours(x)), tensors(theirs(x)))


@backends
@modes
def test_functional_call_uses_its_weights(mode, backend):
    theirs, ours = pair(mode, backend=backend)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    other = {name: torch.randn_like(value) for name, value in ours.named_parameters()}
    actual = torch.func.functional_call(ours, other, (x,))
    theirs.load_state_dict(other)
    torch.testing.assert_close(tensors(actual), tensors(theirs(x)))


@backends
def test_weights_shared_by_both_directions(backend):
    theirs, ours = pair("GRU", backend=backend, bidirectional=True)
    for module in (theirs, ours):
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(module, f"{name}_l0_reverse", getattr(module, f"{name}_l0"))
    assert len(list(ours.parameters())) == 4
    assert_same(theirs, ours, torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True))


@backends
def test_only_some_gradients_wanted(backend):
    theirs, ours = pair("LSTM", backend=backend)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    for name in ("weight_ih_l0", "bias_hh_l0"):
        gradients = []
        for module in (theirs, ours):
            for other, parameter in module.named_parameters():
                parameter.requires_grad_(other == name)
            _, (_, c_n) = module(x)
            (gradient,) = torch.autograd.grad(c_n.sum(), [getattr(module, name)])
            gradients.append(gradient)
        torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("backend", [None, *BACKENDS[1:]])
def test_functional_is_what_the_modules_do(backend):
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    options = {"num_layers": 2, "bidirectional": True, "backend": backend}
    for mode, (kind, own) in LAYERS.items():
        theirs, _ = pair(mode, num_layers=2, bidirectional=True)
        hx = random_state(mode, 4, 2, 4)
        call = getattr(functional, kind.lower())
        weights = [parameter for _, parameter in theirs.named_parameters()]
        actual = call(x, hx, weights, **own, **options)
        torch.testing.assert_close(tensors(actual), tensors(theirs(x, hx)))

        cell, _ = pair(mode, "Cell")
        hx = random_state(mode, 2, 4)
        call = getattr(functional, f"{kind.lower()}_cell")
        actual = call(x[0], hx, *cell.parameters(), **own, backend=backend)
        torch.testing.assert_close(tensors(actual), tensors(cell(x[0], hx)))


@pytest.mark.parametrize("cell", rnnfast.reference.CELLS)
@pytest.mark.parametrize("reverse", [False, True])
def test_reference_of_no_time_returns_the_states(cell, reverse):
    row = rnnfast.reference.CELLS[cell]
    states = tuple(torch.randn(2, 4) for _ in range(row.states))
    weights = torch.randn(row.gates * 4, 3), torch.randn(row.gates * 4, 4), None, None
    inputs = rnnfast.reference.LayerInputs(torch.zeros(0, 2, 3), states, *weights, reverse)
    y, finals, _ = rnnfast.reference.layer(row, inputs)
    assert y.shape == (0, 2, 4)
    torch.testing.assert_close(finals, states)


class TestWhatWatchesIsSeen:
    """The short path is not taken if something must see the operations on tensors."""

    def test_dispatch_mode(self):
        seen = []

        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                seen.append(str(function))
                return function(*args, **(kwargs or {}))

        module, x = rnnfast.LSTM(3, 4, backend="fused"), torch.zeros(2, 1, 3)
        with Recorder(), torch.no_grad():
            module(x)
        assert "rnnfast.lstm.default" in seen

    def test_function_mode(self):
        seen = []

        class Recorder(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                seen.append(function)
                return function(*args, **(kwargs or {}))

        module, x = rnnfast.GRUCell(3, 4, backend="fused"), torch.zeros(1, 3)
        with Recorder():
            module(x)
        assert torch.ops.rnnfast.gru.default in seen

    def test_parameter_subclass(self):
        seen = []

        class Watched(torch.nn.Parameter):
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                seen.append(function)
                with torch._C.DisableTorchFunctionSubclass():
                    return function(*args, **(kwargs or {}))

        module = rnnfast.RNN(3, 4)
        plain = module(torch.ones(2, 1, 3))[0]
        module.weight_ih_l0 = Watched(module.weight_ih_l0.detach())
        torch.testing.assert_close(module(torch.ones(2, 1, 3))[0], plain)
        assert seen


class TestPrecedence:
    """The order is: argument, context, environment, automatic choice."""

    @pytest.fixture(autouse=True)
    def spy(self, monkeypatch):
        self.ran = []
        layers = sequences._LAYERS

        def spying(name):
            def layer(*arguments):
                self.ran.append(name)
                return rnnfast.reference.layer(*arguments)

            return layer

        for name in layers:
            monkeypatch.setitem(layers, name, spying(name))
        monkeypatch.setattr(rnnfast.backend, "_FUSED_DEVICES", frozenset({"cpu"}))

    def run(self, backend=None):
        """Returns the name of the backend that runs; aten leaves no trace here."""
        self.ran.clear()
        weights = list(rnnfast.GRU(3, 4).parameters())
        functional.gru(torch.zeros(1, 1, 3), None, weights, backend=backend)
        return self.ran[0] if self.ran else "aten"

    def test_automatic(self):
        assert self.run() == "fused"

    def test_environment(self, monkeypatch):
        monkeypatch.setattr(rnnfast.backend, "_ENVIRONMENT", "aten")
        assert self.run() == "aten"
        with rnnfast.use_backend("reference"):
            assert self.run() == "reference"
            with rnnfast.use_backend("auto"):
                assert self.run() == "fused"
            assert self.run() == "reference"
        assert self.run() == "aten"

    def test_short_path(self, monkeypatch):
        """Modules try the extension's short path first, but only where the fused path would run."""
        short = rnnfast.backend.short_path
        monkeypatch.setattr(rnnfast.backend, "EXTENSION", object())
        assert short(None)
        assert short("fused")
        assert not short("aten")
        with rnnfast.use_backend("reference"):
            assert not short(None)
            assert short("fused")
        with forward_ad.dual_level():
            assert not short(None)
        monkeypatch.setattr(rnnfast.backend, "EXTENSION", None)
        assert not short(None)

    def test_argument(self):
        with rnnfast.use_backend("reference"):
            assert self.run("aten") == "aten"
            assert self.run("fused") == "fused"

    def test_context_ends_with_an_error(self):
        with pytest.raises(KeyError), rnnfast.use_backend("reference"):
            raise KeyError
        assert self.run() == "fused"


@pytest.mark.skipif(not EXPECT_FUSED, reason="a build without the extension has no short path")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("suffix", ["", "Cell"])
@modes
def test_plain_calls_take_the_short_path(mode, suffix, bias, monkeypatch):
    theirs, ours = pair(mode, suffix, bias=bias)
    for general in ("run_sequence", "run_step"):
        monkeypatch.delattr(sequences, general)
    x = torch.randn((2, 3) if suffix else (5, 2, 3), dtype=torch.float64, requires_grad=True)
    assert_same(theirs, ours, x)
    assert_same(theirs, ours, x, random_state(mode, *((2, 4) if suffix else (1, 2, 4))))


# the first two shapes overlap layers or directions on several threads, the third does not
@quick_pairs(
    device=TARGETS,
    mode=[*LAYERS],
    options=[{"num_layers": 5}, {"num_layers": 2, "bidirectional": True}],
    shape=[*OVERLAP_SHAPES],
)
def test_overlapping_layers_give_the_same_bits(
    mode: str, options: dict[str, int], shape: str, device: str, threads: None
) -> None:
    """With one thread, layers and directions run one after the other."""
    T, B, I, H = OVERLAP_SHAPES[shape]
    torch.manual_seed(0)
    name, kind = LAYERS[mode]
    module = getattr(rnnfast, name)(I, H, **kind, **options, backend="fused")
    x = torch.randn(T, B, I, requires_grad=True)

    def run() -> list[torch.Tensor]:
        with torch.no_grad():
            plain = module(x)[0]
        y = module(x)[0]
        return [plain, y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]

    torch.set_num_threads(1)
    expected = run()
    for count in (2, 3, 4, 9):
        torch.set_num_threads(count)
        for actual, value in zip(run(), expected, strict=True):
            assert torch.equal(actual, value)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", ["GRU", "LSTM"])
def test_recompute(mode: str, compiled: bool) -> None:
    """Results are the same, and autograd does not keep the gates."""
    if not EXPECT_FUSED:
        pytest.skip("only the fused kernels recompute")
    name, kind = LAYERS[mode]
    torch.manual_seed(0)
    module = getattr(rnnfast, name)(7, 12, 2, bidirectional=True, **kind, backend="fused")
    assert not module.recompute
    x = torch.randn(9, 4, 7, requires_grad=True)
    found, kept = [], []
    for module.recompute in (False, True):
        run = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
        saved: dict[int, int] = {}

        def keep(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = run(x)[0]
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])])
        kept.append(sum(saved.values()))
    for actual, expected in zip(*found, strict=True):
        assert torch.equal(actual, expected)
    gates = 4 * 9 * 4 * (4 * 12)  # layers and directions, T, B, K*H
    assert kept[0] - kept[1] == gates


def test_recompute_has_second_derivatives() -> None:
    module = rnnfast.LSTM(2, 3, dtype=torch.float64, recompute=True)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: module(x)[0], (x,))
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], (x,))


def test_input_gradient_where_only_one_direction_has_any() -> None:
    module = rnnfast.GRU(3, 4, bidirectional=True, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for create_graph in (False, True):
        y = module(x)[0]
        if EXPECT_FUSED:  # y is the concatenation of one node's outputs
            node = y.grad_fn.next_functions[0][0]
            node.register_prehook(lambda grads: (grads[0], grads[1], None, None))
        found.append(torch.autograd.grad(y.sum(), x, create_graph=create_graph)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("B", [1, 3, 32, 33])
@modes
@backends
def test_cells_without_units(backend, mode, B):
    """A cell with hidden_size 0 puts out nothing, and its input has the gradient 0."""
    kind, own = LAYERS[mode]
    x = torch.randn(B, 128, requires_grad=True)
    for size in (64, 0):  # the first leaves numbers in memory that is used again
        cell = getattr(rnnfast, kind + "Cell")(128, size, **own, backend=backend)
        h = tensors(cell(x))[0]
        (grad,) = torch.autograd.grad(h.sum(), x)
    assert h.shape == (B, 0)
    assert torch.equal(grad, torch.zeros(B, 128))
