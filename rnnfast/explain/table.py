"""Formats steps as text with every term written out, and tables of numbers."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from rnnfast.explain.step import Step

WIDTH = 100
_UNITS, _TERMS = 8, 8
"""The maximum number of units, and of products in a sum, that are written out."""
_NO_BREAK = "\N{NO-BREAK SPACE}"
_TITLES = {"elman": "Elman step", "gru": "GRU step", "lstm": "LSTM step"}
_MODULES = {"elman": "RNNCell", "gru": "GRUCell", "lstm": "LSTMCell"}


class _Equation(NamedTuple):
    """``name`` = ``terms`` joined by plus signs = ``value``."""

    name: str
    terms: Sequence[str]
    value: float


def format_step(step: Step) -> str:
    """Write out a step in at most 100 columns; only the first units and terms if there are many."""
    count = len(step.gates)
    sizes = f"input size {step.input_size}, hidden size {step.hidden_size}"
    rows = f"weights of {count * step.hidden_size} rows"
    if count > 1:
        rows += f", {step.hidden_size} for each of the gates {', '.join(step.gates)}"
    units = range(min(_UNITS, step.hidden_size))
    lines = [f"{_TITLES[step.cell]}: {sizes}, {rows}", ""]
    lines += [_vector(name, vector) for name, vector in {"x": step.x, **step.states}.items()]
    for title, equations in (*_gate_sections(step, units), *_state_sections(step, units)):
        lines += ["", title, *_align(equations)]
        if step.hidden_size > len(units):
            lines.append(f"  ... and {step.hidden_size - len(units)} more units")
    states = " and ".join(f"{name}'" for name in reversed(step.new_states))
    kernel = f"rnnfast.{_MODULES[step.cell]}, in float64"
    check = f"{states}: {kernel}; the formula differs by at most {step.deviation:.1e}"
    return "\n".join([*lines, "", check])


def format_columns(rows: Iterable[Sequence[str]]) -> str:
    """Format rows of cells as text; all columns but the first are right-aligned."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _gate_sections(step: Step, units: range) -> list[tuple[str, list[_Equation]]]:
    """The titles and equations that compute the gates from x and h."""
    elman, gru = step.cell == "elman", step.cell == "gru"
    sums, hidden_sums, values = [], [], []
    for gate, unit, row in _rows(step, units):
        place = f"[{unit}]"
        from_x = [*_products(step.weight_ih[row], step.x), _factor(step.bias_ih[row])]
        from_h = [*_products(step.weight_hh[row], step.states["h"]), _factor(step.bias_hh[row])]
        argument = _result(step.preactivations[gate][unit])
        if gate == "n":
            x_n, h_n = step.from_x[gate][unit], step.from_h[gate][unit]
            sums.append(_Equation(f"x_n{place}", from_x, float(x_n)))
            hidden_sums.append(_Equation(f"h_n{place}", from_h, float(h_n)))
            r = _result(step.gates["r"][unit])
            argument = f"{_result(x_n)} + {r}*{_parenthesized(_result(h_n))}"
        else:
            name = f"a{place}" if elman else f"a_{gate}{place}"
            sums.append(_Equation(name, from_x + from_h, float(step.preactivations[gate][unit])))
        call = f"{step.activation(gate)}({argument})"
        name = f"h'{place}" if elman else f"{gate}{place}"
        values.append(_Equation(name, [call], float(step.gates[gate][unit])))
    only_x = "; of n only x_n = W_ih x + b_ih" if gru else ""
    sections = [(f"Pre-activations a = W_ih x + b_ih + W_hh h + b_hh{only_x}", sums)]
    if gru:
        sections.append(("What r scales in n: h_n = W_hh h + b_hh", hidden_sums))
        title = "Gates r, z = sigmoid(a), n = tanh(x_n + r*h_n)"
    else:
        title = (
            "New hidden state h' = tanh(a)" if elman else "Gates i, f, o = sigmoid(a), g = tanh(a)"
        )
    return [*sections, (title, values)]


