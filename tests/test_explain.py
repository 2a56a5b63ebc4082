"""Explained steps and vanishing gradients: values, text, plots, command line."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import rnnfast
from rnnfast import explain
from rnnfast.cli import main
from rnnfast.explain import step as step_module
from rnnfast.explain.examples import example_step

CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "elman": nn.RNNCell}
STEPS = {"lstm": explain.lstm_step, "gru": explain.gru_step, "elman": explain.elman_step}
LAYERS = {"Elman": rnnfast.RNN, "GRU": rnnfast.GRU, "LSTM": rnnfast.LSTM}
SIZES = [(3, 2), (1, 1), (20, 11), (5, 8)]
PNG = b"\x89PNG\r\n\x1a\n"
FOUR_ROWS = {
    "weight_ih": [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9], [1.0, 1.1, 1.2]],
    "weight_hh": [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6], [0.7, 0.8]],
    "bias_ih": [0.01, 0.02, 0.03, 0.04],
    "bias_hh": [0.05, 0.06, 0.07, 0.08],
}
EIGHT_ROWS = {name: [row for row in rows for _ in range(2)] for name, rows in FOUR_ROWS.items()}
NUMBERS = {"x": [0.5, -0.2, 0.1], "h": [0.3, -0.4], "c": [0.8, -0.6], **EIGHT_ROWS}

cells = pytest.mark.parametrize("cell", CELLS)
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


def sample(cell, size, scale=1.0):
    """A cell of torch, and the arguments of a step with the same weights."""
    torch.manual_seed(1)
    inputs, hidden = size
    module = CELLS[cell](inputs, hidden, dtype=torch.float64)
    states = ("h", "c") if cell == "lstm" else ("h",)
    numbers = {"x": torch.randn(inputs, dtype=torch.float64) * scale}
    numbers |= {state: torch.randn(hidden, dtype=torch.float64) for state in states}
    return module, {**numbers, **dict(module.named_parameters())}


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def equations(text):
    """The (name, left side, right side) of all equations, with wrapped lines joined."""
    joined = re.sub(r"\n {5,}\+", " +", text)
    for line in joined.splitlines():
        if re.match(r"  \w+'?\[\d+\] =", line):
            name, *middle, value = (part.strip() for part in line.split(" = "))
            yield name, " = ".join(middle), float(value)


def evaluate(expression):
    return eval(
        re.sub(r" from \d+ more products", "", expression),
        {"sigmoid": sigmoid, "tanh": math.tanh},
    )


@cells
@sizes
def test_a_step_is_that_of_torch(cell, size):
    module, numbers = sample(cell, size)
    step = STEPS[cell](**numbers)
    hx = (numbers["h"], numbers["c"]) if cell == "lstm" else numbers["h"]
    expected = module(numbers["x"], hx)
    expected = dict(zip("hc", expected if cell == "lstm" else (expected,), strict=False))
    assert step.new_states.keys() == expected.keys()
    for name, state in expected.items():
        torch.testing.assert_close(step.new_states[name], state.detach(), rtol=1e-14, atol=1e-15)
    assert step.deviation < 1e-14
    assert (step.input_size, step.hidden_size) == size
    assert not any(state.requires_grad for state in step.new_states.values())


@cells
@sizes
def test_every_value_of_a_step(cell, size):
    _, numbers = sample(cell, size)
    step = STEPS[cell](**numbers)
    x, h = numbers["x"].tolist(), numbers["h"].tolist()
    w_ih, w_hh, b_ih, b_hh = (
        numbers[name].tolist() for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    names = {"lstm": "ifgo", "gru": "rzn", "elman": "h"}[cell]
    assert "".join(step.gates) == names
    for block, name in enumerate(names):
        for unit in range(len(h)):
            row = block * len(h) + unit
            from_x = sum(w * v for w, v in zip(w_ih[row], x, strict=True)) + b_ih[row]
            from_h = sum(w * v for w, v in zip(w_hh[row], h, strict=True)) + b_hh[row]
            scale = step.gates["r"][unit].item() if name == "n" else 1
            total = from_x + scale * from_h
            value = math.tanh(total) if name in "gnh" else sigmoid(total)
            assert step.from_x[name][unit].item() == pytest.approx(from_x, rel=1e-12, abs=1e-14)
            assert step.from_h[name][unit].item() == pytest.approx(from_h, rel=1e-12, abs=1e-14)
            assert step.preactivations[name][unit].item() == pytest.approx(total, abs=1e-12)
            assert step.gates[name][unit].item() == pytest.approx(value, abs=1e-12)


@cells
@sizes
@pytest.mark.parametrize("scale", [1.0, 1e9])
def test_what_is_written_is_right_and_fits(cell, size, scale):
    _, numbers = sample(cell, size, scale)
    step = STEPS[cell](**numbers)
    text = str(step)
    assert max(map(len, text.splitlines())) <= 100
    found = list(equations(text))
    units = min(size[1], 8)
    sums = len(step.gates) + (cell == "gru")
    states = {"lstm": 2, "gru": 1, "elman": 0}[cell]
    assert len(found) == units * (sums + len(step.gates) + states)
    for _, expression, value in found:
        if scale == 1:  # factors are rounded to six digits
            assert evaluate(expression) == pytest.approx(value, rel=1e-4, abs=1e-4)
    last = {f"{name}'[{unit}]" for name in step.new_states for unit in range(units)}
    shown = {name: value for name, _, value in found if name in last}
    for name, value in shown.items():
        assert value == pytest.approx(step.new_states[name[0]][int(name[3:-1])].item(), abs=1e-6)
    assert ("more units" in text) == (size[1] > 8)
    assert ("more products" in text) == (max(size) > 8)


def test_the_example_of_the_lstm_by_hand(capsys):
    assert main(["explain", "lstm"]) == 0
    output = capsys.readouterr().out
    assert "the row of each gate is repeated for both units" in output
    assert "weights of 8 rows, 2 for each of the gates i, f, g, o" in output
    found = {name: (expression, value) for name, expression, value in equations(output)}
    for unit in range(2):
        assert found[f"a_i[{unit}]"] == (
            "0.1*0.5 + 0.2*(-0.2) + 0.3*0.1 + 0.01 + 0.1*0.3 + 0.2*(-0.4) + 0.05",
            0.05,
        )
    assert [found[f"a_{gate}[0]"][1] for gate in "ifgo"] == [0.05, 0.17, 0.29, 0.41]
    c = [sigmoid(0.17) * c + sigmoid(0.05) * math.tanh(0.29) for c in (0.8, -0.6)]
    for unit, value in enumerate(c):
        assert found[f"c'[{unit}]"][1] == pytest.approx(value, abs=6e-7)
        h = sigmoid(0.41) * math.tanh(value)
        assert found[f"h'[{unit}]"][1] == pytest.approx(h, abs=6e-7)
    differ = re.search(r"rnnfast.LSTMCell, in float64; .* by at most (\S+)$", output, re.M)
    assert float(differ.group(1)) < 1e-15


@cells
def test_examples_have_rows_for_every_unit(cell, capsys):
    step = example_step(cell)
    assert (step.input_size, step.hidden_size) == (3, 2)
    blocks = step.weight_ih.unflatten(0, (len(step.gates), 2))
    assert torch.equal(blocks[:, 0], blocks[:, 1]) == (cell != "elman")
    assert main(["explain", cell]) == 0
    output = capsys.readouterr().out
    assert str(step) in output
    assert ("repeated for both units" in output) == (cell != "elman")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (
            "weight_ih",
            FOUR_ROWS["weight_ih"],
            r"\(4\*hidden_size, input_size\) = \(8, 3\), got \(4, 3\)",
        ),
        (
            "weight_hh",
            FOUR_ROWS["weight_hh"],
            r"\(4\*hidden_size, hidden_size\) = \(8, 2\), got \(4, 2\)",
        ),
        ("weight_hh", [[0.1] * 3] * 8, r"= \(8, 2\), got \(8, 3\)"),
        ("bias_ih", FOUR_ROWS["bias_ih"], r"\(4\*hidden_size,\) = \(8,\), got \(4,\)"),
        ("bias_hh", FOUR_ROWS["bias_hh"], r"\(4\*hidden_size,\) = \(8,\), got \(4,\)"),
        ("h", [0.1] * 3, r"\(hidden_size,\) = \(2,\), got \(3,\)"),
        ("c", [0.1] * 3, r"\(hidden_size,\) = \(2,\), got \(3,\)"),
        ("x", [0.1] * 4, r"\(input_size,\) = \(3,\), got \(4,\); weight_ih is \(8, 3\)"),
        ("x", 0.5, r"expected a list of numbers, got shape \(\)"),
        ("x", [], r"expected a list of numbers, got shape \(0,\)"),
        ("x", [[0.5]], r"expected a list of numbers, got shape \(1, 1\)"),
        ("weight_ih", [0.1] * 3, r"expected a matrix, a list of rows, got shape \(3,\)"),
        ("weight_hh", [[0.1, 0.2], [0.3]], "differ in length or depth"),
        ("x", [0.5, "0.2", 0.1], r"expected numbers, got str '0\.2'"),
        ("weight_hh", [[1, 2]] * 7 + [[1, None]], "expected numbers, got NoneType None"),
        ("c", [10**400, 1], "expected numbers, got too large ones"),
        ("x", torch.zeros(3, dtype=torch.bool), r"expected numbers, got torch\.bool"),
        ("x", torch.zeros(3, dtype=torch.complex64), r"expected numbers, got torch\.complex64"),
        ("h", "zero", "expected numbers, got str 'zero'"),
        ("h", None, "expected numbers, got NoneType"),
        ("h", [True, False], "expected numbers, got bool True"),
        ("c", {"a": 1}, "expected numbers, got dict"),
        ("bias_ih", [1j] * 8, "expected numbers, got complex"),
        ("c", [0.1, math.nan], "finite numbers"),
        ("c", [0.1, math.inf], "finite numbers"),
    ],
)
def test_wrong_arguments_are_named(name, value, words):
    with pytest.raises(ValueError, match=rf"^{name}: .*{words}"):
        explain.lstm_step(**{**NUMBERS, name: value})


@pytest.mark.parametrize(
    ("cell", "shape"),
    [("gru", r"\(3\*hidden_size, input_size\) = \(6, 3\)"), ("elman", r"\(2, 3\)")],
)
def test_rows_of_other_cells(cell, shape):
    numbers = {name: value for name, value in NUMBERS.items() if name != "c"}
    with pytest.raises(ValueError, match=rf"weight_ih: expected shape .*{shape}, got \(8, 3\)"):
        STEPS[cell](**numbers)


def test_four_rows_for_everything():
    with pytest.raises(
        ValueError, match=r"\(4\*hidden_size, input_size\) = \(8, 3\), got \(4, 3\)"
    ):
        explain.lstm_step(**{**NUMBERS, **FOUR_ROWS})


def test_any_kind_of_array():
    expected = explain.lstm_step(**NUMBERS).new_states
    for convert in (torch.tensor, lambda v: torch.tensor(v, dtype=torch.float64).numpy()):
        numbers = {name: convert(value) for name, value in NUMBERS.items()}
        found = explain.lstm_step(**numbers).new_states
        for name, state in found.items():
            torch.testing.assert_close(state, expected[name], rtol=1e-6, atol=1e-7)


def test_a_kernel_that_computes_something_else_is_found_out(monkeypatch, capsys):
    lstm_cell = rnnfast.functional.lstm_cell
    wrong = lambda *arguments: tuple(state + 1e-6 for state in lstm_cell(*arguments))  # noqa: E731
    monkeypatch.setattr(step_module.functional, "lstm_cell", wrong)
    with pytest.raises(ArithmeticError, match=r"h' differs from the formula's by 1\.0e-06"):
        explain.lstm_step(**NUMBERS)
    assert "differs from the formula" in refusal(["explain", "lstm"], capsys)


def refusal(arguments, capsys):
    """The error message for invalid arguments."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    assert stop.value.code == 2
    assert output.out == ""
    assert output.err.count("\n") == 1
    return output.err


