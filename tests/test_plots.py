"""Plots: their labels, their sizes, and the fonts for a text."""

import warnings

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.colors import to_rgba

from rnnfast.cli import loss_plot
from rnnfast.explain import fonts, plot_gates

TEXT = "The quick brown fox.\n" * 100


def activations(steps, units):
    torch.manual_seed(0)
    return {name: torch.rand(steps, units) for name in ("forget", "cell", "cell_state", "hidden")}


@pytest.mark.parametrize(
    ("gate", "units", "title", "label"),
    [
        ("forget", None, "forget gate, all 30 units", "activation, 0 shut to 1 open"),
        ("cell", 40, "cell gate, all 30 units", "activation"),
        ("cell_state", 24, "cell state, the 24 of 30 units that vary most", "activation"),
        ("hidden", [3, 1], "hidden state, 2 of 30 units", "activation"),
    ],
)
def test_what_is_written_on_a_heat_map(gate, units, title, label):
    figure = plot_gates(activations(8, 30), text=TEXT[:8], gate=gate, units=units)
    assert figure.get_suptitle() == title
    axes, colours = figure.axes
    assert axes.get_xlabel() == "character read"
    assert figure.get_supylabel() == "hidden unit"
    assert colours.get_ylabel() == label


def test_the_units_that_vary_most():
    values = torch.zeros(6, 5)
    values[::2] = torch.tensor([0.1, 0.5, 0.0, 0.9, 0.2])
    axes = plot_gates({"forget": values}, text="abcdef", gate="forget", units=3).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "3", "4"]
    with pytest.raises(ValueError, match="at least one unit"):
        plot_gates({"forget": values}, text="abcdef", gate="forget", units=0)


@pytest.mark.parametrize("units", [4, 300])
@pytest.mark.parametrize(("steps", "rows"), [(1, 1), (64, 1), (65, 2), (300, 5), (2000, 12)])
def test_a_long_text_is_broken_into_rows(steps, rows, units):
    values = activations(steps, units)
    figure = plot_gates(values, text=TEXT[:steps], gate="forget")
    panels = figure.axes[:-1]
    assert len(panels) == rows
    found = np.concatenate([axes.get_images()[0].get_array().data for axes in panels], axis=1)
    assert torch.equal(torch.tensor(found), values["forget"].T)
    written = [label.get_text() for axes in panels for label in axes.get_xticklabels()]
    if steps <= 64 * 12:
        assert "".join(written) == TEXT[:steps].replace(" ", "␣").replace("\n", "↵")
    else:
        assert panels[0].get_xlabel() == ""
        assert panels[-1].get_xlabel() == "number of the character read"
    width, height = figure.get_size_inches()
    assert width <= 16
    assert height <= 32


