"""Malformed calls raise torch.nn's errors; forced backends that cannot run say why."""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import rnnfast
from rnnfast import functional
from rnnfast.backend import EXTENSION

EXPECT_FUSED = EXTENSION is not None or os.environ.get("RNNFAST_EXPECT_EXTENSION") != "0"
BACKENDS = [None, "aten", "reference", *(["fused"] if EXPECT_FUSED else [])]
LAYERS = ["RNN", "GRU", "LSTM"]
CELLS = ["RNNCell", "GRUCell", "LSTMCell"]

zeros = torch.zeros


def error_of(call):
    """Returns the type and message of what ``call`` raises."""
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    pytest.fail("nothing was raised")


def state(kind, *shape, **options):
    """Returns a state for a module of this kind: a tensor, or a pair for LSTMs."""
    return (zeros(*shape, **options),) * 2 if kind.startswith("LSTM") else zeros(*shape, **options)


# The modules have input_size 3, hidden_size 4 and one layer.
LAYER_CALLS = {
    "no time": lambda m, s: m(zeros(0, 2, 3)),
    "no time, one sequence": lambda m, s: m(zeros(0, 3)),
    "no time, no batch": lambda m, s: m(zeros(0, 0, 3)),
    "1-D": lambda m, s: m(zeros(3)),
    "4-D": lambda m, s: m(zeros(5, 2, 3, 3)),
    "wrong input size": lambda m, s: m(zeros(5, 2, 7)),
    "integers": lambda m, s: m(zeros(5, 2, 3, dtype=torch.long)),
    "float64 input": lambda m, s: m(zeros(5, 2, 3, dtype=torch.float64)),
    "float64 state": lambda m, s: m(zeros(5, 2, 3), s(1, 2, 4, dtype=torch.float64)),
    "integer state": lambda m, s: m(zeros(5, 2, 3), s(1, 2, 4, dtype=torch.long)),
    "wrong batch of state": lambda m, s: m(zeros(5, 2, 3), s(1, 3, 4)),
    "wrong layers of state": lambda m, s: m(zeros(5, 2, 3), s(2, 2, 4)),
    "wrong size of state": lambda m, s: m(zeros(5, 2, 3), s(1, 2, 5)),
    "2-D state": lambda m, s: m(zeros(5, 2, 3), s(2, 4)),
    "3-D state, one sequence": lambda m, s: m(zeros(5, 3), s(1, 1, 4)),
    "input elsewhere": lambda m, s: m(zeros(5, 2, 3, device="meta")),
    "state elsewhere": lambda m, s: m(zeros(5, 2, 3), s(1, 2, 4, device="meta")),
    "weights elsewhere": lambda m, s: m.to("meta")(zeros(5, 2, 3)),
    "None": lambda m, s: m(None),
    "a list": lambda m, s: m([[1.0, 2.0, 3.0]]),
    "a NumPy array": lambda m, s: m(zeros(5, 2, 3).numpy()),
    "state in a tuple": lambda m, s: m(zeros(5, 2, 3), (s(1, 2, 4),)),
    "three states": lambda m, s: m(zeros(5, 2, 3), (zeros(1, 2, 4),) * 3),
    "state is a number": lambda m, s: m(zeros(5, 2, 3), 1.0),
    "states are None": lambda m, s: m(zeros(5, 2, 3), (None, None)),
}

# torch.nn's layers leave these to the kernels, whose messages differ between processors
DTYPES_OF_STATES = {"float64 state": "float64", "integer state": "int64"}
SAME_DTYPE = (
    "Input and {0} tensors are not the same dtype, found input tensor with torch.{1} and {0} "
    "tensor with torch.{2}"
)