@cells
def test_numbers_from_a_file(cell, tmp_path, capsys):
    _, numbers = sample(cell, (4, 3))
    path = tmp_path / "numbers.json"
    path.write_text(json.dumps({name: value.tolist() for name, value in numbers.items()}))
    plot = tmp_path / "step.png"
    assert main(["explain", cell, "--file", str(path), "--plot", str(plot)]) == 0
    output = capsys.readouterr().out
    assert output == f"{STEPS[cell](**numbers)}\n\nwrote {plot}\n"
    assert plot.read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        ("", "is not JSON"),
        ('{"x": [1', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1, 2]", "expected an object of names and numbers, got list"),
        ("3", "expected an object of names and numbers, got int"),
        ('{"x": [1]}', "'h' is missing; lstm takes x, h, c, weight_ih"),
        (json.dumps({**NUMBERS, "gain": 2}), "'gain' is unknown; lstm takes x, h, c"),
        (json.dumps({**NUMBERS, "x": "half"}), "x: expected numbers, got str 'half'"),
        (json.dumps({**NUMBERS, "h": [math.nan, 0]}), "h: expected finite numbers"),
        (json.dumps({**NUMBERS, "x": [10**400, 1, 2]}), "x: expected"),
        (
            json.dumps({**NUMBERS, **FOUR_ROWS}),
            "weight_ih: expected shape (4*hidden_size, input_size) = (8, 3), got (4, 3)",
        ),
    ],
)
def test_useless_files(tmp_path, content, words, capsys):
    path = tmp_path / "numbers.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal(["explain", "lstm", "--file", path], capsys)
    assert words in message
    assert str(path) in message


