"""Frozen modules exported to ONNX give the same in ONNX Runtime, up to what int8 rounds there."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from covering import quick_values
from torch import Tensor, nn
from torch.export import Dim

import rnnfast
import rnnfast.onnx
from rnnfast import backend
from rnnfast.frozen import FrozenLayers

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
if backend.EXTENSION is None:
    pytest.skip("frozen modules need the extension", allow_module_level=True)

TIME, BATCH = Dim("time"), Dim("batch")
SIZES = [(6, 3), (1, 1), (13, 5)]
"""Pairs of T and B; models are exported with the first."""
QUANTIZED = "DynamicQuantizeLSTM"
HAS_VNNI = "_vnni" in Path("/proc/cpuinfo").read_text()
full = pytest.mark.full
FLOAT: list[Any] = [
    ("float16", nn.LSTM, {}),
    ("bfloat16", nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    ("bfloat16", nn.GRU, {"bias": False}),
    ("float32", nn.RNN, {"num_layers": 2}),
    ("bfloat16", nn.RNN, {"nonlinearity": "relu"}),
    pytest.param("float32", nn.LSTM, {}, marks=full),
    pytest.param("float16", nn.GRU, {"bidirectional": True}, marks=full),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def flat(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [tensor for value in values for tensor in flat(value)]


def session(model: Any) -> Any:
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # several would round parts of the batch on their own
    data = model.SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run(runner: Any, *args: Any) -> list[Tensor]:
    names = [value.name for value in runner.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in zip(names, flat(args), strict=True)}
    return [torch.from_numpy(array) for array in runner.run(None, feed)]


def recurrent(model: Any) -> list[str]:
    kinds = {"LSTM", "GRU", "RNN", QUANTIZED}
    return [node.op_type for node in model.graph.node if node.op_type in kinds]


def int8(module: nn.Module) -> nn.Module:
    """The frozen module. Without VNNI, ONNX Runtime saturates where integers are above 64."""
    frozen = rnnfast.freeze(module, "int8")
    if not HAS_VNNI:
        saved = frozen.state_dict()
        for name, value in saved.items():
            if value.dtype is torch.int8:
                saved[name] = value // 2
                saved[f"{name}_scale"] *= 2
        frozen.load_state_dict(saved)
    return frozen


def rounded_to_8_bits(values: Tensor) -> Tensor:
    """As DynamicQuantizeLSTM rounds x, and h in each step: 255 steps from least to largest."""
    least, largest = values.min().clamp(max=0), values.max().clamp(min=0)
    scale = (largest - least) / 255
    if scale == 0:
        return values
    zero = (-least / scale).round()
    return (((values / scale).round() + zero).clamp(0, 255) - zero) * scale


def oracle(frozen: FrozenLayers, x: Tensor, h: Tensor, c: Tensor) -> list[Tensor]:
    """An LSTM in float64 with the integers' weights, and x and h rounded to 8 bits."""
    w = {name: (each.dense().double(), each.bias) for name, each in frozen.unpacked().items()}
    (w_ih, b_ih), (w_hh, b_hh) = w["weight_ih_l0"], w["weight_hh_l0"]
    x, h, c, outputs = rounded_to_8_bits(x).double(), h.double(), c.double(), []
    for x_t in x:
        gates = x_t @ w_ih.T + rounded_to_8_bits(h.float()).double() @ w_hh.T + b_ih + b_hh
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return [torch.stack(outputs), h.unsqueeze(0), c.unsqueeze(0)]


# ---- float weights ----


