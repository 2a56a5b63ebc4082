"""How a call runs: choose the backend, then run layers and directions one after the other.

Arguments have been checked here; sizes are those of `rnnfast.functional`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import _VF, Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from . import autograd, reference, torchscript
from .backend import choose, in_force, is_tracing, refuse
from .reference import Cell, LayerInputs, LayerOutputs, States

_Layer = Callable[..., LayerOutputs]
_LAYERS: dict[str, _Layer] = {
    "fused": autograd.layer,
    "reference": reference.layer,
}

StepWeights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""w_ih (G*H, I), w_hh (G*H, H), b_ih (G*H), b_hh (G*H)."""


class Options(NamedTuple):
    """How layers are put together; the meaning is torch.nn's."""

    num_layers: int = 1
    has_biases: bool = True
    dropout: float = 0.0
    training: bool = False
    bidirectional: bool = False
    batch_first: bool = False
    recompute: bool = False
    """Save no gates for the backward; not torch.nn's."""
    proj_size: int = 0
    has_parameters: bool = False
    """Whether the cell has learnable vectors: a tensor (N, H) beside the weights of each layer."""

    @property
    def directions(self) -> int:
        """D."""
        return 2 if self.bidirectional else 1

    @property
    def tensors_per_layer(self) -> int:
        """How many weights and biases a layer has in one direction."""
        return (4 if self.has_biases else 2) + (self.proj_size > 0) + self.has_parameters


class Extras(NamedTuple):
    """The checked arguments of a call that torch.nn does not have."""

    lengths: Tensor | None = None
    """How many steps each sequence has: (B) int64 on the CPU; of a packed input, falling."""
    reset: Tensor | None = None
    """Where no state passes from one step to the next: (T, B) booleans, whatever batch_first."""
    return_cells: bool = False
    """Whether the c of every step is wanted."""


def run_sequence(
    cell: Cell,
    x: Tensor,
    states: States | None,
    weights: Sequence[Tensor],
    options: Options,
    requested: str | None,
    extras: Extras,
) -> tuple[Tensor, States, Tensor | None]:
    """Runs layers and directions on the chosen backend, on arguments that have been checked.

    With ``extras.lengths`` x may be packed, (N, I), and the output is. x may be tokens, as
    `rnnfast.tokens` prepares them.

    Returns:
        The output and the final states, in the shapes that `rnn` describes, and the c of every step
        where that was asked for.
    """
    given = x, states, weights
    x, states, weights = autocast(*given)
    name = _choose_sequence(x, weights[1], requested, extras, options.proj_size > 0)
    name = _of_cell(cell, name, weights[1], requested)
    packed = x.dim() == 2
    if name == "aten":
        # Under autocast torch's CPU operators cast by themselves, or raise if oneDNN cannot run it.
        arguments = given if x.device.type == "cpu" else (x, states, weights)
        y, finals = _aten_sequence(cell, *arguments, options, extras.lengths)
        return y.to(x.dtype), tuple(final.to(x.dtype) for final in finals), None
    layer = _layer_of(name)
    if name == "fused" and (options.recompute or extras.return_cells):
        recompute = options.recompute and x.device.type == "cpu"
        layer = partial(layer, recompute=recompute, save_cells=extras.return_cells)
    if not options.batch_first or packed:
        return stack(layer, cell, x, states, weights, options, extras)
    y, finals, cells = stack(layer, cell, x.transpose(0, 1), states, weights, options, extras)
    return y.transpose(0, 1), finals, None if cells is None else cells.transpose(0, 1)


def _choose_sequence(
    x: Tensor, like: Tensor, requested: str | None, extras: Extras, projects: bool
) -> str:
    """Chooses the backend of a call. Only the reference supports all extras on every device."""
    lengths, reset, return_cells = extras
    name = choose(requested, like, beyond_torch=return_cells)
    plain = lengths is None and reset is None and not projects
    if name == "fused" and x.device.type != "cpu" and not plain:
        if in_force(requested) == "fused":
            refuse("fused", f"lengths, reset and proj_size have no kernels on {x.device.type}")
        name = "aten"
    if name == "aten":
        empty = lengths is not None and x.dim() == 3 and not bool((lengths > 0).all())
        empty = empty or (lengths is not None and lengths.numel() == 0)
        if reset is not None or return_cells or empty:
            if in_force(requested) == "aten":
                cause = "torch's kernels have no reset, cells of every step or lengths of 0"
                refuse("aten", cause, "Leave it to 'auto'")
            name = "reference"
    return name