@cells
def test_the_picture_of_a_step(cell):
    _, numbers = sample(cell, (4, 3))
    step = STEPS[cell](**numbers)
    panels = explain.plot_step(step).axes
    names = [*step.states, *(f"{name}'" for name in step.new_states)]
    values = {**step.states, **{f"{name}'": state for name, state in step.new_states.items()}}
    own = {name: f"{name}'" if cell == "elman" else name for name in step.gates}
    before, gates = (
        {own[name]: vector for name, vector in found.items()}
        for found in (step.preactivations, step.gates)
    )
    drawn = [
        {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}
        for axes in panels
    ]
    assert list(drawn[2]) == names
    colours = {}
    for axes, found, expected in zip(panels, drawn, (before, gates, values), strict=True):
        assert found == {name: vector.tolist() for name, vector in expected.items()}
        written = [text.get_text() for text in axes.texts]
        assert written == [f"{v:.3g}" for vector in expected.values() for v in vector.tolist()]
        for bars in axes.containers:
            (colour,) = {bar.get_facecolor() for bar in bars}
            assert colours.setdefault(bars.get_label(), colour) == colour
    assert len(set(colours.values())) == len(colours) == len({*gates, *values})


@pytest.mark.parametrize(("units", "written", "upright"), [(12, True, True), (200, False, False)])
def test_values_stand_at_bars_where_there_is_room(units, written, upright):
    _, numbers = sample("lstm", (2, units))
    figure = explain.plot_step(explain.lstm_step(**numbers))
    texts = [text for axes in figure.axes for text in axes.texts]
    assert len(texts) == (12 * units if written else 0)
    assert all((text.get_rotation() == 90) == upright for text in texts)
    assert max(figure.get_size_inches()) <= 24