CELL_CALLS = {
    "3-D": lambda m, s: m(zeros(5, 2, 3)),
    "0-D": lambda m, s: m(zeros(())),
    "wrong input size": lambda m, s: m(zeros(2, 7)),
    "wrong input size, one": lambda m, s: m(zeros(7)),
    "integers": lambda m, s: m(zeros(2, 3, dtype=torch.long)),
    "float64 input": lambda m, s: m(zeros(2, 3, dtype=torch.float64)),
    "float64 state": lambda m, s: m(zeros(2, 3), s(2, 4, dtype=torch.float64)),
    "integer state": lambda m, s: m(zeros(2, 3), s(2, 4, dtype=torch.long)),
    "wrong batch of state": lambda m, s: m(zeros(2, 3), s(3, 4)),
    "wrong size of state": lambda m, s: m(zeros(2, 3), s(2, 5)),
    "1-D state": lambda m, s: m(zeros(2, 3), s(4)),
    "3-D state": lambda m, s: m(zeros(2, 3), s(1, 2, 4)),
    "2-D state, one": lambda m, s: m(zeros(3), s(1, 4)),
    "input elsewhere": lambda m, s: m(zeros(2, 3, device="meta")),
    "state elsewhere": lambda m, s: m(zeros(2, 3), s(2, 4, device="meta")),
    "weights elsewhere": lambda m, s: m.to("meta")(zeros(2, 3)),
    "None": lambda m, s: m(None),
    "a list": lambda m, s: m([1.0, 2.0, 3.0]),
    "state in a tuple": lambda m, s: m(zeros(2, 3), (s(2, 4),)),
    "three states": lambda m, s: m(zeros(2, 3), (zeros(2, 4),) * 3),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kind", "call"),
    [(kind, name) for kind in LAYERS for name in LAYER_CALLS]
    + [(kind, name) for kind in CELLS for name in CELL_CALLS],
)
def test_malformed_call_raises_as_torch(kind, call, backend):
    calls = LAYER_CALLS if kind in LAYERS else CELL_CALLS
    expected = error_of(
        lambda: calls[call](getattr(nn, kind)(3, 4), lambda *a, **k: state(kind, *a, **k))
    )
    ours = getattr(rnnfast, kind)(3, 4, backend=backend)
    actual = error_of(lambda: calls[call](ours, lambda *a, **k: state(kind, *a, **k)))
    if kind in LAYERS and call in DTYPES_OF_STATES:
        expected = RuntimeError, SAME_DTYPE.format("hidden", "float32", DTYPES_OF_STATES[call])
    assert actual == expected


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("weight_ih_l0", (2, 2)),
        ("weight_hh_l0", (2, 2)),
        ("weight_hh_l0", (0,)),
        ("weight_hh_l0", (0, 4)),
        ("bias_hh_l0", (2,)),
    ],
)
@pytest.mark.parametrize("kind", LAYERS)
def test_weights_of_other_sizes_do_not_reach_torchs_kernels(kind, name, shape, packed):
    """oneDNN's LSTM would read beyond the ends of these weights."""
    module = getattr(rnnfast, kind)(3, 4, backend="aten")
    module.get_parameter(name).data = zeros(shape)
    x = zeros(5, 2, 3)
    with pytest.raises(RuntimeError, match=r"Expected (w|b)_.h (size|with 2)|input\.size"):
        module(nn.utils.rnn.pack_padded_sequence(x, [5, 3]) if packed else x)


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_float64_under_autocast_is_refused(kind):
    def call(namespace):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            getattr(namespace, kind)(3, 4)(zeros(2, 3, dtype=torch.float64))

    expected = error_of(lambda: call(nn))
    if kind in LAYERS:
        expected = RuntimeError, SAME_DTYPE.format("parameter", "float64", "float32")
    assert error_of(lambda: call(rnnfast)) == expected


CONSTRUCTOR_OPTIONS = [
    {"hidden_size": 0},
    {"hidden_size": -1},
    {"hidden_size": 2.5},
    {"input_size": 0},
    {"input_size": -2},
    {"num_layers": 0},
    {"num_layers": -1},
    {"dropout": 2},
    {"dropout": "a"},
    {"dropout": True},
    {"bias": 1},
    {"batch_first": 1},
    {"proj_size": 4},
    {"proj_size": -1},
    {"nonlinearity": "sigmoid"},
    {"unknown": 1},
]


@pytest.mark.parametrize("options", CONSTRUCTOR_OPTIONS, ids=str)
@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_constructor_raises_or_accepts_as_torch(kind, options):
    def outcome(namespace):
        try:
            return repr(getattr(namespace, kind)(**{"input_size": 3, "hidden_size": 4, **options}))
        except Exception as error:
            return type(error), str(error)

    assert outcome(rnnfast) == outcome(nn)


