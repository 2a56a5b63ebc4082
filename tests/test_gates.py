"""The recorded gates, compared with loops over sequences and steps in plain PyTorch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_modules import EXPECT_FUSED
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import rnnfast
from rnnfast.cli import main
from rnnfast.explain import plot_gates, record_gates
from rnnfast.models import CharLSTM, checkpoint
from rnnfast.text import CharVocabulary

T, B, I, H = 5, 3, 4, 6
LENGTHS = [3, 5, 1]
TEXT = "the $cat$\nsat"
PNG = b"\x89PNG\r\n\x1a\n"
MODES = {
    "tanh": (rnnfast.RNN, rnnfast.RNNCell, {}),
    "relu": (rnnfast.RNN, rnnfast.RNNCell, {"nonlinearity": "relu"}),
    "gru": (rnnfast.GRU, rnnfast.GRUCell, {}),
    "lstm": (rnnfast.LSTM, rnnfast.LSTMCell, {}),
}
NAMES = {
    "tanh": ["hidden"],
    "relu": ["hidden"],
    "gru": ["reset", "update", "new", "hidden"],
    "lstm": ["input", "forget", "cell", "output", "cell_state", "hidden"],
}
OPTIONS = [
    {},
    {"bias": False, "batch_first": True},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 3, "batch_first": True, "recompute": True},
]
WAYS = ["batch", "state", "single", "lengths", "packed", "sorted", "reset"]

modes = pytest.mark.parametrize("mode", MODES)
options = pytest.mark.parametrize("options", OPTIONS, ids=str)
backends = pytest.mark.parametrize(
    "backend", [None, "aten", "reference", *(["fused"] if EXPECT_FUSED else [])]
)


def make(mode, backend=None, dtype=torch.float64, **options):
    torch.manual_seed(0)
    kind, _, own = MODES[mode]
    return kind(I, H, dtype=dtype, backend=backend, **own, **options)


def step(mode, x, h, c, w_ih, w_hh, b_ih, b_hh, w_hr=None):
    """Computes the gates of one step of one sequence."""
    from_x, from_h = w_ih @ x + b_ih, w_hh @ h + b_hh
    if mode == "lstm":
        i, f, g, o = (from_x + from_h).chunk(4)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        c = f * c + i * g
        h = o * torch.tanh(c)
        values = [i, f, g, o, c, h if w_hr is None else w_hr @ h]
    elif mode == "gru":
        (x_r, x_z, x_n), (h_r, h_z, h_n) = from_x.chunk(3), from_h.chunk(3)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + r * h_n)
        values = [r, z, n, (1 - z) * n + z * h]
    else:
        values = [getattr(torch, mode)(from_x + from_h)]
    return dict(zip(NAMES[mode], values, strict=True))


@torch.no_grad()
def by_hand(mode, module, x, hx=None, lengths=None, reset=None):
    """The expected {key: {name: (T, B, H)}} for x (T, B, I), one sequence at a time."""
    directions = 2 if module.bidirectional else 1
    steps, batch = x.shape[:2]
    lengths = [steps] * batch if lengths is None else lengths
    H, width = module.hidden_size, module.proj_size or module.hidden_size
    expected = {}
    for number in range(module.num_layers):
        outputs = []
        for direction in range(directions):
            suffix = f"l{number}" + "_reverse" * direction
            w = dict(module.named_parameters())
            weights = [w[f"{name}_{suffix}"] for name in ("weight_ih", "weight_hh")]
            zero = x.new_zeros(len(weights[0]))
            weights += [w.get(f"{name}_{suffix}", zero) for name in ("bias_ih", "bias_hh")]
            weights += [w[f"weight_hr_{suffix}"]] if module.proj_size else []
            own = {
                name: x.new_zeros(steps, batch, width if name == "hidden" else H)
                for name in NAMES[mode]
            }
            for b in range(batch):
                row = number * directions + direction
                h, c = x.new_zeros(width), x.new_zeros(H)
                if hx is not None:
                    h, c = (hx[0][row, b], hx[1][row, b]) if mode == "lstm" else (hx[row, b], c)
                times = range(lengths[b])
                for t in reversed(times) if direction else times:
                    border = t + 1 if direction else t
                    if reset is not None and border < lengths[b] and reset[border, b]:
                        h, c = torch.zeros_like(h), torch.zeros_like(c)
                    values = step(mode, x[t, b], h, c, *weights)
                    h, c = values["hidden"], values.get("cell_state", c)
                    for name, value in values.items():
                        own[name][t, b] = value
            expected[suffix] = own
            outputs.append(own["hidden"])
        x = torch.cat(outputs, dim=-1)
    return expected


def random_state(mode, module, batch=B):
    rows = module.num_layers * (2 if module.bidirectional else 1)
    h, c = torch.randn(2, rows, batch, H, dtype=torch.float64)
    return (h, c) if mode == "lstm" else h


def call(way, mode, module):
    """The arguments of a call and of `by_hand`, and whether there is a single sequence."""
    x = torch.randn(T, B, I, dtype=torch.float64)
    given = x.transpose(0, 1) if module.batch_first else x
    hx = random_state(mode, module)
    reset = torch.rand(T, B) < 0.4
    if way == "single":
        state = random_state(mode, module, 1)
        alone = tuple(s.squeeze(1) for s in state) if mode == "lstm" else state.squeeze(1)
        return (x[:, 0], alone), {}, (x[:, :1], state)
    if way in ("packed", "sorted"):
        lengths = sorted(LENGTHS, reverse=True) if way == "sorted" else LENGTHS
        packed = pack_padded_sequence(given, lengths, module.batch_first, way == "sorted")
        assert (packed.sorted_indices is None) == (way == "sorted")
        return (packed, hx), {}, (x, hx, lengths)
    return {
        "batch": ((given,), {}, (x,)),
        "state": ((), {"hx": hx, "input": given}, (x, hx)),
        "lengths": ((given, hx), {"lengths": LENGTHS}, (x, hx, LENGTHS)),
        "reset": (
            (given,),
            {"reset": reset.T if module.batch_first else reset, "lengths": LENGTHS},
            (x, None, LENGTHS, reset),
        ),
    }[way]


def check(record, expected, arrange=lambda tensor: tensor, **tolerances):
    assert list(record) == list(expected)
    for key, activations in expected.items():
        assert list(record[key]) == list(activations)
        for name, values in activations.items():
            assert not record[key][name].requires_grad
            torch.testing.assert_close(
                record[key][name], arrange(values), **(tolerances or {"rtol": 0, "atol": 1e-13})
            )


@modes
@options
@backends
@pytest.mark.parametrize("way", WAYS)
def test_layers(mode, options, backend, way):
    if backend == "aten" and way == "reset":
        backend = "reference"  # torch's kernels do not support reset
    module = make(mode, backend, **options)
    args, kwargs, arguments = call(way, mode, module)
    with record_gates(module) as record:
        module(*args, **kwargs)

    def arrange(tensor):
        if way == "single":
            return tensor.squeeze(1)
        return tensor.transpose(0, 1) if module.batch_first else tensor

    check(record, by_hand(mode, module, *arguments), arrange)


@modes
@backends
@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=str)
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_cells(mode, backend, options, single, with_state):
    torch.manual_seed(0)
    layer = make(mode, **options)
    _, kind, own = MODES[mode]
    cell = kind(I, H, dtype=torch.float64, backend=backend, **own, **options)
    cell.load_state_dict({name[:-3]: value for name, value in layer.state_dict().items()})
    x = torch.randn(T, B, I, dtype=torch.float64)
    start = random_state(mode, layer)
    hx = None
    if with_state:
        hx = tuple(s[0] for s in start) if mode == "lstm" else start[0]
    if single and with_state:
        hx = tuple(s[0] for s in hx) if mode == "lstm" else hx[0]
    with record_gates(cell) as record:
        for t in range(T):
            hx = cell(x[t, 0] if single else x[t], hx)
    expected = by_hand(mode, layer, x, start if with_state else None)
    check(record, expected, lambda tensor: tensor[:, 0] if single else tensor)
    assert [call["hidden"].shape[0] for call in record.calls("l0")] == [1] * T


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("way", ["batch", "lengths", "packed"])
def test_projected_layers(backend, way):
    module = make("lstm", backend, num_layers=2, bidirectional=True, proj_size=2)
    x = torch.randn(T, B, I, dtype=torch.float64)
    given = pack_padded_sequence(x, LENGTHS, enforce_sorted=False) if way == "packed" else x
    with record_gates(module) as record:
        module(given, **({"lengths": LENGTHS} if way == "lengths" else {}))
    lengths = None if way == "batch" else LENGTHS
    check(record, by_hand("lstm", module, x, None, lengths))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@modes
def test_other_dtypes(mode, dtype, backend):
    module = make(mode, backend, dtype, num_layers=2)
    x = torch.randn(T, B, I, dtype=dtype)
    with record_gates(module) as record:
        module(x)
    exact = copy.deepcopy(module).double()
    expected = by_hand(mode, exact, x.double())
    assert all(t.dtype is dtype for gates in record.values() for t in gates.values())
    tolerance = 1e-6 if dtype is torch.float32 else 2e-2
    check(record, expected, lambda tensor: tensor.to(dtype), rtol=0, atol=tolerance)


@modes
def test_autocast(mode):
    module = make(mode, dtype=torch.float32, num_layers=2)
    x = torch.randn(T, B, I)
    with torch.autocast("cpu", torch.bfloat16), record_gates(module) as record:
        y, _ = module(x)
    assert record["l1"]["hidden"].dtype is torch.bfloat16
    assert torch.equal(record["l1"]["hidden"], y)
    expected = by_hand(mode, copy.deepcopy(module).double(), x.double())
    check(record, expected, lambda tensor: tensor.bfloat16(), rtol=0, atol=2e-2)


@modes
def test_every_target(mode, device):
    torch.manual_seed(0)
    kind, _, own = MODES[mode]
    module = kind(I, 37, 2, bidirectional=True, dtype=torch.float64, **own)
    x = torch.randn(T, 9, I, dtype=torch.float64)
    expected = by_hand(mode, module, x)
    with record_gates(module.to(device)) as record:
        module(x.to(device))
    check(record, expected, lambda tensor: tensor.to(device))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("count", [T, 300])
def test_tokens(packed, one_hot, count):
    embedding = nn.Embedding(9, I, dtype=torch.float64)
    own = {"tokens": True} if one_hot else {}
    module = make("gru", num_layers=2, **own)
    tokens = torch.randint(0, I if one_hot else 9, (count, B))
    x = F.one_hot(tokens, I).double() if one_hot else embedding.weight[tokens].detach()
    lengths = [count - 2, count, 1]
    given, kwargs = tokens.clone(), {"lengths": lengths}
    given[count - 1, 0] = 10**9  # padding
    if packed:
        packed_x = pack_padded_sequence(tokens, lengths, enforce_sorted=False)
        given, kwargs = PackedSequence(*packed_x), {}
    kwargs |= {} if one_hot else {"embedding": embedding}
    with record_gates(module) as record:
        module(given, **kwargs)
    check(record, by_hand("gru", module, x, None, lengths))


class Seen(TorchDispatchMode):
    """Records the calls of rnnfast's operators, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "rnnfast":
            self.calls.append((function._schema.name, args))
        return function(*args, **(kwargs or {}))