def by_hand(layer, x, loss):
    """Norms by state in plain PyTorch, with a graph in which h is computed from c."""
    w_ih, w_hh, b_ih, b_hh = (value.detach() for value in layer.parameters())
    h = torch.zeros(layer.hidden_size, dtype=x.dtype, requires_grad=True)
    c = torch.zeros_like(h)
    states = {"h": [], "c": []}
    for step in x:
        from_x, from_h = w_ih @ step + b_ih, w_hh @ h + b_hh
        if isinstance(layer, rnnfast.LSTM):
            i, f, g, o = (from_x + from_h).chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            states["c"].append(c)
        elif isinstance(layer, rnnfast.GRU):
            (x_r, x_z, x_n), (h_r, h_z, h_n) = from_x.chunk(3), from_h.chunk(3)
            z = (x_z + h_z).sigmoid()
            h = (1 - z) * (x_n + (x_r + h_r).sigmoid() * h_n).tanh() + z * h
        else:
            h = (from_x + from_h).tanh()
        states["h"].append(h)
    for state in states["h"] + states["c"]:
        state.retain_grad()
    loss(h).backward()
    return {
        name: torch.stack([state.grad.norm() for state in reversed(found)])
        for name, found in states.items()
        if found
    }


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("length", [1, 2, 60])
@pytest.mark.parametrize("backend", [None, "reference", "aten"])
@pytest.mark.parametrize("grad", [True, False])
def test_gradients_are_the_total_derivatives(kind, length, backend, grad):
    torch.manual_seed(2)
    layer = LAYERS[kind](3, 5, dtype=torch.float64, backend=backend)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.mul_(2)
    x = torch.randn(length, 3, dtype=torch.float64)
    target = torch.randn(5, dtype=torch.float64)

    def loss(h):
        return (h - target).square().sum()

    with torch.set_grad_enabled(grad):
        found = explain.gradient_norms(layer, x, loss)
    expected = by_hand(layer, x, loss)
    assert found.keys() == expected.keys() == ({"h", "c"} if kind == "LSTM" else {"h"})
    for name, norms in found.items():
        assert norms.shape == (length,)
        torch.testing.assert_close(norms, expected[name], rtol=1e-9, atol=0)
    assert all(weight.grad is None for weight in layer.parameters())
    assert not layer._forward_hooks