def test_cell_with_unknown_nonlinearity_raises_as_torch():
    calls = [lambda n=n: n.RNNCell(3, 4, nonlinearity="cube")(zeros(2, 3)) for n in (nn, rnnfast)]
    assert error_of(calls[0]) == error_of(calls[1])


W_IH, W_HH, B = zeros(16, 3), zeros(16, 4), zeros(16)
PAIR = (zeros(1, 2, 4), zeros(1, 2, 4))
FUNCTIONAL_CALLS = {
    "Expected 4 tensors in flat_weights, got 2": lambda: functional.lstm(
        zeros(5, 2, 3), PAIR, [W_IH, W_HH]
    ),
    "Expected w_hh size (16, 4), got [12, 4]": lambda: functional.lstm(
        zeros(5, 2, 3), PAIR, [W_IH, zeros(12, 4), B, B]
    ),
    "Expected b_hh size (16,), got [4]": lambda: functional.lstm(
        zeros(5, 2, 3), PAIR, [W_IH, W_HH, B, zeros(4)]
    ),
    "Expected w_ih size (16, 4), got [16, 3]": lambda: functional.lstm(
        zeros(5, 2, 3), None, [W_IH, W_HH] * 2, num_layers=2, has_biases=False
    ),
    "lstm expects two hidden states": lambda: functional.lstm(
        zeros(5, 2, 3), PAIR[:1], [W_IH, W_HH, B, B]
    ),
    "Expected hidden[0] size (1, 2, 4), got [1, 3, 4]": lambda: functional.lstm(
        zeros(5, 2, 3), (zeros(1, 3, 4),) * 2, [W_IH, W_HH, B, B]
    ),
    "Input and parameter tensors are not the same dtype": lambda: functional.lstm(
        zeros(5, 2, 3), None, [W_IH, W_HH, B, B.double()]
    ),
    "Input and parameter tensors are not at the same device": lambda: functional.lstm(
        zeros(5, 2, 3), None, [W_IH, W_HH, B, B.to("meta")]
    ),
    "Expected sequence length to be larger than 0 in RNN": lambda: functional.lstm(
        zeros(0, 2, 3), None, [W_IH, W_HH, B, B]
    ),
    "input must have 3 dimensions, got 2": lambda: functional.gru(
        zeros(5, 3), None, [zeros(12, 3), zeros(12, 4)], has_biases=False
    ),
    "input must have 2 dimensions, got 1": lambda: functional.lstm_cell(zeros(3), None, W_IH, W_HH),
    "input.size(-1) must be equal to input_size. Expected 3, got 5": lambda: functional.lstm_cell(
        zeros(2, 5), None, W_IH, W_HH
    ),
    "Expected both b_ih and b_hh or neither": lambda: functional.lstm_cell(
        zeros(2, 3), None, W_IH, W_HH, B
    ),
}


@pytest.mark.parametrize("words", FUNCTIONAL_CALLS)
def test_functional_says_what_is_wrong(words):
    with pytest.raises(RuntimeError) as caught:
        FUNCTIONAL_CALLS[words]()
    assert words in str(caught.value)


def test_functional_unknown_nonlinearity():
    with pytest.raises(ValueError, match="Unknown nonlinearity 'cube'"):
        functional.rnn(zeros(5, 2, 3), None, [W_IH, W_HH], nonlinearity="cube")


@pytest.mark.parametrize(
    "use",
    [
        lambda: rnnfast.LSTM(3, 4, backend="fast"),
        lambda: rnnfast.LSTMCell(3, 4, backend="fast"),
        lambda: functional.lstm_cell(zeros(2, 3), None, W_IH, W_HH, backend="fast"),
        lambda: rnnfast.use_backend("fast").__enter__(),
    ],
)
def test_unknown_backend_names_the_known_ones(use):
    with pytest.raises(ValueError, match="one of auto, fused, aten, reference, got: 'fast'"):
        use()


USE_AN_ODD_ENVIRONMENT = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import rnnfast
for warning in caught:
    print("warned:", warning.filename, warning.message)
import torch
x, layer, cell = torch.zeros(5, 2, 3), rnnfast.LSTM(3, 4), rnnfast.GRUCell(3, 4)
packed = torch.nn.utils.rnn.pack_sequence([x[:, 0]])
uses = (
    lambda: layer(x),
    lambda: cell(x[0]),
    lambda: layer(packed),
    lambda: rnnfast.functional.lstm_cell(x[0], None, *[w.detach() for w in layer.all_weights[0]]),
)
for use in uses:
    try:
        use()
    except ValueError as error:
        print("raised:", error)
