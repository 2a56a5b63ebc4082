"""`rnnfast explain`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rnnfast import explain
from rnnfast.explain.examples import example_step, repeats_rows
from rnnfast.explain.gradients import Norms
from rnnfast.explain.step import load_step
from rnnfast.explain.table import format_columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_UNITS = 24


def run(options: argparse.Namespace) -> None:
    """Print the explanation, and save a plot if --plot is given."""
    subjects = {"gradients": _explain_gradients, "gates": _explain_gates}
    print(subjects.get(options.subject, _explain_step)(options))
    if options.plot is not None:
        print(f"\nwrote {options.plot}")


def _explain_step(options: argparse.Namespace) -> str:
    cell = options.subject
    step = example_step(cell) if options.file is None else load_step(cell, options.file)
    if options.plot is not None:
        _save(explain.plot_step(step), options.plot)
    if options.file is None and repeats_rows(cell):
        return f"{step}\nIn this example the row of each gate is repeated for both units."
    return str(step)


def _explain_gradients(options: argparse.Namespace) -> str:
    norms = explain.compare_gradients(
        options.length,
        input_size=options.input,
        hidden_size=options.hidden,
        seed=options.seed,
        scale=options.scale,
        forget_bias=options.forget_bias,
    )
    if options.plot is not None:
        _save(explain.plot_gradients(norms), options.plot)
    return (
        "Norm of d loss / d state, by the number of steps between state and loss. The loss is the\n"
        "product of the last h with a random vector of norm 1.\n"
        f"Untrained layers of {options.hidden} units, torch's initial weights times "
        f"{options.scale:g}, forget bias {options.forget_bias:g}.\n\n"
        f"{_norms_table(norms)}"
    )


def _norms_table(norms: Norms) -> str:
    """A table of some of the norms, and of the factor by which they change per step."""
    last = len(next(iter(norms.values()))) - 1
    steps = [0] + [m * 10**e for e in range(len(str(last))) for m in (1, 2, 5) if m * 10**e < last]
    rows = [["steps", *norms]]
    rows += [
        [str(step), *(f"{values[step]:.2e}" for values in norms.values())]
        for step in (*steps, *[last] * (last > 0))
    ]
    if last > 0:
        factors = ((values[-1] / values[0]) ** (1 / last) for values in norms.values())
        rows.append(["factor per step", *(f"{factor:.3f}" for factor in factors)])
    return format_columns(rows)


def _explain_gates(options: argparse.Namespace) -> str:
    from rnnfast.models import checkpoint  # needs safetensors, unlike the other subjects

    model = checkpoint.load(options.model).eval()
    if model.vocabulary is None:
        raise ValueError(f"{options.model} has no vocabulary, so it cannot read a text")
    if options.layer >= model.config.num_layers:
        highest = model.config.num_layers - 1
        raise ValueError(f"--layer should be between 0 and {highest}, got {options.layer}")
    tokens = model.vocabulary.encode(options.text)
    with torch.no_grad(), explain.record_gates(model) as record:
        model(tokens.unsqueeze(0))
    activations = record[f"lstm.l{options.layer}"]
    units = _UNITS if options.units is None else options.units
    figure = explain.plot_gates(activations, text=options.text, gate=options.gate, units=units)
    _save(figure, options.plot)
    rows = [["", "mean", "least", "most"]]
    rows += [
        [name.replace("_", " "), *(f"{v:.3f}" for v in (gate.mean(), gate.min(), gate.max()))]
        for name, gate in activations.items()
    ]
    lines = [f"Layer {options.layer}, all units and characters", "", format_columns(rows)]
    hidden = activations[options.gate].shape[-1]
    if options.units is None and hidden > _UNITS:
        words = f"The picture shows the {_UNITS} of {hidden} units that vary most over this text"
        lines += ["", f"{words}; --units chooses others."]
    return "\n".join(lines)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