def test_a_loss_that_ignores_the_state_has_no_gradient():
    x = torch.randn(4, 3)
    found = explain.gradient_norms(rnnfast.LSTM(3, 5), x, lambda h: h[:0].sum())
    assert all(torch.equal(norms, torch.zeros(4)) for norms in found.values())


@pytest.mark.parametrize(
    "options", [{"num_layers": 2}, {"bidirectional": True}, {"proj_size": 2}], ids=str
)
def test_gradients_need_a_single_layer(options):
    with pytest.raises(ValueError, match="needs a single layer in one direction"):
        explain.gradient_norms(rnnfast.LSTM(3, 4, **options), torch.zeros(2, 3), torch.sum)


@pytest.mark.parametrize("shape", [(4,), (4, 2), (0, 3), (4, 1, 3)])
def test_gradients_need_a_sequence(shape):
    with pytest.raises(ValueError, match=r"\(T, input_size = 3\), got \("):
        explain.gradient_norms(rnnfast.LSTM(3, 4), torch.zeros(shape), torch.sum)


def test_gradients_vanish_fastest_in_the_elman_layer():
    before = torch.get_rng_state()
    norms = explain.compare_gradients(80)
    assert torch.equal(torch.get_rng_state(), before)
    assert list(norms) == ["Elman h", "GRU h", "LSTM h", "LSTM c"]
    for name in ("Elman h", "GRU h", "LSTM h"):
        assert norms[name][0].item() == pytest.approx(1, abs=1e-12)
    assert norms["Elman h"][79] < 1e-18
    assert norms["Elman h"][79] < norms["GRU h"][79] < norms["LSTM c"][79]
    again = explain.compare_gradients(80)
    assert all(torch.equal(norms[name], again[name]) for name in norms)
    other = explain.compare_gradients(80, seed=1)
    assert not any(torch.equal(norms[name][1:], other[name][1:]) for name in norms)


