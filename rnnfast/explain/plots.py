"""Plots of steps, gradients and gates (needs the extra cli, for matplotlib)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from rnnfast.explain.fonts import drawable
from rnnfast.explain.gradients import Norms
from rnnfast.explain.record import GateRecord
from rnnfast.explain.step import Step

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import BarContainer
    from matplotlib.figure import Figure

_SIGMOIDS = frozenset({"input", "forget", "output", "reset", "update"})
_STATES = {"cell_state": "cell state", "hidden": "hidden state"}
_WHITE_SPACE = {" ": "␣", "\n": "↵", "\t": "⇥"}
_CELLS = {"elman": "an Elman cell", "gru": "a GRU", "lstm": "an LSTM"}
# Each gate, and each state before and after the step, has a colour. The Elman cell's only gate is
# its new state, so they share one.
_COLOURS = {
    **dict(zip("ifgo", ("C0", "C1", "C2", "C3"), strict=True)),
    **dict(zip("rzn", ("C0", "C1", "C2"), strict=True)),
    **{"h": "#c5b0d5", "h'": "C4", "c": "#c49c94", "c'": "C5"},
}
_SMALL = 7  # font size in points
_DIGIT, _LINE = 0.065, 0.1
"""The width of a digit and the height of a line in this font size, in inches."""
_CELL, _LOW_CELL = 0.2, 0.14
"""The side of a square of a heat map, and its height if there are several rows, in inches."""
_PER_ROW, _ROWS = 64, 12
"""The number of characters in a row of a heat map, and the maximum number of rows."""
_TALLEST = 30  # inches


def plot_step(step: Step) -> Figure:
    """Plot bars for each hidden unit: pre-activations, gates, states before and after the step.

    The bars are labelled with their values if there is room.
    """
    from matplotlib.figure import Figure

    after = {f"{name}'": state for name, state in step.new_states.items()}
    gates, before = step.gates, step.preactivations
    if step.cell == "elman":
        gates, before = ({f"{k}'": v for k, v in values.items()} for values in (gates, before))
    panels = {
        "pre-activations": before,
        "gates" if step.cell != "elman" else "new state": gates,
        "states before and after (') the step": {**step.states, **after},
    }
    most = max(len(values) for values in panels.values())
    width = min(4 + step.hidden_size * most * 0.6, 24)  # inches
    figure = Figure(figsize=(width, 8), layout="constrained")
    figure.suptitle(f"One step of {_CELLS[step.cell]}", fontsize="x-large")
    for axes, (title, values) in zip(
        figure.subplots(len(panels), sharex=True), panels.items(), strict=True
    ):
        bar = 0.8 / len(values)  # width of a bar, as a fraction of the width of a unit
        series: list[tuple[BarContainer, list[str]]] = []
        for number, (name, vector) in enumerate(values.items()):
            places = [unit + (number - (len(values) - 1) / 2) * bar for unit in range(len(vector))]
            heights = vector.tolist()
            bars = axes.bar(places, heights, bar, label=name, color=_COLOURS[name])
            series.append((bars, [f"{height:.3g}" for height in heights]))
        _write_values(axes, series, (width - 2) * bar / step.hidden_size)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(title)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_xlabel("hidden unit")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _write_values(
    axes: Axes, series: Iterable[tuple[BarContainer, list[str]]], room: float
) -> None:
    """Label bars that are ``room`` inches wide; the labels are vertical if the bars are narrow."""
    upright = room < _DIGIT * max(len(label) for _, labels in series for label in labels)
    axes.margins(y=0.35 if upright else 0.2)
    if room > _LINE:
        for bars, labels in series:
            axes.bar_label(bars, labels, padding=2, fontsize=_SMALL, rotation=90 * upright)


def plot_gradients(norms: Norms) -> Figure:
    """Plot the norms of `rnnfast.explain.compare_gradients` against the distance from the loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, values in norms.items():
        layer, state = name.split()
        style = "--" if state == "c" else "-"
        label = rf"{layer}, $\partial$loss / $\partial {state}$"
        axes.plot(range(len(values)), values.tolist(), style, label=label)
    axes.set(
        title="gradients of untrained layers",
        xlabel="steps between state and loss",
        ylabel="norm of the gradient",
        yscale="log",
    )
    axes.legend()
    return figure