@pytest.mark.parametrize(
    ("weights", "kind", "options"), FLOAT, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_float_weights(weights: str, kind: type[nn.Module], options: dict[str, Any]) -> None:
    """They are ONNX's own nodes, with the rounded weights as float32."""
    frozen = rnnfast.freeze(kind(4, 5, **options), weights)
    batch_first = options.get("batch_first", False)

    def arguments(T: int, B: int) -> Any:
        return (torch.randn((B, T, 4) if batch_first else (T, B, 4)),)

    shapes = ({0: BATCH, 1: TIME} if batch_first else {0: TIME, 1: BATCH},)
    program = rnnfast.onnx.export(frozen, arguments(*SIZES[0]), dynamic_shapes=shapes)
    count = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    assert recurrent(program.model_proto) == [kind.__name__] * count
    runner = session(program.model_proto)
    for T, B in SIZES:
        args = arguments(T, B)
        torch.testing.assert_close(run(runner, *args), flat(frozen(*args)), rtol=1e-5, atol=1e-6)


class Reader(nn.Module):
    """Layers that read one-hot tokens, or those of an embedding."""

    def __init__(self, layers: nn.Module, table: nn.Embedding | None) -> None:
        super().__init__()
        self.layers, self.table = layers, table

    def forward(self, tokens: Tensor) -> Tensor:
        more = {} if self.table is None else {"embedding": self.table}
        return self.layers(tokens, **more)[0]


@quick_values(weights=["float32", "bfloat16", "float16", "int8"], embeds=[False, True])
def test_tokens(weights: str, embeds: bool) -> None:
    """The nodes read vectors."""
    table = nn.Embedding(20, 9) if embeds else None
    layers = rnnfast.LSTM(9 if embeds else 20, 5, bidirectional=True, tokens=not embeds)
    model = Reader(layers, table).requires_grad_(False)
    if weights == "int8":
        model.layers = int8(layers)
    frozen = model if weights == "int8" else rnnfast.freeze(model, weights)
    tokens = torch.randint(20, (100, 3))
    program = rnnfast.onnx.export(frozen, (tokens,), dynamic_shapes=({0: TIME, 1: BATCH},))
    kind = QUANTIZED if weights == "int8" else "LSTM"
    assert recurrent(program.model_proto) == [kind] * 2
    runner = session(program.model_proto)
    bound = 0.03 if weights == "int8" else 1e-6
    for T, B in [*SIZES, (100, 3)]:
        tokens = torch.randint(20, (T, B))
        torch.testing.assert_close(run(runner, tokens), [frozen(tokens)], rtol=1e-5, atol=bound)


@pytest.mark.parametrize(
    "kind",
    [nn.LSTMCell, *(pytest.param(kind, marks=full) for kind in (nn.GRUCell, nn.RNNCell))],
)
def test_float_cells(kind: type[nn.Module]) -> None:
    frozen = rnnfast.freeze(kind(4, 5), "bfloat16")
    program = rnnfast.onnx.export(frozen, (torch.randn(3, 4),), dynamic_shapes=({0: BATCH},))
    assert recurrent(program.model_proto) == [kind.__name__.removesuffix("Cell")]
    runner = session(program.model_proto)
    for B in (3, 7):
        x = torch.randn(B, 4)
        torch.testing.assert_close(run(runner, x), flat(frozen(x)), rtol=1e-5, atol=1e-6)


# ---- int8 ----


@pytest.mark.parametrize(
    ("T", "B", "I", "H"),
    [
        (6, 3, 9, 20),
        (50, 1, 128, 256),
        *(pytest.param(*sizes, marks=full) for sizes in [(20, 5, 64, 64), (30, 2, 33, 70)]),
    ],
)
def test_int8_differs_only_by_8_bits(T: int, B: int, I: int, H: int) -> None:
    """ONNX Runtime computes what the integers and 8-bit inputs and states give, and nothing less.

    So its outputs are as far from the frozen module's, which has 13 bits, as these roundings make
    them: by 0.7 to 1.1 % of their root mean square, and 0.012 at most, in cases like these.
    """
    frozen = int8(nn.LSTM(I, H))
    x, h, c = torch.randn(T, B, I), torch.rand(1, B, H) - 0.5, torch.randn(1, B, H)
    program = rnnfast.onnx.export(frozen, (x, (h, c)))
    assert recurrent(program.model_proto) == [QUANTIZED]
    found = run(session(program.model_proto), x, h, c)
    for one, other in zip(found, oracle(frozen, x, h[0], c[0]), strict=True):
        # A state may be rounded to the other side, which is worth 2/255 of one weight.
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-3)
    difference = found[0] - frozen(x, (h, c))[0]
    assert difference.abs().max() < 0.02
    assert difference.square().mean().sqrt() < 0.02 * found[0].square().mean().sqrt()


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (False, {"bias": False}),
        (True, {"num_layers": 2, "bidirectional": True}),
        pytest.param(
            False, {"num_layers": 2, "bidirectional": True, "batch_first": True}, marks=full
        ),
    ],
    ids=str,
)
def test_int8_layers(given: bool, options: dict[str, Any]) -> None:
    frozen = int8(nn.LSTM(9, 20, **options))
    nodes = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    batch_first = options.get("batch_first", False)

    def arguments(T: int, B: int) -> tuple[Any, ...]:
        x = torch.randn((B, T, 9) if batch_first else (T, B, 9))
        states = torch.rand(nodes, B, 20) - 0.5, torch.randn(nodes, B, 20)
        return (x, states) if given else (x,)

    shapes: list[Any] = [{0: BATCH, 1: TIME} if batch_first else {0: TIME, 1: BATCH}]
    shapes += [({1: BATCH}, {1: BATCH})] * given
    program = rnnfast.onnx.export(frozen, arguments(*SIZES[0]), dynamic_shapes=tuple(shapes))
    assert recurrent(program.model_proto) == [QUANTIZED] * nodes
    runner = session(program.model_proto)
    for T, B in SIZES:
        args = arguments(T, B)
        torch.testing.assert_close(run(runner, *args), flat(frozen(*args)), rtol=0.02, atol=0.02)