def _of_cell(cell: Cell, name: str, like: Tensor, requested: str | None) -> str:
    """The backend ``name``, or "reference" if it has no kernels for a user's cell.

    Raises:
        RuntimeError: The backend is forced and cannot run.
    """
    if cell.compile is None:
        return name
    problem = None
    if name == "aten":
        problem = "torch has no kernels for cells of users"
    elif name == "fused":
        on_cpu = like.device.type == "cpu"
        problem = (
            cell.compile(like.dtype)
            if on_cpu
            else f"cells of users have no kernels on {like.device.type}"
        )
    if problem and in_force(requested) == name:
        refuse(name, problem, "Leave it to 'auto'")
    return "reference" if problem else name


def run_step(
    cell: Cell,
    x: Tensor,
    states: States | None,
    weights: StepWeights,
    requested: str | None,
    parameters: Tensor | None = None,
) -> States:
    """Runs one step on the chosen backend, on arguments that have been checked.

    Returns:
        The next states, each (B, H).
    """
    x, states, (*weights, parameters) = autocast(x, states, (*weights, parameters))
    if states is None:
        hidden = weights[1].shape[1] if cell.recurrent else weights[1].shape[0] // cell.gates
        sizes = (hidden, cell.cells * hidden)[: cell.states]
        states = tuple(x.new_zeros(x.shape[0], size) for size in sizes)
    name = _of_cell(cell, choose(requested, x), x, requested)
    if name == "aten":
        result = getattr(_VF, f"{cell.aten}_cell")(x, _unwrap(states), *weights)
        return result if cell.states > 1 else (result,)
    inputs = LayerInputs(x.unsqueeze(0), states, *weights, False, parameters=parameters)
    return _layer_of(name)(cell, inputs).states


def _layer_of(name: str) -> _Layer:
    """Returns the function that runs a layer in one direction on a backend of rnnfast."""
    if not is_tracing() or (name == "reference" and torch.onnx.is_in_onnx_export()):
        return _LAYERS[name]
    return partial(torchscript.traced_layer, name)


def stack(
    layer: _Layer,
    cell: Cell,
    x: Tensor,
    states: States | None,
    weights: Sequence[Tensor],
    options: Options,
    extras: Extras,
) -> tuple[Tensor, States, Tensor | None]:
    """Runs ``layer`` for every layer and direction.

    ``x`` is (T, B, I), or packed (N, I), whatever the options say.
    """
    per_layer = options.tensors_per_layer
    directions = options.directions
    if states is None:
        batch = x.shape[1] if x.dim() == 3 else len(_given(extras.lengths))
        sizes = state_sizes(cell, weights, options)
        zeros = tuple(weights[1].new_zeros(batch, size) for size in sizes)  # x may be tokens
        initial = [zeros] * (options.num_layers * directions)
    else:
        initial = _split(states)
    finals = []
    for k in range(options.num_layers):
        if k > 0 and options.dropout > 0 and options.training:
            x = F.dropout(x, options.dropout)
        outputs, cells = [], []
        for direction in range(directions):
            i = k * directions + direction
            w = weights[i * per_layer : (i + 1) * per_layer]
            w_hr = w[-1] if options.proj_size else None
            parameters = w[-1] if options.has_parameters else None
            b_ih, b_hh = w[2:4] if options.has_biases else (None, None)
            y, final, c = layer(
                cell,
                LayerInputs(
                    x,
                    initial[i],
                    *(w[0], w[1], b_ih, b_hh),
                    direction == 1,
                    *extras[:2],
                    w_hr,
                    parameters,
                ),
            )
            outputs.append(y)
            finals.append(final)
            cells.append(c)
        x = outputs[0] if directions == 1 else torch.cat(outputs, dim=-1)
    last = torch.cat([_given(c) for c in cells], dim=-1) if extras.return_cells else None
    return x, _join(finals), None if last is None else last.to(x.dtype)