def _state_sections(step: Step, units: range) -> list[tuple[str, list[_Equation]]]:
    """The titles and equations that compute the new states from the gates."""
    if step.cell == "elman":  # its only gate is its new state
        return []
    value = {name: [_result(number) for number in gate] for name, gate in step.gates.items()}
    h = step.new_states["h"]
    if step.cell == "gru":
        equations = [
            _Equation(
                f"h'[{k}]",
                [
                    f"(1 - {value['z'][k]})*{_parenthesized(value['n'][k])}",
                    f"{value['z'][k]}*{_factor(step.states['h'][k])}",
                ],
                float(h[k]),
            )
            for k in units
        ]
        return [("New hidden state h' = (1 - z)*n + z*h", equations)]
    c = step.new_states["c"]
    cells = [
        _Equation(
            f"c'[{k}]",
            [
                f"{value['f'][k]}*{_factor(step.states['c'][k])}",
                f"{value['i'][k]}*{_parenthesized(value['g'][k])}",
            ],
            float(c[k]),
        )
        for k in units
    ]
    hiddens = [
        _Equation(f"h'[{k}]", [f"{value['o'][k]}*tanh({_result(c[k])})"], float(h[k]))
        for k in units
    ]
    return [("New cell state c' = f*c + i*g", cells), ("New hidden state h' = o*tanh(c')", hiddens)]


def _rows(step: Step, units: range) -> Iterable[tuple[str, int, int]]:
    """Each gate and unit, with the unit's row in the weights."""
    for block, gate in enumerate(step.gates):
        for unit in units:
            yield gate, unit, block * step.hidden_size + unit


def _products(weights: Tensor, values: Tensor) -> list[str]:
    """The terms of a dot product; all terms after the first `_TERMS` are one number."""
    terms = [
        f"{_factor(weight)}*{_factor(value)}"
        for weight, value in zip(weights[:_TERMS], values[:_TERMS], strict=True)
    ]
    rest = len(values) - len(terms)
    if rest > 0:
        sum_of_rest = _parenthesized(_result(weights[_TERMS:] @ values[_TERMS:]))
        terms.append(f"{sum_of_rest} from {rest} more products".replace(" ", _NO_BREAK))
    return terms


def _factor(value: Tensor) -> str:
    """Format an input number, in parentheses if it is negative."""
    return _parenthesized(f"{float(value):g}")


def _result(value: Tensor | float) -> str:
    """Format a computed number."""
    value = float(value)
    return f"{value:.6f}" if abs(value) < 1e6 else f"{value:.6e}"


def _parenthesized(number: str) -> str:
    return f"({number})" if number.startswith("-") else number


def _vector(name: str, vector: Tensor) -> str:
    numbers = "  ".join(f"{value:g}" for value in vector[:_TERMS].tolist())
    rest = len(vector) - _TERMS
    text = f"{name} =  {numbers}" + (f"  ... and {rest} more" if rest > 0 else "")
    return textwrap.fill(text, WIDTH, subsequent_indent="     ", break_on_hyphens=False)


def _align(equations: Sequence[_Equation]) -> list[str]:
    """Format equations with aligned results; a long equation takes several lines."""
    heads = [
        f"  {name} = " + " ".join([terms[0], *(f"+{_NO_BREAK}{term}" for term in terms[1:])])
        for name, terms, _ in equations
    ]
    tails = [f"{_NO_BREAK}= {_result(equation.value):>9}" for equation in equations]
    room = WIDTH - max(map(len, tails)) - 1
    width = max((len(head) for head in heads if len(head) <= room), default=0)
    lines = []
    for equation, head, tail in zip(equations, heads, tails, strict=True):
        indent = " " * len(f"  {equation.name} =")
        wrapped = textwrap.wrap(
            head,
            room,
            subsequent_indent=indent + " ",
            break_on_hyphens=False,
            break_long_words=False,
        )
        wrapped[-1] = wrapped[-1].ljust(width) + tail
        lines += [line.replace(_NO_BREAK, " ") for line in wrapped]
    return lines
