"""Modules exported to ONNX use recurrent nodes, and give the same results in ONNX Runtime."""

import os
import subprocess
import sys

import pytest
import torch
from covering import quick_values
from torch import nn
from torch.export import Dim

import rnnfast
import rnnfast.onnx
from rnnfast import backend
from rnnfast.reference import CELLS

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

EXPECT_FUSED = backend.EXTENSION is not None or os.environ.get("RNNFAST_EXPECT_EXTENSION") != "0"
pytestmark = pytest.mark.skipif(not EXPECT_FUSED, reason="the extension is not expected")

TIME, BATCH = Dim("time"), Dim("batch")
SIZES = [(6, 3), (1, 1), (13, 5)]
"""Pairs of T and B; models are exported with the first."""
OPERATORS = {"elman_tanh": "RNN", "elman_relu": "RNN", "gru": "GRU", "lstm": "LSTM"}
MODULES = {
    "elman_tanh": rnnfast.RNN,
    "elman_relu": lambda *a, **options: rnnfast.RNN(*a, nonlinearity="relu", **options),
    "gru": rnnfast.GRU,
    "lstm": rnnfast.LSTM,
}
ONE_STEP = {
    "elman_tanh": rnnfast.RNNCell,
    "elman_relu": lambda *a: rnnfast.RNNCell(*a, nonlinearity="relu"),
    "gru": rnnfast.GRUCell,
    "lstm": rnnfast.LSTMCell,
}

cells = pytest.mark.parametrize("cell", CELLS)


def flat(values):
    """Returns the tensors in nested tuples."""
    if isinstance(values, torch.Tensor):
        return [values]
    return [tensor for value in values for tensor in flat(value)]


def states(cell, *shape):
    """Returns an argument ``hx`` with states of this shape."""
    values = tuple(torch.randn(shape) for _ in range(CELLS[cell].states))
    return values if len(values) > 1 else values[0]


def like_states(cell, dynamic):
    """Returns the dynamic shapes of an argument ``hx``."""
    return (dynamic,) * CELLS[cell].states if CELLS[cell].states > 1 else dynamic


def recurrent_nodes(model):
    return [node for node in model.graph.node if node.op_type in set(OPERATORS.values())]


def session(model):
    onnx.checker.check_model(model, full_check=True)
    data = model.SerializeToString()
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])


STACK = {"num_layers": 2, "bidirectional": True, "dropout": 0.5}


def assert_same_numbers(session, module, args):
    names = [value.name for value in session.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in zip(names, flat(args), strict=True)}
    actual = [torch.from_numpy(array) for array in session.run(None, feed)]
    with torch.no_grad():
        expected = flat(module(*args))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


LAYERS = [
    (False, {}),
    (True, {"bias": False, "batch_first": True}),
    (True, {"bidirectional": True}),
    (False, STACK | {"batch_first": True}),
    (True, STACK),
]
"""Whether the initial state is given, and the options."""


@quick_values(cell=[*CELLS], layers=LAYERS)
def test_layers(cell, layers):
    given, options = layers
    torch.manual_seed(0)
    module = MODULES[cell](4, 5, **options).eval()
    batch_first = options.get("batch_first", False)
    nodes = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)

    def arguments(T, B):
        x = torch.randn((B, T, 4) if batch_first else (T, B, 4))
        return (x, states(cell, nodes, B, 5)) if given else (x,)

    shapes = [{0: BATCH, 1: TIME} if batch_first else {0: TIME, 1: BATCH}]
    shapes += [like_states(cell, {1: BATCH})] * given
    program = rnnfast.onnx.export(module, arguments(*SIZES[0]), dynamic_shapes=tuple(shapes))
    model = program.model_proto
    assert [node.op_type for node in recurrent_nodes(model)] == [OPERATORS[cell]] * nodes
    runner = session(model)
    for T, B in SIZES:
        assert_same_numbers(runner, module, arguments(T, B))


class WithLengths(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x, lengths):
        return self.rnn(x, lengths=lengths)


# the others share their code with these
@pytest.mark.parametrize(
    "cell",
    [pytest.param(c, marks=[pytest.mark.full] * (c not in ("elman_relu", "lstm"))) for c in CELLS],
)
def test_lengths(cell):
    """Lengths become the input sequence_lens of ONNX's nodes."""
    torch.manual_seed(0)
    model = WithLengths(MODULES[cell](4, 5, num_layers=2, bidirectional=True)).eval()

    def arguments(T, B):
        return torch.randn(T, B, 4), torch.randint(1, T + 1, (B,))

    shapes = ({0: TIME, 1: BATCH}, {0: BATCH})
    program = rnnfast.onnx.export(model, arguments(*SIZES[0]), dynamic_shapes=shapes)
    assert [node.op_type for node in recurrent_nodes(program.model_proto)] == [OPERATORS[cell]] * 4
    runner = session(program.model_proto)
    for T, B in SIZES:
        assert_same_numbers(runner, model, arguments(T, B))


