"""The default numbers of `rnnfast explain`: 3 inputs and 2 hidden units."""

from __future__ import annotations

from rnnfast.explain.step import GATES, Step, explain_step

_INPUT = [0.5, -0.2, 0.1]
_STATES = {"h": [0.3, -0.4], "c": [0.8, -0.6]}
_WEIGHT_IH = [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9], [1.0, 1.1, 1.2]]
_WEIGHT_HH = [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6], [0.7, 0.8]]
_BIAS_IH = [0.01, 0.02, 0.03, 0.04]
_BIAS_HH = [0.05, 0.06, 0.07, 0.08]


def repeats_rows(cell: str) -> bool:
    """Whether both units of `example_step` have the same weights and biases in each gate."""
    return cell != "elman"


def example_step(cell: str) -> Step:
    """A step of an "elman", "gru" or "lstm" cell on the example numbers.

    Each gate of the GRU and the LSTM has one row of weights, which is repeated for both units. The
    Elman cell has no gates, and one row for each unit.
    """
    units = len(_STATES["h"])
    repeats = units if repeats_rows(cell) else 1
    rows = [row for row in range(len(GATES[cell]) * units // repeats) for _ in range(repeats)]
    return explain_step(
        cell,
        {
            "x": _INPUT,
            **(_STATES if cell == "lstm" else {"h": _STATES["h"]}),
            "weight_ih": [_WEIGHT_IH[row] for row in rows],
            "weight_hh": [_WEIGHT_HH[row] for row in rows],
            "bias_ih": [_BIAS_IH[row] for row in rows],
            "bias_hh": [_BIAS_HH[row] for row in rows],
        },
    )