def state_sizes(cell: Cell, weights: Sequence[Tensor], options: Options) -> list[int]:
    """The features of each state: P, which is H unless h is projected, and, of c, C*H."""
    rows, h_size = weights[1].shape
    hidden = rows // cell.gates if options.proj_size or not cell.recurrent else h_size
    h_size = h_size if cell.recurrent else hidden
    return [h_size, cell.cells * hidden][: cell.states]


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _split(states: States) -> list[States]:
    """Splits states (L*D, B, H) into a tuple of states (B, H) for every layer and direction."""
    if states[0].shape[0] == 1:  # faster than unbind, which matters for short sequences
        return [tuple([state.squeeze(0) for state in states])]
    return list(zip(*[state.unbind(0) for state in states], strict=True))


def _join(finals: list[States]) -> States:
    """The inverse of `_split`."""
    if len(finals) == 1:
        return tuple([state.unsqueeze(0) for state in finals[0]])
    return tuple([torch.stack(states) for states in zip(*finals, strict=True)])


def _aten_sequence(
    cell: Cell,
    x: Tensor,
    states: States | None,
    weights: Sequence[Tensor],
    options: Options,
    lengths: Tensor | None,
) -> tuple[Tensor, States]:
    options = _for_cudnn(options) if x.is_cuda and _wants_gradient(x, states, weights) else options
    layers, biases, *others, batch_first, _, _, _ = options
    if states is None:
        rows, batch = options.directions * layers, x.shape[0 if batch_first else 1]
        states = tuple(x.new_zeros(rows, batch, n) for n in state_sizes(cell, weights, options))
    operator = getattr(_VF, cell.aten)
    if cell.aten == "lstm" and torch.compiler.is_dynamo_compiling():
        from .uncompiled import lstm as operator
    if lengths is None:
        y, *finals = operator(
            x, _unwrap(states), list(weights), biases, layers, *others, batch_first
        )
        return y, tuple(finals)
    packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
    states = tuple(state.index_select(1, _given(packed.sorted_indices)) for state in states)
    data, *finals = operator(
        packed.data, packed.batch_sizes, _unwrap(states), list(weights), biases, layers, *others
    )
    steps = x.shape[1 if batch_first else 0]
    y, _ = pad_packed_sequence(packed._replace(data=data), batch_first, total_length=steps)
    return y, tuple(final.index_select(1, _given(packed.unsorted_indices)) for final in finals)


def _wants_gradient(x: Tensor, states: States | None, weights: Sequence[Tensor]) -> bool:
    tensors = (x, *(states or ()), *weights)
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _for_cudnn(options: Options) -> Options:
    """Returns options with training mode on, without which cuDNN saves nothing for a backward."""
    return options._replace(training=True, dropout=options.dropout if options.training else 0.0)


def _unwrap(states: States) -> Tensor | States:
    """Returns a single state as a tensor and two as a tuple, as torch's operators take them."""
    return states if len(states) > 1 else states[0]


def is_castable(tensor: Tensor) -> bool:
    """Whether autocast converts such tensors."""
    return tensor.is_floating_point() and tensor.dtype is not torch.float64


def is_cast(tensor: Tensor) -> bool:
    """Whether autocast is on and applies to ``tensor``."""
    return is_castable(tensor) and reference.autocast_enabled(tensor.device.type)


def autocast(
    x: Tensor, states: States | None, weights: Sequence[Tensor | None]
) -> tuple[Tensor, States | None, Any]:
    """Casts the tensors to the dtype of autocast if it is on."""
    device = x.device.type
    if not reference.autocast_enabled(device):
        return x, states, weights
    dtype = torch.get_autocast_dtype(device)

    def cast(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
        return tuple(t.to(dtype) if t is not None and is_cast(t) else t for t in tensors)

    return cast((x,))[0], states and cast(states), cast(weights)