def test_int8_weights_in_the_file(tmp_path: Path) -> None:
    """The integers and scales are those of the frozen layer, in the order i, o, f, c."""
    frozen = rnnfast.freeze(nn.LSTM(9, 20, bidirectional=True), "int8")
    path = tmp_path / "lstm.onnx"
    rnnfast.onnx.export(frozen, (torch.randn(6, 3, 9),), path)
    model = onnx.load(path)
    values = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == QUANTIZED]
    for node, end in zip(nodes, ("", "_reverse"), strict=True):
        assert node.domain == "com.microsoft"
        attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        assert attributes == {"hidden_size": 20, "direction": b"reverse" if end else b"forward"}
        inputs = [None if not name else values.get(name) for name in node.input]
        _, w, r, b, lengths, _, _, peepholes, w_scale, w_zero, r_scale, r_zero = inputs
        assert lengths is None
        assert peepholes is None
        assert not w_zero.any()
        assert not r_zero.any()
        assert w_zero.shape == r_zero.shape == (1, 80)
        bias = []
        for kind, found, scale in (("ih", w, w_scale), ("hh", r, r_scale)):
            expected = frozen.unpacked()[f"weight_{kind}_l0{end}"]
            assert found.dtype.name == "int8"
            assert torch.equal(torch.from_numpy(found[0].T), in_order(expected.weight))
            assert torch.equal(torch.from_numpy(scale[0]), in_order(expected.scale))
            bias.append(in_order(expected.bias))
        assert torch.equal(torch.from_numpy(b[0]), torch.cat(bias))
    integers = sum(each.nbytes for each in values.values() if each.dtype.name == "int8")
    assert sum(each.nbytes for each in values.values()) < 2 * integers  # no float or packed copy


def in_order(rows: Tensor) -> Tensor:
    i, f, g, o = rows.chunk(4)
    return torch.cat([i, o, f, g])


def test_int8_cells() -> None:
    frozen = int8(nn.LSTMCell(9, 20))
    program = rnnfast.onnx.export(frozen, (torch.randn(3, 9),), dynamic_shapes=({0: BATCH},))
    assert recurrent(program.model_proto) == [QUANTIZED]
    runner = session(program.model_proto)
    for B in (3, 7):
        x = torch.randn(B, 9)
        torch.testing.assert_close(run(runner, x), flat(frozen(x)), rtol=0.02, atol=0.02)


class WithLengths(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        return self.rnn(x, lengths=lengths)


@pytest.mark.parametrize("weights", ["int8", pytest.param("float16", marks=full)])
def test_lengths(weights: str) -> None:
    layers = nn.LSTM(9, 20, num_layers=2, bidirectional=True)
    model = WithLengths(int8(layers) if weights == "int8" else rnnfast.freeze(layers, weights))
    bound = 0.02 if weights == "int8" else 1e-5

    def arguments(T: int, B: int) -> tuple[Tensor, Tensor]:
        return torch.randn(T, B, 9), torch.randint(1, T + 1, (B,))

    shapes = ({0: TIME, 1: BATCH}, {0: BATCH})
    program = rnnfast.onnx.export(model, arguments(*SIZES[0]), dynamic_shapes=shapes)
    runner = session(program.model_proto)
    for T, B in SIZES:
        args = arguments(T, B)
        torch.testing.assert_close(run(runner, *args), flat(model(*args)), rtol=bound, atol=bound)


# ---- models, and other ways to export ----


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 9)
        self.lstm = nn.LSTM(9, 20)
        self.gru = nn.GRU(20, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.gru(self.lstm(self.embedding(tokens))[0])[0])


TOKENS = torch.arange(24).reshape(6, 4) % 11