@modes
def test_the_kernels_are_asked(mode):
    module = make(mode, num_layers=2)
    with torch.no_grad(), record_gates(module) as record:
        y, _ = module(torch.randn(T, B, I, dtype=torch.float64))
        torch.testing.assert_close(
            record["l1"]["hidden"], y, rtol=0, atol=0 if EXPECT_FUSED else 1e-14
        )
        with Seen() as seen:
            module(torch.randn(T, B, I, dtype=torch.float64))
    operator = f"rnnfast::elman_{mode}" if mode in ("tanh", "relu") else f"rnnfast::{mode}"
    ours = [args for name, args in seen.calls if name == operator]
    assert len(seen.calls) == len(ours)
    states = 2 if mode == "lstm" else 1
    saves = [args[6 + states] for args in ours]  # follows x, states, weights and reverse
    assert saves == ([False, False, True, True] if EXPECT_FUSED else [])


@modes
@backends
@pytest.mark.parametrize("training", [True, False])
def test_results_and_gradients_stay(mode, backend, training):
    plain = make(mode, backend, num_layers=2, bidirectional=True).train(training)
    watched = copy.deepcopy(plain)
    before = copy.deepcopy(plain.state_dict())
    x = torch.randn(T, B, I, dtype=torch.float64)
    found = []
    generator = torch.get_rng_state()
    for module in (plain, watched):
        own = x.clone().requires_grad_()
        if module is watched:
            with record_gates(module):
                y, final = module(own)
                assert len(module._forward_hooks) == 1
        else:
            y, final = module(own)
        (y.square().sum() + sum(state.sum() for state in final)).backward()
        grads = [own.grad, *(weight.grad for weight in module.parameters())]
        found.append([y, *final, *grads])
        assert module.training is training
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert not watched._forward_hooks
    assert all(torch.equal(value, before[name]) for name, value in watched.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_result_changed_in_place_leaves_the_record():
    module = make("tanh")
    x = torch.randn(T, B, I, dtype=torch.float64)
    with record_gates(module) as record, torch.no_grad():
        y, _ = module(x)
        y.zero_()
        x.zero_()
    assert record["l0"]["hidden"].abs().min() > 0


def test_inference_mode():
    module = make("lstm")
    x = torch.randn(T, B, I, dtype=torch.float64)
    with torch.inference_mode(), record_gates(module) as record:
        module(x)
    check(record, by_hand("lstm", module, x))


class Model(nn.Module):
    """Layers of several kinds, one of them twice, and a cell in a loop."""

    def __init__(self):
        super().__init__()
        self.encoder = make("lstm", bidirectional=True, batch_first=True)
        self.middle = nn.ModuleDict({"gru": make("gru"), "unused": make("gru")})
        self.decoder = rnnfast.RNNCell(H, H, dtype=torch.float64)
        self.foreign = nn.GRU(I, H, dtype=torch.float64)

    def forward(self, x):
        self.encoder(x.transpose(0, 1))
        self.foreign(x)
        y, h = self.middle["gru"](x)
        y, _ = self.middle["gru"](x[:2], h)
        h = None
        for step in y:
            h = self.decoder(step, h)
        return h


def test_a_model_with_several_layers():
    model = Model()
    x = torch.randn(T, B, I, dtype=torch.float64)
    expected = model(x)
    with record_gates(model) as record:
        result = model(x)
    assert torch.equal(result, expected)
    assert list(record) == ["encoder.l0", "encoder.l0_reverse", "middle.gru.l0", "decoder.l0"]
    assert len(record) == 4
    encoder = by_hand("lstm", model.encoder, x)
    for key in ("l0", "l0_reverse"):
        for name, values in encoder[key].items():
            torch.testing.assert_close(record[f"encoder.{key}"][name], values.transpose(0, 1))
    gru = model.middle["gru"]
    first = by_hand("gru", gru, x)["l0"]
    second = by_hand("gru", gru, x[:2], first["hidden"][-1:])["l0"]
    for name in NAMES["gru"]:
        both = torch.cat([first[name], second[name]])
        torch.testing.assert_close(record["middle.gru.l0"][name], both)
        assert [len(call[name]) for call in record.calls("middle.gru.l0")] == [T, 2]
    assert record["decoder.l0"]["hidden"].shape == (2, B, H)
    torch.testing.assert_close(record["decoder.l0"]["hidden"][-1], result.detach())
    with pytest.raises(
        KeyError, match=r"no layer 'middle\.unused\.l0' was called; those that were"
    ):
        record["middle.unused.l0"]
    assert "foreign.l0" not in record
    assert not any(module._forward_hooks for module in model.modules())


def test_an_accelerated_model_is_recorded():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.LSTM(I, H, dtype=torch.float64)])
    with pytest.raises(ValueError, match=r"ModuleList has no layer or cell of rnnfast.*accelerate"):
        record_gates(model).__enter__()
    rnnfast.accelerate(model)
    x = torch.randn(T, B, I, dtype=torch.float64)
    with record_gates(model) as record:
        model[0](x)
    expected = by_hand("lstm", model[0], x)
    check(record, {f"0.{key}": value for key, value in expected.items()})


