"""One step of an Elman cell, a GRU or an LSTM, with every intermediate value.

Sizes: I input, H hidden, G gates of the cell. Weights have torch.nn's layout: the H rows of the
first gate, then those of the second, and so on.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnnfast import functional
from rnnfast.explain.table import format_step
from rnnfast.sequences import StepWeights

Array = Tensor | np.ndarray[Any, Any] | Sequence[Any]
"""An argument of numbers: a tensor, an array or nested lists."""

GATES = {"elman": ("h",), "gru": ("r", "z", "n"), "lstm": ("i", "f", "g", "o")}
"""The gates of each cell, in the order of their rows in the weights."""
_TANH = frozenset({"h", "n", "g"})


@dataclass(frozen=True)
class Step:
    """One step of a cell on one input, in float64.

    The names of the gates are the letters of torch.nn's formulas: i, f, g, o for the LSTM and
    r, z, n for the GRU. The only gate of an Elman cell is its new state, h. The states are named h
    and c.
    """

    cell: str
    """elman, gru or lstm."""
    x: Tensor
    """The input (I)."""
    states: dict[str, Tensor]
    """The states before the step, each (H)."""
    weight_ih: Tensor
    """(G*H, I)."""
    weight_hh: Tensor
    """(G*H, H)."""
    bias_ih: Tensor
    """(G*H)."""
    bias_hh: Tensor
    """(G*H)."""
    from_x: dict[str, Tensor]
    """For each gate W_ih x + b_ih (H)."""
    from_h: dict[str, Tensor]
    """For each gate W_hh h + b_hh (H)."""
    preactivations: dict[str, Tensor]
    """For each gate the argument of its sigmoid or tanh (H): from_x + from_h, except for the GRU's
    n, where it is from_x + r * from_h."""
    gates: dict[str, Tensor]
    """For each gate its value (H)."""
    new_states: dict[str, Tensor]
    """The states after the step, each (H), as the kernel computes them."""
    deviation: float
    """The largest difference between the kernel's states and those of the written-out formula."""

    @property
    def input_size(self) -> int:
        """I."""
        return len(self.x)

    @property
    def hidden_size(self) -> int:
        """H."""
        return len(self.states["h"])

    @staticmethod
    def activation(gate: str) -> str:
        """The activation function of a gate, "tanh" or "sigmoid"."""
        return "tanh" if gate in _TANH else "sigmoid"

    def __str__(self) -> str:
        return format_step(self)


def elman_step(
    x: Array, h: Array, weight_ih: Array, weight_hh: Array, bias_ih: Array, bias_hh: Array
) -> Step:
    """One step of an Elman cell, h' = tanh(W_ih x + b_ih + W_hh h + b_hh).

    Elman, "Finding structure in time", Cognitive Science 14, 1990.

    Args:
        x: The input (I).
        h: The state (H).
        weight_ih: (H, I).
        weight_hh: (H, H).
        bias_ih: (H).
        bias_hh: (H).

    Returns:
        The step; ``print`` shows it written out.

    Raises:
        ValueError: An argument has another shape, or holds something else than finite numbers.
        ArithmeticError: The kernel and the written-out formula differ.
    """
    return _step("elman", x, {"h": h}, weight_ih, weight_hh, bias_ih, bias_hh)


def gru_step(
    x: Array, h: Array, weight_ih: Array, weight_hh: Array, bias_ih: Array, bias_hh: Array
) -> Step:
    """One step of a gated recurrent unit, as torch.nn.GRUCell takes it.

    r  = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
    z  = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
    n  = tanh(W_in x + b_in + r * (W_hn h + b_hn))
    h' = (1 - z) * n + z * h

    Cho et al., arXiv:1406.1078, 2014, with the reset gate applied after the product.

    Args:
        x: The input (I).
        h: The state (H).
        weight_ih: (3*H, I), the rows of r, then of z, then of n.
        weight_hh: (3*H, H).
        bias_ih: (3*H).
        bias_hh: (3*H).

    Returns, Raises:
        The same as `elman_step`.
    """
    return _step("gru", x, {"h": h}, weight_ih, weight_hh, bias_ih, bias_hh)