def test_an_open_forget_gate_carries_the_error():
    """With f near 1, the gradient changes by a factor near 1 per step, as in the LSTM of 1997."""
    closed, opened = (explain.compare_gradients(80, forget_bias=b)["LSTM c"] for b in (-2, 8))
    assert closed[79] / closed[0] < 1e-30
    assert 0.1 < opened[79] / opened[0] < 100


def test_larger_weights_fade_less():
    small, large = (explain.compare_gradients(40, scale=s)["Elman h"] for s in (0.5, 2))
    assert small[39] < 1e-18 < large[39]


@pytest.mark.parametrize("size", ["length", "input_size", "hidden_size"])
def test_sizes_are_positive(size):
    with pytest.raises(ValueError, match=f"sizes should be positive, got .*{size} 0"):
        explain.compare_gradients(**{size: 0})


@pytest.mark.parametrize("length", [1, 2, 40])
def test_the_command_shows_gradients(length, tmp_path, capsys):
    plot = tmp_path / "gradients.png"
    options = ["--length", str(length), "--hidden", "6", "--input", "2", "--seed", "3"]
    options += ["--scale", "1.5", "--forget-bias", "2", "--plot", str(plot)]
    assert main(["explain", "gradients", *options]) == 0
    output = capsys.readouterr().out
    assert plot.read_bytes().startswith(PNG)
    assert "Untrained layers of 6 units" in output
    assert max(map(len, output.replace(str(plot), "").splitlines())) <= 100
    norms = explain.compare_gradients(
        length, input_size=2, hidden_size=6, seed=3, scale=1.5, forget_bias=2
    )
    rows = [line.split() for line in output.splitlines() if re.match(r"\d+ ", line)]
    shown = {1: [0], 2: [0, 1], 40: [0, 1, 2, 5, 10, 20, 39]}[length]
    assert [int(row[0]) for row in rows] == shown
    for step, *values in rows:
        expected = [f"{norm[int(step)]:.2e}" for norm in norms.values()]
        assert values == expected
    assert ("factor per step" in output) == (length > 1)
    curves = explain.plot_gradients(norms).axes[0]
    assert curves.get_yscale() == "log"
    for line, norm in zip(curves.get_lines(), norms.values(), strict=True):
        assert list(line.get_ydata()) == norm.tolist()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lstm", "--plot", "step.nonsense"], "not supported"),
        (["lstm", "--plot", "nowhere/step.png"], "error: nowhere/step.png: No such file"),
        (["lstm", "--plot", ""], "argument --plot: expected the name of a file"),
        (["gates", "--text", "a", "--plot", "a.png", "--model", ""], "argument --model: expected"),
        (["gru", "--file", ""], "argument --file: expected the name of a file"),
        (["gru", "--file", "."], "error: .: Is a directory"),
        (["gradients", "--length", "0"], "1 or more"),
        (["gradients", "--scale", "0"], "above zero"),
        (["gradients", "--forget-bias", "inf"], "finite"),
        (["gradients", "--seed", str(2**64)], "from 0 to"),
        (["peephole"], "invalid choice"),
        ([], "required: SUBJECT"),
    ],
)
def test_useless_arguments(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert words in refusal(["explain", *arguments], capsys)


@pytest.mark.parametrize("subject", [[], ["lstm"], ["gru"], ["elman"], ["gradients"], ["gates"]])
def test_every_subject_explains_itself(subject, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["explain", *subject, "--help"])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith(f"usage: rnnfast {' '.join(['explain', *subject])}")
    assert "None" not in output
    if subject and subject[0] in CELLS:
        assert '"weight_ih": [[...], ...]' in output
        assert ('"c": [...]' in output) == (subject == ["lstm"])


def test_nothing_is_imported_before_it_is_needed():
    program = (
        "import sys, rnnfast.explain\n"
        "from rnnfast.cli import main\n"
        "main(['explain', 'lstm'])\n"
        "assert not {'matplotlib', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