def test_subclasses_of_their_own_are_left_out():
    class Louder(rnnfast.GRU):
        def forward(self, x):
            return super().forward(2 * x)

    class Named(rnnfast.GRU):
        pass

    patched = rnnfast.GRU(I, H)
    patched.forward = lambda x: rnnfast.GRU.forward(patched, 2 * x)
    modules = nn.ModuleList([Louder(I, H), Named(I, H), patched])
    with record_gates(modules) as record:
        for module in modules:
            module(torch.randn(T, B, I))
    assert list(record) == ["1.l0"]


def test_calls_of_different_batches():
    module = make("gru", batch_first=True)
    with record_gates(module) as record:
        module(torch.randn(2, T, I, dtype=torch.float64))
        module(torch.randn(3, T, I, dtype=torch.float64))
    with pytest.raises(
        ValueError, match=r"calls of l0 cannot be concatenated.* \(2, 5, 6\), \(3, 5, 6\)"
    ):
        record["l0"]
    assert [call["reset"].shape for call in record.calls("l0")] == [(2, T, H), (3, T, H)]


def test_hooks_go_after_an_exception():
    module = make("lstm")
    x = torch.randn(T, B, I, dtype=torch.float64)
    records = []

    def interrupted():
        with record_gates(module) as record:
            records.append(record)
            module(x)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert not module._forward_hooks
    module(x)
    check(records[0], by_hand("lstm", module, x))