def lstm_step(
    x: Array,
    h: Array,
    c: Array,
    weight_ih: Array,
    weight_hh: Array,
    bias_ih: Array,
    bias_hh: Array,
) -> Step:
    """One step of a long short-term memory cell, as torch.nn.LSTMCell takes it.

    i  = sigmoid(W_ii x + b_ii + W_hi h + b_hi)
    f  = sigmoid(W_if x + b_if + W_hf h + b_hf)
    g  = tanh(W_ig x + b_ig + W_hg h + b_hg)
    o  = sigmoid(W_io x + b_io + W_ho h + b_ho)
    c' = f * c + i * g
    h' = o * tanh(c')

    Hochreiter, Schmidhuber, "Long short-term memory", Neural Computation 9(8), 1997, with the
    forget gate of Gers, Schmidhuber, Cummins, Neural Computation 12(10), 2000.

    Args:
        x: The input (I).
        h: The hidden state (H).
        c: The cell state (H).
        weight_ih: (4*H, I), the rows of i, then of f, g and o.
        weight_hh: (4*H, H).
        bias_ih: (4*H).
        bias_hh: (4*H).

    Returns, Raises:
        The same as `elman_step`.
    """
    return _step("lstm", x, {"h": h, "c": c}, weight_ih, weight_hh, bias_ih, bias_hh)


def explain_step(cell: str, numbers: Mapping[str, Array]) -> Step:
    """Call `elman_step`, `gru_step` or `lstm_step` with arguments from a mapping.

    Raises:
        ValueError: Arguments are missing or unknown, or the function raises it.
        ArithmeticError: The function raises it.
    """
    functions: dict[str, Callable[..., Step]]
    functions = {"elman": elman_step, "gru": gru_step, "lstm": lstm_step}
    states = ("h", "c") if cell == "lstm" else ("h",)
    expected = ("x", *states, "weight_ih", "weight_hh", "bias_ih", "bias_hh")
    for problem, names in (
        ("is missing", [name for name in expected if name not in numbers]),
        ("is unknown", [name for name in numbers if name not in expected]),
    ):
        if names:
            raise ValueError(f"{names[0]!r} {problem}; {cell} takes {', '.join(expected)}")
    return functions[cell](**numbers)


def load_step(cell: str, path: str | Path) -> Step:
    """Call `explain_step` with the arguments in a JSON file.

    The file holds an object: {"x": [0.5, ...], "h": [...], "c": [...], "weight_ih": [[...], ...],
    "weight_hh": [[...], ...], "bias_ih": [...], "bias_hh": [...]}. Only the LSTM has "c".

    Raises:
        OSError: The file cannot be read.
        ValueError: The file does not hold such an object, or `explain_step` raises it.
        ArithmeticError: `explain_step` raises it.
    """
    try:
        numbers = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(numbers, dict):
        kind = type(numbers).__name__
        raise ValueError(f"{path}: expected an object of names and numbers, got {kind}")
    try:
        return explain_step(cell, numbers)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _step(
    cell: str,
    x: Array,
    states: Mapping[str, Array],
    weight_ih: Array,
    weight_hh: Array,
    bias_ih: Array,
    bias_hh: Array,
) -> Step:
    x = _numbers("x", x, 1)
    before = {name: _numbers(name, state, 1) for name, state in states.items()}
    weights = (
        _numbers("weight_ih", weight_ih, 2),
        _numbers("weight_hh", weight_hh, 2),
        _numbers("bias_ih", bias_ih, 1),
        _numbers("bias_hh", bias_hh, 1),
    )
    _check_shapes(cell, x, before, *weights)

    w_ih, w_hh, b_ih, b_hh = weights
    names, h = GATES[cell], before["h"]
    from_x = _by_gate(names, w_ih @ x + b_ih)
    from_h = _by_gate(names, w_hh @ h + b_hh)
    preactivations: dict[str, Tensor] = {}
    gates: dict[str, Tensor] = {}
    for name in names:
        hidden = gates["r"] * from_h[name] if name == "n" else from_h[name]
        preactivations[name] = from_x[name] + hidden
        gates[name] = getattr(torch, Step.activation(name))(preactivations[name])
    written_out = _next_states(cell, gates, before)
    after = _run_kernel(cell, x, before, weights)
    deviation = max(float((after[name] - written_out[name]).abs().max()) for name in after)
    for name, state in after.items():
        if not torch.allclose(state, written_out[name], rtol=1e-9, atol=1e-9):
            raise ArithmeticError(
                f"the kernel's {name}' differs from the formula's by {deviation:.1e}"
            )
    return Step(cell, x, before, *weights, from_x, from_h, preactivations, gates, after, deviation)