def plot_gates(
    activations: GateRecord | Mapping[str, Tensor],
    *,
    text: str,
    gate: str,
    units: Sequence[int] | int | None = None,
) -> Figure:
    """Plot a heat map of a gate: hidden units over the characters of a text.

    A long text is broken into rows. The colours span the range of the gate: 0 to 1 for a sigmoid,
    -1 to 1 for a tanh. For a cell state, and for the hidden state of a relu layer, they span the
    values. The fonts are chosen for the text; a warning names the fonts to install if there are
    none.

    Args:
        activations: ``record[key]`` of `record_gates` for a single sequence: (T, H), (T, 1, H) or
            (1, T, H). The record itself is accepted if it has only one layer and direction.
        text: The text that the layer read, with one character for each step.
        gate: The name of the gate, such as "forget".
        units: A list of hidden units to show, in this order; or a number of units, of which those
            that vary most over the text are shown; None shows all units.

    Raises:
        ValueError: The record has several layers, there is no such gate or unit, there are several
            sequences, or the text has another length.
    """
    from matplotlib.figure import Figure

    values = _single_sequence(activations, gate)
    steps = len(values)
    if len(text) != steps:
        raise ValueError(f"the text has {len(text)} characters, but there are {steps} steps")
    shown, choice = _choose_units(values, units)
    if len(shown) == 0 or steps == 0:
        raise ValueError("expected at least one unit and one character")

    values = values[:, shown].T
    count = min(math.ceil(steps / _PER_ROW), _ROWS)
    per_row = math.ceil(steps / count)
    cell = min(_CELL if count == 1 else _LOW_CELL, (_TALLEST / count - 1) / len(shown))
    width = 2.5 + _CELL * max(min(per_row, _PER_ROW), 15)
    height = max(0.6 + count * (0.6 + cell * len(shown)), 3)
    figure = Figure(figsize=(width, height), layout="constrained")
    sigmoid = gate in _SIGMOIDS
    limit = 1.0 if sigmoid else max(1.0, values.abs().max().item())
    characters, families = drawable([_WHITE_SPACE.get(char, char) for char in text], "monospace")
    labelled = range(0, len(shown), math.ceil(_LOW_CELL / cell))
    rows = figure.subplots(count, squeeze=False).flatten().tolist()
    for axes, start in zip(rows, range(0, steps, per_row), strict=True):
        end = min(start + per_row, steps)
        image = axes.imshow(
            values[:, start:end].numpy(),
            aspect="auto",
            interpolation="nearest",
            cmap="viridis" if sigmoid else "RdBu_r",
            vmin=0 if sigmoid else -limit,
            vmax=limit,
            extent=(start - 0.5, end - 0.5, len(shown) - 0.5, -0.5),
        )
        axes.set_xlim(start - 0.5, start + per_row - 0.5)
        if per_row <= _PER_ROW:
            axes.set_xticks(
                range(start, end), characters[start:end], family=families, parse_math=False
            )
        axes.set_yticks(labelled, [str(shown[row]) for row in labelled])
    figure.supylabel("hidden unit", fontsize="medium")
    axes.set_xlabel("character read" if per_row <= _PER_ROW else "number of the character read")
    figure.suptitle(f"{_STATES.get(gate, f'{gate} gate')}, {choice}")
    label = "activation, 0 shut to 1 open" if sigmoid else "activation"
    figure.colorbar(image, ax=rows, label=label, fraction=0.5 / width, aspect=height / 0.25)
    return figure


def _single_sequence(activations: GateRecord | Mapping[str, Tensor], gate: str) -> Tensor:
    """The activations (T, H) of a gate."""
    if isinstance(activations, GateRecord):
        if len(activations) != 1:
            keys = ", ".join(activations) or "none"
            raise ValueError(f"expected the record of one layer, or record[key]; it has: {keys}")
        (activations,) = activations.values()
    if gate not in activations:
        raise ValueError(f"no gate {gate!r}; there are {', '.join(activations)}")
    values = activations[gate].detach().float().cpu()
    if values.dim() == 3 and 1 in values.shape[:2]:
        values = values.flatten(0, 1)
    if values.dim() != 2:
        shape = tuple(values.shape)
        raise ValueError(f"expected activations of a single sequence, got shape {shape}")
    return values


def _choose_units(values: Tensor, units: Sequence[int] | int | None) -> tuple[list[int], str]:
    """The units of activations (T, H) to show, and a description of the choice."""
    hidden = values.shape[1]
    if units is None or (isinstance(units, int) and units >= hidden):
        return list(range(hidden)), f"all {hidden} units"
    if isinstance(units, int):
        most = values.var(dim=0, correction=0).topk(max(units, 0)).indices
        return sorted(most.tolist()), f"the {units} of {hidden} units that vary most"
    for unit in units:
        if not 0 <= unit < hidden:
            raise ValueError(f"units should be between 0 and {hidden - 1}, got {unit}")
    return list(units), f"{len(units)} of {hidden} units"