def test_a_refused_call_is_not_recorded():
    module = make("lstm")
    with record_gates(module) as record:
        with pytest.raises(RuntimeError, match="input_size"):
            module(torch.randn(T, B, I + 1, dtype=torch.float64))
        assert not record


def test_dropout_between_layers_is_refused():
    module = make("gru", num_layers=2, dropout=0.5)
    x = torch.randn(T, B, I, dtype=torch.float64)
    with record_gates(nn.Sequential(module)) as record:
        with pytest.raises(RuntimeError, match=r"gates of 0 cannot .* dropout .* eval\(\) first"):
            module(x)
        assert not record
        module.eval()(x)
    assert list(record) == ["0.l0", "0.l1"]
    single = make("gru").train()
    with pytest.warns(UserWarning, match="dropout"):
        alone = rnnfast.GRU(I, H, dropout=0.5, dtype=torch.float64)
    alone.load_state_dict(single.state_dict())
    with record_gates(alone) as record:
        alone(x)
    check(record, by_hand("gru", single, x))


def test_parametrized_weights():
    module = make("lstm")
    nn.utils.parametrizations.spectral_norm(module, "weight_hh_l0")
    x = torch.randn(T, B, I, dtype=torch.float64)
    with record_gates(module), pytest.raises(RuntimeError, match=r"LSTM .* parametrized weights"):
        module(x)
    module.eval()
    with record_gates(module) as record:
        y, _ = module(x)
    torch.testing.assert_close(record["l0"]["hidden"], y.detach())