def _by_gate(names: Sequence[str], rows: Tensor) -> dict[str, Tensor]:
    return dict(zip(names, rows.chunk(len(names)), strict=True))


def _next_states(
    cell: str, gates: Mapping[str, Tensor], states: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The states after the step, from the gates."""
    if cell == "elman":
        return {"h": gates["h"]}
    if cell == "gru":
        z, n = gates["z"], gates["n"]
        return {"h": (1 - z) * n + z * states["h"]}
    c = gates["f"] * states["c"] + gates["i"] * gates["g"]
    return {"h": gates["o"] * torch.tanh(c), "c": c}


def _run_kernel(
    cell: str, x: Tensor, states: Mapping[str, Tensor], weights: StepWeights
) -> dict[str, Tensor]:
    """The states after the step, from what runs `rnnfast.LSTMCell` and its like."""
    x, h = x.unsqueeze(0), states["h"].unsqueeze(0)
    if cell == "lstm":
        h, c = functional.lstm_cell(x, (h, states["c"].unsqueeze(0)), *weights)
        return {"h": h.squeeze(0), "c": c.squeeze(0)}
    function = functional.gru_cell if cell == "gru" else functional.rnn_cell
    return {"h": function(x, h, *weights).squeeze(0)}


def _numbers(name: str, value: Any, dims: int) -> Tensor:
    """Turn ``value`` into a float64 tensor on the CPU, and check its number of dimensions."""
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype is torch.bool:
            raise ValueError(f"{name}: expected numbers, got {value.dtype}")
        tensor = value.detach().to("cpu", torch.float64)
    else:
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise ValueError(f"{name}: the lists in it differ in length or depth") from error
        if array.size and array.dtype.kind not in "iuf":
            raise ValueError(
                f"{name}: expected numbers, got {_find_odd(value) or 'too large ones'}"
            )
        tensor = torch.from_numpy(array.astype(np.float64))
    if tensor.dim() != dims or tensor.numel() == 0:
        expected = "a list of numbers" if dims == 1 else "a matrix, a list of rows"
        raise ValueError(f"{name}: expected {expected}, got shape {tuple(tensor.shape)}")
    if not tensor.isfinite().all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    return tensor


def _find_odd(value: Any) -> str:
    """Describe the first item in nested lists that is not a number; empty if all are numbers."""
    if isinstance(value, (list, tuple)):
        return next(filter(None, map(_find_odd, value)), "")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return ""
    return f"{type(value).__name__} {value!r}"[:60]


def _check_shapes(
    cell: str,
    x: Tensor,
    states: Mapping[str, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor,
    b_hh: Tensor,
) -> None:
    """Raise ValueError for a shape that does not fit the sizes on which most arguments agree."""
    count = len(GATES[cell])
    I = w_ih.shape[1]
    H = statistics.mode([len(states["h"]), w_hh.shape[1], w_ih.shape[0] // count])
    rows = f"{count}*hidden_size" if count > 1 else "hidden_size"
    for name, tensor, words, shape in (
        *((name, state, "(hidden_size,)", (H,)) for name, state in states.items()),
        ("weight_ih", w_ih, f"({rows}, input_size)", (count * H, I)),
        ("weight_hh", w_hh, f"({rows}, hidden_size)", (count * H, H)),
        ("bias_ih", b_ih, f"({rows},)", (count * H,)),
        ("bias_hh", b_hh, f"({rows},)", (count * H,)),
        ("x", x, "(input_size,)", (I,)),
    ):
        if tensor.shape != shape:
            got = f"got {tuple(tensor.shape)}"
            if name == "x":
                got += f"; weight_ih is {tuple(w_ih.shape)}, a column for each input"
            raise ValueError(f"{name}: expected shape {words} = {shape}, {got}")