rnnfast.LSTM(3, 4, backend="aten")(x)
with rnnfast.use_backend("reference"):
    layer(x)
    assert "lstm         reference reference" in rnnfast.doctor()
print(rnnfast.doctor())
"""


@pytest.mark.parametrize(
    ("variable", "words", "on_cuda"),
    [
        (
            "RNNFAST_BACKEND",
            "RNNFAST_BACKEND should be one of auto, fused, aten, reference, got: 'fast'",
            "error",
        ),
        pytest.param(
            *("RNNFAST_CPU_CAPABILITY", "CPU capability 'fast' is not available here", "aten"),
            marks=pytest.mark.skipif(not EXPECT_FUSED, reason="the extension is not expected"),
        ),
    ],
)
def test_an_environment_that_cannot_be_followed(variable, words, on_cuda):
    """Importing warns, every call that depends on it raises, and the doctor explains it."""
    environment = {**os.environ, variable: "fast"}
    command = [sys.executable, "-c", USE_AN_ODD_ENVIRONMENT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    warned = [line for line in lines if line.startswith("warned: <string> ")]
    assert len(warned) == 1
    assert words in warned[0]
    assert "see rnnfast.doctor()" in warned[0]
    raised = [line for line in lines if line.startswith("raised: ")]
    assert len(raised) == 4
    assert all(words in line for line in raised)
    report = done.stdout.partition("\nrnnfast ")[2]
    assert f"{variable}=fast" in report
    (row,) = re.findall("^lstm +(\\w+) +(\\w+)$", report, re.M)
    assert row == ("error", on_cuda)
    (cause,) = re.findall("^cpu: (.*)$", report, re.M)
    assert words in cause
    assert "nset" in cause


@pytest.fixture
def no_extension(monkeypatch):
    """Simulates an extension that failed to import."""
    monkeypatch.setattr(rnnfast.backend, "EXTENSION", None)
    monkeypatch.setattr(rnnfast.backend, "IMPORT_ERROR", ImportError("no such file"))
    monkeypatch.setattr(rnnfast.backend, "_FUSED_DEVICES", frozenset())
    monkeypatch.setattr(rnnfast.backend, "_warned", set())


@pytest.mark.usefixtures("no_extension")
def test_fused_without_extension_says_how_to_build_it():
    with pytest.raises(RuntimeError, match=r"(?s)loaded \(no such file\).*pip install"):
        rnnfast.LSTM(3, 4, backend="fused")(zeros(5, 2, 3))


@pytest.mark.usefixtures("no_extension")
def test_auto_without_extension_warns_once(recwarn):
    torch.manual_seed(0)
    ours = rnnfast.GRU(3, 4)
    torch.manual_seed(0)
    theirs = nn.GRU(3, 4)
    x = torch.randn(5, 2, 3)
    for _ in range(2):
        torch.testing.assert_close(ours(x), theirs(x))
    assert ["compiled extension cannot be loaded" in str(w.message) for w in recwarn] == [True]


@pytest.mark.usefixtures("no_extension")
def test_doctor_says_that_the_extension_is_missing():
    report = rnnfast.doctor()
    assert "cpu: the compiled extension cannot be loaded (no such file)" in report
    assert "pip install" in report
    assert all(f"{cell:<13}aten      aten" in report for cell in rnnfast.reference.CELLS)


@pytest.mark.parametrize("name", ["aten", "reference"])
def test_doctor_says_what_each_cell_would_run_on(name):
    with rnnfast.use_backend(name):
        report = rnnfast.doctor()
    assert torch.__version__ in report
    assert f"backend      {name}" in report
    assert all(f"{cell:<13}{name:<10}{name}" in report for cell in rnnfast.reference.CELLS)


@pytest.mark.skipif(not EXPECT_FUSED, reason="the extension is not expected")
def test_fused_refuses_other_dtypes():
    with pytest.raises(RuntimeError, match=r"no fused kernels for torch\.complex64 on cpu"):
        rnnfast.RNN(3, 4, dtype=torch.complex64, backend="fused")(
            zeros(5, 2, 3, dtype=torch.complex64)
        )