def test_transforms_are_refused():
    module = make("gru")
    x = torch.randn(2, T, B, I, dtype=torch.float64)
    with record_gates(module), pytest.raises(RuntimeError, match=r"torch\.func transforms"):
        torch.func.vmap(lambda x: module(x)[0])(x)
    assert not module._forward_hooks


def test_functional_call_shows_the_parameters_it_was_given():
    module, other = make("gru"), make("gru")
    with torch.no_grad():
        other.weight_hh_l0.mul_(3)
    x = torch.randn(T, B, I, dtype=torch.float64)
    with record_gates(module) as record:
        torch.func.functional_call(module, dict(other.named_parameters()), (x,))
    check(record, by_hand("gru", other, x))


@pytest.fixture
def read():
    """The activations of an LSTM that has read TEXT in a batch of one."""
    module = make("lstm", batch_first=True)
    with record_gates(module) as record:
        module(3 * torch.randn(1, len(TEXT), I, dtype=torch.float64))
    return record


@pytest.mark.parametrize(
    ("gate", "limits"),
    [("forget", (0, 1)), ("input", (0, 1)), ("output", (0, 1)), ("cell", (-1, 1))],
)
@pytest.mark.parametrize("units", [None, [4, 1]])
def test_the_heat_map(read, gate, limits, units):
    for given in (read, read["l0"], {name: v[0] for name, v in read["l0"].items()}):
        figure = plot_gates(given, text=TEXT, gate=gate, units=units)
        axes = figure.axes[0]
        (image,) = axes.get_images()
        rows = list(range(H)) if units is None else units
        expected = read["l0"][gate][0].T[rows].float()
        assert torch.equal(torch.tensor(image.get_array().data), expected)
        assert image.get_clim() == limits
        assert [label.get_text() for label in axes.get_yticklabels()] == list(map(str, rows))
        labels = [label.get_text() for label in axes.get_xticklabels()]
        assert labels == list("the␣$cat$↵sat")
        figure.canvas.draw()


def test_colours_of_a_cell_state_reach_as_far_as_it(read):
    state = {"cell_state": read["l0"]["cell_state"] * 5, "hidden": read["l0"]["hidden"]}
    (image,) = plot_gates(state, text=TEXT, gate="cell_state").axes[0].get_images()
    limit = state["cell_state"].abs().max().item()
    assert limit > 1
    assert image.get_clim() == pytest.approx((-limit, limit))
    (image,) = plot_gates(state, text=TEXT, gate="hidden").axes[0].get_images()
    assert image.get_clim() == (-1, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gate": "carry"}, "no gate 'carry'; there are input, forget"),
        ({"text": TEXT + "!"}, "the text has 14 characters, but there are 13 steps"),
        ({"units": [0, 6]}, "units should be between 0 and 5, got 6"),
        ({"units": [-1]}, "units should be between 0 and 5, got -1"),
        ({"units": []}, "at least one unit"),
    ],
)
def test_impossible_heat_maps(read, options, words):
    with pytest.raises(ValueError, match=words):
        plot_gates(read, **{"text": TEXT, "gate": "forget", **options})


