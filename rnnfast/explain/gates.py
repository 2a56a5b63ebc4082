"""Computes the gates of one call of a layer or a cell by running it again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from rnnfast import backend, checks, functional, reference, sequences
from rnnfast.bases import CELL_WEIGHTS
from rnnfast.custom import CustomCell, Layer, LayerCell
from rnnfast.custom.cells import named_values
from rnnfast.modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from rnnfast.reference import CELLS, Cell, LayerInputs, States
from rnnfast.sequences import Extras, StepWeights

Activations = dict[str, Tensor]
Layers = RNN | GRU | LSTM | Layer
Cells = RNNCell | GRUCell | LSTMCell | LayerCell


def repeat_step(layer: Cells, input: Tensor, hx: Any = None) -> tuple[dict[str, Activations], int]:
    """The activations of a call of a cell, with a time dimension of size 1, and that dimension."""
    cell, single = _cell_of(layer), input.dim() == 1
    x = input.unsqueeze(0) if single else input
    states = _as_states(cell, hx, batch=0 if single else None)
    if states is None:
        sizes = (layer.hidden_size, cell.cells * layer.hidden_size)[: cell.states]
        states = tuple(x.new_zeros(x.shape[0], size) for size in sizes)
    weights: list[Tensor | None] = [*layer._read(CELL_WEIGHTS)]
    if isinstance(layer, LayerCell):
        weights = [weight for weight in weights if weight is not None]
        weights += [layer._read_parameters()] if cell.parameters else []
    own = _repeat(layer, cell, x.unsqueeze(0), states, weights, False, Extras())
    return {"l0": {name: t.squeeze(1) if single else t for name, t in own.items()}}, 0


def repeat_sequence(
    layer: Layers,
    input: Tensor | PackedSequence,
    hx: Any = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    return_cells: bool = False,
    embedding: nn.Embedding | None = None,
) -> tuple[dict[str, Activations], int]:
    """The activations of each layer and direction, shaped like the input, and the time dim."""
    gates = isinstance(layer, Layer) and layer.takes_gates
    if (layer.tokens and not gates) or embedding is not None:
        input = _look_up(layer, input, embedding)
    if isinstance(input, PackedSequence):
        input, lengths = pad_packed_sequence(input, layer.batch_first)
    single = input.dim() == 2

    def arrange(tensor: Tensor) -> Tensor:
        """Move time to the first and the batch to the second dimension."""
        if single:
            return tensor.unsqueeze(1)
        return tensor.transpose(0, 1) if layer.batch_first else tensor

    def restore(tensor: Tensor) -> Tensor:
        if single:
            return tensor.squeeze(1)
        return tensor.transpose(0, 1) if layer.batch_first else tensor

    cell, directions = _cell_of(layer), 2 if layer.bidirectional else 1
    x, reset = arrange(input), None if reset is None else arrange(checks.as_reset(reset, input))
    extras = checks.check_extras(x, lengths, reset, False, batch_first=False)
    states = _as_states(cell, hx, batch=1 if single else None)
    if states is None:
        hidden = layer.hidden_size
        sizes = (layer.proj_size or hidden, cell.cells * hidden)[: cell.states]
        rows = layer.num_layers * directions
        states = tuple(x.new_zeros(rows, x.shape[1], size) for size in sizes)

    activations: dict[str, Activations] = {}
    outputs: list[Tensor] = []
    for row, weights in enumerate(_weights_of(layer)):
        number, direction = divmod(row, directions)
        before = tuple(state[row] for state in states)
        own = _repeat(layer, cell, x, before, weights, direction == 1, extras)
        key = f"l{number}_reverse" if direction else f"l{number}"
        activations[key] = {name: restore(tensor) for name, tensor in own.items()}
        outputs.append(own["hidden"])
        if len(outputs) == directions:
            x, outputs = torch.cat(outputs, dim=-1), []
    return activations, 1 if layer.batch_first and not single else 0


def _look_up(layer: Layers, tokens: Tensor | PackedSequence, embedding: nn.Embedding | None) -> Any:
    """Turn tokens into the vectors that the layer would use for them."""
    if isinstance(tokens, PackedSequence):
        return tokens._replace(data=_look_up(layer, tokens.data, embedding))
    count = layer.input_size if embedding is None else embedding.num_embeddings
    tokens = tokens.long().clamp(0, count - 1)  # padding may hold any value
    if embedding is None:
        return F.one_hot(tokens, count).to(next(layer.parameters()).dtype)
    return embedding(tokens)


def _weights_of(layer: Layers) -> list[list[Tensor]]:
    """The weights of each layer and direction."""
    if not isinstance(layer, Layer):
        return [list(weights) for weights in layer.all_weights]
    tensors, size = layer._read(layer._flat_weights_names), layer._options().tensors_per_layer
    if layer.takes_gates:
        tensors = layer._completed(tensors, torch.eye(layer.input_size).to(tensors[0]))
    return [tensors[begin : begin + size] for begin in range(0, len(tensors), size)]


def _cell_of(layer: Layers | Cells) -> Cell:
    if isinstance(layer, Layer | LayerCell):
        return layer.cell.row
    if isinstance(layer, LSTM | LSTMCell):
        return CELLS["lstm"]
    if isinstance(layer, GRU | GRUCell):
        return CELLS["gru"]
    return functional.elman(layer.nonlinearity)


def _as_states(cell: Cell, hx: Any, batch: int | None) -> States | None:
    """Turn ``hx`` into a tuple; insert a batch dimension at ``batch``, unless that is None."""
    if hx is None:
        return None
    states = hx if cell.states > 1 else (hx,)
    if cell.cells > 1:  # the operators take the states beside h side by side
        states = (states[0], torch.cat(states[1:], dim=-1))
    return tuple(state if batch is None else state.unsqueeze(batch) for state in states)


def _repeat(
    layer: Layers | Cells,
    cell: Cell,
    x: Tensor,
    states: States,
    weights: Sequence[Tensor | None],
    reverse: bool,
    extras: Extras,
) -> Activations:
    """The activations (T, B, H) of one layer in one direction.

    ``weights`` are w_ih and w_hh, then both biases if there are any, then w_hr if there is a
    projection, or the learnable vectors of a user's cell.
    """
    arguments: Any = sequences.autocast(x, states, weights)
    x, states, (w_ih, w_hh, *others) = arguments
    last = others[-1] if len(others) % 2 else None
    b_ih, b_hh = others[:2] if len(others) > 1 else (None, None)
    if isinstance(layer, Layer | LayerCell):
        lengths, reset, _ = extras
        inputs = LayerInputs(
            x, states, w_ih, w_hh, b_ih, b_hh, reverse, lengths, reset, parameters=last
        )
        found = _ask_program(layer.cell, inputs)
    else:
        plain = extras.lengths is None and extras.reset is None and last is None
        # torch's kernels return no gates
        chosen = backend.choose(layer.backend, x, beyond_torch=True)
        fused = chosen == "fused" and (plain or x.device.type == "cpu")
        look = _ask_kernel if fused else _ask_formula
        found = look(cell, x, states, (w_ih, w_hh, b_ih, b_hh), reverse, extras, last)
    if extras.lengths is not None:
        steps = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
        beyond = (steps >= extras.lengths.to(x.device)).unsqueeze(2)
        found = {name: tensor.masked_fill(beyond, 0) for name, tensor in found.items()}
    return {name: tensor.to(found["hidden"].dtype) for name, tensor in found.items()}


def _ask_program(custom: CustomCell, inputs: LayerInputs) -> Activations:
    """What each step of a user's cell computes, by the names in the user's function."""
    steps: list[Activations] = []

    def step(*arguments: Tensor) -> States:
        steps.append(named_values(custom, *arguments))
        return custom.row.step(*arguments)

    y, _, c = reference.layer(custom.row._replace(step=step), inputs)
    steps = steps[::-1] if inputs.reverse else steps
    found = {name: torch.stack([values[name] for values in steps]) for name in steps[0]}
    if c is not None:
        others = c.chunk(custom.row.cells, dim=-1)
        found |= dict(zip(custom.state[1:], others, strict=True))
    return {**found, "hidden": y}


def _ask_kernel(
    cell: Cell,
    x: Tensor,
    states: States,
    weights: StepWeights,
    reverse: bool,
    extras: Extras,
    w_hr: Tensor | None,
) -> Activations:
    """The activations that the fused forward saves for its backward."""
    operator, (lengths, reset, _) = getattr(torch.ops.rnnfast, cell.name), extras
    projection = () if w_hr is None else (w_hr,)
    options = (reverse, True, False, lengths, reset)  # True: save the gates
    y, *others = operator(x, *states, *weights, *options, *projection)
    gates = others[cell.states]
    if cell.name == "lstm":
        i, f, g, o = gates.chunk(cell.saved, dim=-1)
        return _lstm(i, f, g, o, others[-1], y)
    if cell.name == "gru":
        n, r, z, _ = gates.chunk(cell.saved, dim=-1)
        return {"reset": r, "update": z, "new": n, "hidden": y}
    return {"hidden": y}


def _ask_formula(
    cell: Cell,
    x: Tensor,
    states: States,
    weights: StepWeights,
    reverse: bool,
    extras: Extras,
    w_hr: Tensor | None,
) -> Activations:
    """The same activations in plain PyTorch, recorded in each step of `rnnfast.reference`."""
    preactivations: list[tuple[Tensor, Tensor]] = []

    def step(gates_x: Tensor, gates_h: Tensor, *states: Tensor) -> States:
        preactivations.append((gates_x, gates_h))
        return cell.step(gates_x, gates_h, *states)

    watched, (lengths, reset, _) = cell._replace(step=step), extras
    inputs = LayerInputs(x, states, *weights, reverse, lengths, reset, w_hr)
    y, _, c = reference.layer(watched, inputs)
    order = -1 if reverse else 1
    from_x, from_h = (torch.stack(gates[::order]) for gates in zip(*preactivations, strict=True))
    if cell.name == "lstm":
        i, f, g, o = (from_x + from_h).chunk(cell.gates, dim=-1)
        return _lstm(i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid(), c, y)
    if cell.name == "gru":
        x_r, x_z, x_n = from_x.chunk(cell.gates, dim=-1)
        h_r, h_z, h_n = from_h.chunk(cell.gates, dim=-1)
        r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
        return {"reset": r, "update": z, "new": (x_n + r * h_n).tanh(), "hidden": y}
    return {"hidden": y}


def _lstm(*tensors: Any) -> Activations:
    names = ("input", "forget", "cell", "output", "cell_state", "hidden")
    return dict(zip(names, tensors, strict=True))