def test_models_frozen_in_place() -> None:
    model = Model().eval().requires_grad_(False)
    rnnfast.accelerate(model, weights={"lstm": "int8", "gru": "bfloat16"}, keep_float=True)
    program = rnnfast.onnx.export(model, (TOKENS,))
    assert recurrent(program.model_proto) == [QUANTIZED, "GRU"]
    (found,) = run(session(program.model_proto), TOKENS)
    torch.testing.assert_close(found, model(TOKENS), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("optimize", [True, pytest.param(False, marks=full)])
def test_programs_and_the_table(optimize: bool) -> None:
    """Also a program that was saved, and torch.onnx.export with this package's translations."""
    frozen, x = rnnfast.freeze(nn.GRU(4, 5), "float16"), torch.randn(6, 3, 4)
    file = io.BytesIO()
    torch.export.save(torch.export.export(frozen, (x,)), file)
    file.seek(0)
    program = torch.export.load(file)
    table = rnnfast.onnx.translations()
    for exported in (
        rnnfast.onnx.export(program, optimize=optimize),
        torch.onnx.export(
            frozen, (x,), dynamo=True, custom_translation_table=table, optimize=optimize
        ),
    ):
        found = run(session(exported.model_proto), x)
        torch.testing.assert_close(found, flat(frozen(x)), rtol=1e-5, atol=1e-6)


def test_weights_that_belong_to_no_module() -> None:
    """A closure holds the frozen layer: its weights are constants of the program."""
    frozen, x = rnnfast.freeze(nn.GRU(4, 5)), torch.randn(6, 3, 4)

    class Holder(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return frozen(x)

    program = rnnfast.onnx.export(Holder(), (x,))
    found = run(session(program.model_proto), x)
    torch.testing.assert_close(found, flat(frozen(x)), rtol=1e-5, atol=1e-6)


# ---- what cannot be exported ----


def message_of(call: Any) -> str:
    with pytest.raises(torch.onnx.OnnxExporterError) as caught:
        call()
    error: BaseException = caught.value
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


@pytest.mark.parametrize(
    ("kind", "operator"),
    [(nn.RNN, "RNN"), (nn.GRUCell, "GRU"), pytest.param(nn.GRU, "GRU", marks=full)],
)
def test_int8_without_a_node_is_refused(kind: type[nn.Module], operator: str) -> None:
    frozen = rnnfast.freeze(kind(4, 5), "int8")
    x = torch.randn(3, 4) if issubclass(kind, nn.RNNCellBase) else torch.randn(6, 3, 4)
    assert message_of(lambda: rnnfast.onnx.export(frozen, (x,))) == (
        f"ONNX Runtime has no node for int8 weights of {operator}, only of LSTM: freeze the model "
        "with weights='float32', or export it unfrozen"
    )


@pytest.mark.parametrize("weights", ["float32", pytest.param("int8", marks=full)])
def test_projection_and_reset_are_refused(weights: str) -> None:
    words = "ONNX's recurrent nodes have no reset and no projection"
    x = torch.randn(6, 3, 4)
    projected = rnnfast.freeze(nn.LSTM(4, 5, proj_size=2), weights)
    assert message_of(lambda: rnnfast.onnx.export(projected, (x,))) == words
    plain = rnnfast.freeze(nn.LSTM(4, 5), weights)
    reset = {"reset": torch.zeros(6, 3, dtype=torch.bool)}
    assert message_of(lambda: rnnfast.onnx.export(plain, (x,), kwargs=reset)) == words


def test_weights_that_are_inputs_are_refused() -> None:
    frozen, x = rnnfast.freeze(nn.GRU(4, 5)), torch.randn(6, 3, 4)
    w_ih, w_hh = frozen.packed_ih_l0, frozen.packed_hh_l0

    class Operator(nn.Module):
        def forward(self, x: Tensor, w_ih: Tensor, w_hh: Tensor) -> Tensor:
            h = x.new_zeros(3, 5)
            call = torch.ops.rnnfast.frozen_layer
            return call("gru", x, h, None, w_ih, w_hh, None, False)[0]

    words = message_of(lambda: rnnfast.onnx.export(Operator(), (x, w_ih, w_hh)))
    assert words.startswith("the weights of a frozen layer are no constants here")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dynamo", [True, False])
def test_exporters_without_the_translation_are_refused(dynamo: bool) -> None:
    frozen, x = rnnfast.freeze(nn.LSTM(4, 5)), torch.randn(6, 3, 4)
    with pytest.raises((RuntimeError, torch.onnx.OnnxExporterError)) as caught:
        torch.onnx.export(frozen, (x,), io.BytesIO(), dynamo=dynamo)
    errors = [caught.value]
    while errors[-1].__cause__ is not None:
        errors.append(errors[-1].__cause__)
    words = "torch.onnx.export has no translation of rnnfast::frozen_layer. Use rnnfast.onnx.export"
    assert any(words in str(error) for error in errors)