def test_a_heat_map_is_of_one_sequence_of_one_layer():
    module = make("lstm", num_layers=2)
    with record_gates(module) as record:
        module(torch.randn(T, B, I, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"record\[key\]; it has: l0, l1"):
        plot_gates(record, text="sheep", gate="forget")
    with pytest.raises(ValueError, match=r"a single sequence, got shape \(5, 3, 6\)"):
        plot_gates(record["l1"], text="sheep", gate="forget")


@pytest.fixture
def folder(tmp_path):
    vocabulary = CharVocabulary(TEXT)
    torch.manual_seed(0)
    model = CharLSTM(len(vocabulary), 30, 2, dropout=0.5, vocabulary=vocabulary)
    checkpoint.save(model, tmp_path / checkpoint.FILE_NAME)
    return tmp_path


@pytest.mark.parametrize(("layer", "gate"), [("0", "forget"), ("1", "cell_state")])
def test_the_command(folder, layer, gate, capsys, monkeypatch):
    drawn = {}

    def spy(activations, **options):
        figure = plot_gates(activations, **options)
        drawn.update(values=activations[gate], figure=figure)
        return figure

    monkeypatch.setattr("rnnfast.explain.plot_gates", spy)
    plot = folder / "gates.png"
    arguments = ["--model", str(folder), "--text", "that cat", "--plot", str(plot)]
    assert main(["explain", "gates", *arguments, "--layer", layer, "--gate", gate]) == 0
    assert plot.read_bytes().startswith(PNG)
    output = capsys.readouterr().out
    assert output.endswith(f"\nwrote {plot}\n")

    model = checkpoint.load(folder, lstm=nn.LSTM).eval()
    tokens = model.vocabulary.encode("that cat")
    x = model.embedding(tokens).unsqueeze(1)
    lstm = rnnfast.LSTM(30, 30, 2, backend="reference")
    lstm.load_state_dict(model.lstm.state_dict())
    with record_gates(lstm) as record:
        lstm(x)
    values = record[f"l{layer}"][gate].squeeze(1)
    torch.testing.assert_close(drawn["values"][0], values)
    most = values.var(dim=0).argsort(descending=True)[:24].tolist()
    labels = drawn["figure"].axes[0].get_yticklabels()
    assert [int(label.get_text()) for label in labels] == sorted(most)
    name = gate.replace("_", " ") if gate == "cell_state" else f"{gate} gate"
    assert drawn["figure"].get_suptitle() == f"{name}, the 24 of 30 units that vary most"
    assert "the 24 of 30 units that vary most over this text; --units chooses others" in output
    row = [line.split()[-3:] for line in output.splitlines() if line.startswith(gate[:4])][-1]
    shown = [float(number) for number in row]
    assert shown == pytest.approx(
        [values.mean().item(), values.min().item(), values.max().item()], abs=6e-4
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--text", "dog"], "lacks 'd', 'g', 'o'"),
        (["--text", ""], "at least one character"),
        (["--layer", "2"], "--layer should be between 0 and 1, got 2"),
        (["--layer", "-1"], "0 or more"),
        (["--units", "3", "30"], "units should be between 0 and 29, got 30"),
        (["--gate", "carry"], "invalid choice"),
        (["--model", "nowhere"], "nowhere does not exist"),
    ],
)
def test_the_command_refuses(folder, options, words, capsys):
    arguments = ["--model", str(folder), "--text", "cat", "--plot", str(folder / "gates.png")]
    with pytest.raises(SystemExit) as stop:
        main(["explain", "gates", *arguments, *options])
    output = capsys.readouterr()
    assert (stop.value.code, output.out) == (2, "")
    assert words in output.err
    assert output.err.count("\n") == 1


def test_a_model_without_a_vocabulary(folder, capsys):
    checkpoint.save(CharLSTM(5, 4), folder / checkpoint.FILE_NAME)
    with pytest.raises(SystemExit):
        main(["explain", "gates", "--model", str(folder), "--text", "cat", "--plot", "gates.png"])
    assert "has no vocabulary" in capsys.readouterr().err