@pytest.mark.parametrize("options", [{"proj_size": 2}, {}], ids=["projection", "reset"])
def test_what_onnx_lacks_is_refused(options):
    module = rnnfast.LSTM(4, 5, **options).eval()
    kwargs = {} if options else {"reset": torch.zeros(6, 3, dtype=torch.bool)}
    with pytest.raises(torch.onnx.OnnxExporterError) as caught:
        rnnfast.onnx.export(module, (torch.randn(6, 3, 4),), kwargs=kwargs)
    error = caught.value
    while error.__cause__ is not None:
        error = error.__cause__
    assert "no reset and no projection" in str(error)


@quick_values(cell=[*CELLS], embedded=[False, True])
def test_tokens(cell, embedded):
    """Tokens become one-hot vectors or rows of the embedding, since ONNX's nodes read vectors."""

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(9, 5) if embedded else None
            options = {} if embedded else {"tokens": True}
            self.layers = MODULES[cell](5 if embedded else 9, 7, **options)

        def forward(self, tokens):
            return self.layers(tokens, embedding=self.embedding)

    torch.manual_seed(0)
    module = Reader().eval()
    tokens = torch.randint(9, SIZES[0])
    program = rnnfast.onnx.export(module, (tokens,), dynamic_shapes=({0: TIME, 1: BATCH},))
    assert len(recurrent_nodes(program.model_proto)) == 1
    run = session(program.model_proto)
    for size in SIZES:
        assert_same_numbers(run, module, (torch.randint(9, size),))


@quick_values(cell=[*CELLS], given=[False, True])
def test_single_cells(cell, given):
    torch.manual_seed(0)
    module = ONE_STEP[cell](4, 5).eval()

    def arguments(B):
        return (torch.randn(B, 4), *([states(cell, B, 5)] * given))

    shapes = ({0: BATCH}, *([like_states(cell, {0: BATCH})] * given))
    model = rnnfast.onnx.export(module, arguments(3), dynamic_shapes=shapes).model_proto
    assert [node.op_type for node in recurrent_nodes(model)] == [OPERATORS[cell]]
    runner = session(model)
    for B in (3, 1, 8):
        assert_same_numbers(runner, module, arguments(B))


def test_a_single_sequence():
    module = rnnfast.GRU(4, 5).eval()
    model = rnnfast.onnx.export(module, (torch.randn(6, 4),), dynamic_shapes=({0: TIME},))
    runner = session(model.model_proto)
    for T in (6, 1, 13):
        assert_same_numbers(runner, module, (torch.randn(T, 4),))


class Tagger(nn.Module):
    """Symbols (B, T) -> scores (B, T, 7)."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.lstm = rnnfast.LSTM(8, 64, batch_first=True)
        self.score = nn.Linear(64, 7)

    def forward(self, symbols):
        return self.score(self.lstm(self.embedding(symbols))[0])


@pytest.fixture
def tagger():
    """A model whose weights are too large for torch's exporter to fold constants."""
    torch.manual_seed(0)
    return Tagger().eval()


def symbols(B, T):
    return torch.randint(11, (B, T))


def test_weights_of_a_file_are_constants(tagger, tmp_path):
    path = tmp_path / "tagger.onnx"
    rnnfast.onnx.export(tagger, (symbols(2, 6),), path, dynamic_shapes=({0: BATCH, 1: TIME},))
    model = onnx.load(path)
    (node,) = recurrent_nodes(model)
    constants = {value.name for value in model.graph.initializer}
    assert constants.issuperset(node.input[1:4])
    runner = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert_same_numbers(runner, tagger, (symbols(5, 9),))


@pytest.mark.parametrize("optimize", [False, True])
def test_the_table_serves_torch_s_own_export(tagger, optimize):
    program = torch.export.export(tagger, (symbols(2, 6),), dynamic_shapes=({0: BATCH, 1: TIME},))
    table = rnnfast.onnx.translations()
    model = torch.onnx.export(
        program, dynamo=True, custom_translation_table=table, optimize=optimize
    ).model_proto
    assert len(recurrent_nodes(model)) == 1
    assert_same_numbers(session(model), tagger, (symbols(5, 9),))


def test_the_caller_s_translations_go_first():
    operator = torch.ops.rnnfast.gru.default
    calls = []

    def spy(*arguments):
        calls.append(operator)
        return rnnfast.onnx.translations()[operator](*arguments)

    module, x = rnnfast.GRU(4, 5).eval(), torch.randn(6, 3, 4)
    program = rnnfast.onnx.export(module, (x,), custom_translation_table={operator: spy})
    assert calls == [operator]
    assert_same_numbers(session(program.model_proto), module, (x,))


def test_no_operators_without_the_extension(monkeypatch):
    monkeypatch.setattr(backend, "EXTENSION", None)
    assert rnnfast.onnx.translations() == {}


def test_importing_rnnfast_does_not_import_onnx():
    code = "import sys, rnnfast, rnnfast.onnx; print({'onnx', 'onnxscript'} & {*sys.modules})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "set()\n"
