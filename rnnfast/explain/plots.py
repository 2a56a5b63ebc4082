"""Pictures of steps, gradients and gates (needs `rnnfast[cli]`, for matplotlib)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from rnnfast.explain.gradients import Norms
from rnnfast.explain.record import GateRecord
from rnnfast.explain.step import Step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIGMOIDS = frozenset({"input", "forget", "output", "reset", "update"})
_WHITE_SPACE = {" ": "␣", "\n": "↵", "\t": "⇥"}


def plot_step(step: Step) -> Figure:
    """Bars for each hidden unit: pre-activations, gates, and states before and after the step."""
    from matplotlib.figure import Figure

    states = {**step.states, **{f"{name}'": state for name, state in step.new_states.items()}}
    panels = {"pre-activations": step.preactivations, "gates": step.gates, "states": states}
    width = min(4 + step.hidden_size * len(states) / 2, 24)  # inches
    figure = Figure(figsize=(width, 8), layout="constrained")
    for axes, (title, values) in zip(
        figure.subplots(len(panels), sharex=True), panels.items(), strict=True
    ):
        bar = 0.8 / len(values)  # of the room for a unit
        for number, (name, vector) in enumerate(values.items()):
            places = [unit + (number - (len(values) - 1) / 2) * bar for unit in range(len(vector))]
            axes.bar(places, vector.tolist(), bar, label=name)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(title)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_xlabel("hidden unit")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def plot_gradients(norms: Norms) -> Figure:
    """The norms of `rnnfast.explain.compare_gradients` against the distance from the loss."""
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
    units: Sequence[int] | None = None,
) -> Figure:
    """A heat map of a gate: hidden units over the characters of a text.

    The colours span the gate's range: from 0 to 1, or from -1 to 1 for what ends in tanh, and as
    far as needed for a cell state and for a hidden state of relu.

    Args:
        activations: ``record[key]`` of `record_gates`, of a single sequence: (T, H), (T, 1, H) or
            (1, T, H). The record itself will do if one layer in one direction was recorded.
        text: What the layer read, a character for each step.
        gate: The name of the gate, such as "forget".
        units: The hidden units to show, in this order; None is all.

    Raises:
        ValueError: Several layers were recorded, there is no such gate or unit, there are several
            sequences, or the text is not as long as they are.
    """
    from matplotlib.figure import Figure

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
    steps, hidden = values.shape
    if len(text) != steps:
        raise ValueError(f"the text has {len(text)} characters, but there are {steps} steps")
    units = range(hidden) if units is None else units
    for unit in units:
        if not 0 <= unit < hidden:
            raise ValueError(f"units should be between 0 and {hidden - 1}, got {unit}")
    if len(units) == 0 or steps == 0:
        raise ValueError("expected at least one unit and one character")

    values = values[:, list(units)].T
    sigmoid = gate in _SIGMOIDS
    limit = 1.0 if sigmoid else max(1.0, values.abs().max().item())
    size = (min(2 + 0.2 * steps, 40), min(1.5 + 0.2 * len(units), 40))  # inches
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        values.numpy(),
        aspect="auto",
        interpolation="nearest",
        cmap="viridis" if sigmoid else "RdBu_r",
        vmin=0 if sigmoid else -limit,
        vmax=limit,
    )
    characters = [_WHITE_SPACE.get(character, character) for character in text]
    axes.set_xticks(range(steps), characters, family="monospace", parse_math=False)
    axes.set_yticks(range(len(units)), [str(unit) for unit in units])
    axes.set(xlabel="character read", ylabel="hidden unit", title=gate.replace("_", " "))
    figure.colorbar(image)
    return figure