def make_font(path, characters):
    """Makes a font that draws these characters as squares."""
    names = {char: f"u{ord(char):X}" for char in characters}
    glyphs = [".notdef", *names.values()]
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 700), (700, 700), (700, 0)):
        pen.lineTo(corner)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(glyphs)
    builder.setupCharacterMap({ord(char): name for char, name in names.items()})
    builder.setupGlyf(dict.fromkeys(glyphs, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (800, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    builder.setupPost()
    builder.save(path)


@pytest.fixture
def installed(monkeypatch):
    """The paths of the installed fonts, initially only those that come with matplotlib."""
    paths = []
    own = [f for f in font_manager.fontManager.ttflist if "mpl-data" in f.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: paths)
    return paths


def test_a_font_is_chosen_by_the_text(installed, tmp_path):
    make_font(tmp_path / "squares.ttf", "中文字")
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    installed += [str(tmp_path / "broken.ttf"), str(tmp_path / "squares.ttf")]
    assert fonts.drawable("a中文 b", "monospace") == (list("a中文 b"), ["monospace", "Squares"])
    assert fonts.drawable("abc", "monospace") == (["a", "b", "c"], ["monospace"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plot_gates(activations(4, 2), text="中文字$", gate="forget")
        figure.canvas.draw()
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == list("中文字$")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a中b", r"no installed font has '中' \(U\+4E2D\); install fonts-noto-cjk, or their like"),
        ("かな한", "install fonts-noto-cjk,"),
        ("अ中", "install fonts-noto-cjk and fonts-noto-core"),
        ("\U0001f9ec", "install fonts-symbola"),
        ("中文字典", r"'中' \(U\+4E2D\), '典' \(U\+5178\), '字' \(U\+5B57\) and others; install"),
    ],
)
@pytest.mark.usefixtures("installed")
def test_a_missing_font_is_named(text, words):
    with pytest.warns(UserWarning, match=words) as caught:
        figure = plot_gates(activations(len(text), 2), text=text, gate="forget")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.canvas.draw()  # must not raise matplotlib's warnings about missing characters
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert "�" in [tick.get_text() for tick in figure.axes[0].get_xticklabels()]


@pytest.mark.filterwarnings("error")
def test_control_characters_need_no_font():
    figure = plot_gates(activations(3, 2), text="\x07a\r", gate="forget")
    figure.canvas.draw()
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["�", "a", "�"]


def losses(steps):
    """The log of a long training: a fast fall from 6.7, then noise around 1.7."""
    chance = np.random.default_rng(0)
    places = np.arange(1, steps + 1)
    training = 1.7 + 5 * np.exp(-places / 100) + 0.05 * chance.standard_normal(steps)
    validation = np.where(places % (steps // 4 or 1) == 0, training + 0.1, np.nan)
    return {
        "characters": places * 2048.0,
        "bits_per_char": training,
        "validation_bits_per_char": validation,
    }


def drawn(monkeypatch, log, path, bigram=3.3):
    kept = []
    figure_class = loss_plot.Figure
    monkeypatch.setattr(
        loss_plot, "Figure", lambda **options: kept.append(figure_class(**options)) or kept[0]
    )
    loss_plot.plot_loss(log, bigram, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    (axes,) = kept[0].axes
    return axes


def test_the_picture_of_losses(monkeypatch, tmp_path):
    log = losses(2000)
    axes = drawn(monkeypatch, log, tmp_path / "loss.png")
    assert axes.get_title() == "Losses of the training"
    axes.figure.canvas.draw()
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert {"0", "1M", "2M", "3M"} <= set(ticks)
    raw, smoothed, held_out, bigram = axes.get_lines()
    assert np.array_equal(raw.get_ydata(), log["bits_per_char"])
    steps = np.abs(np.diff(smoothed.get_ydata()[1000:]))
    assert steps.max() < 0.2 * np.abs(np.diff(raw.get_ydata()[1000:])).max()
    assert len(held_out.get_ydata()) == 4
    assert bigram.get_ydata() == [3.3, 3.3]
    assert len({to_rgba(line.get_color()) for line in (smoothed, held_out, bigram)}) == 3
    low, high = axes.get_ylim()
    assert (
        1.3 < low < log["bits_per_char"].min()
    )  # the axis covers the losses and does not start at 0
    assert 3.3 < high < 3.7


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.filterwarnings("error")
def test_the_picture_of_few_losses(monkeypatch, tmp_path, steps):
    log = losses(steps)
    axes = drawn(monkeypatch, log, tmp_path / "loss.png")
    low, high = axes.get_ylim()
    values = [*log["bits_per_char"], 3.3]
    assert low < min(values)
    assert np.quantile(log["bits_per_char"], 0.95) < high
    assert axes.get_lines()[0].get_marker() == ("o" if steps == 1 else "None")


def test_smoothing():
    line = np.arange(10.0)
    assert loss_plot.smooth(line, 2)[:8] == pytest.approx(
        line[:8]
    )  # the average does not lag behind
    assert loss_plot.smooth(line, 2)[8:] == pytest.approx([7.5, 8.0])
    assert np.array_equal(loss_plot.smooth(line[:1], 5), [0.0])
