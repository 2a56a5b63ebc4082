"""The stateless interface: check the arguments, choose the backend, run layers and directions.

Sizes: T time, B batch, I input, H hidden, G gate blocks of the cell (Elman 1, GRU 3, LSTM 4),
L layers, D directions (2 if bidirectional, else 1).

Under ``torch.autocast`` floating-point arguments, except float64, are cast to its dtype and the
results stay in it, as with the recurrent kernels of cuDNN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import _VF, Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from . import autograd, reference
from .backend import choose, in_force, refuse, transforms_active
from .reference import CELLS, Cell, States

_LAYERS: dict[str, Callable[..., tuple[Tensor, States, Tensor | None]]] = {
    "fused": autograd.layer,
    "reference": reference.layer,
}

_uncompiled_lstm = torch.compiler.disable(
    lambda *arguments: _VF.lstm(*arguments),
    reason="torch 2.13 cannot differentiate its oneDNN LSTM in a compiled graph",
)
ELMAN = {"tanh": CELLS["elman_tanh"], "relu": CELLS["elman_relu"]}
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


class Extras(NamedTuple):
    """What a call may ask for that torch.nn does not offer, once it has been checked."""

    lengths: Tensor | None = None
    """How many steps each sequence has: (B) int64 on the CPU; of a packed input, falling."""
    reset: Tensor | None = None
    """Where no state passes from one step to the next: (T, B) booleans, whatever batch_first."""
    return_cells: bool = False
    """Whether the c of every step is wanted."""


def rnn(
    input: Tensor,
    hx: Tensor | None,
    flat_weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    has_biases: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    recompute: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Elman layers, h' = nonlinearity(W_ih x + b_ih + W_hh h + b_hh), over a batch of sequences.

    Args:
        input: (T, B, I), or (B, T, I) with ``batch_first``.
        hx: The initial state (L*D, B, H); None is zeros.
        flat_weights: For each layer, for each direction: w_ih (G*H, I, or D*H from the second layer
            on), w_hh (G*H, H) and, with ``has_biases``, b_ih and b_hh (G*H).
        nonlinearity: "tanh" or "relu".
        num_layers: L.
        has_biases: Whether ``flat_weights`` holds biases.
        dropout: Probability of zeroing an output of any layer but the last, while ``training``.
        training: Whether dropout applies.
        bidirectional: Whether each layer also runs from the end to the start.
        batch_first: Whether B comes first in ``input`` and ``output``; the states are unaffected.
        recompute: Save no gates for the backward, which computes them again from the states: less
            memory for more time. The fused kernels on the CPU do; elsewhere it changes nothing.
        lengths: Integers (B) from 0 to T, or None: how many steps each sequence has, in any order
            and on any device. Outputs beyond are zeros, and the final state is that after the last
            step.
        reset: Booleans (T, B), or (B, T) with ``batch_first``, or None: where ``reset[t]`` is true,
            the state is zeros before step t and no gradient passes; with ``bidirectional`` nothing
            passes from step t back to t - 1 either.
        backend: None, or the backend to force; see `rnnfast.backend`.

    Returns:
        output (T, B, D*H), or (B, T, D*H) with ``batch_first``, and the final state (L*D, B, H).

    Raises:
        ValueError: Unknown ``nonlinearity`` or ``backend``, or a length out of range.
        RuntimeError: Shapes, dtypes or devices do not fit, or a forced backend cannot run.
    """
    options = Options(
        num_layers, has_biases, dropout, training, bidirectional, batch_first, recompute
    )
    cell, states = elman(nonlinearity), None if hx is None else (hx,)
    output, (h_n,), _ = _checked_sequence(
        cell, input, states, flat_weights, options, backend, lengths, reset
    )
    return output, h_n


def gru(
    input: Tensor,
    hx: Tensor | None,
    flat_weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    has_biases: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    recompute: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated recurrent units over a batch of sequences; arguments and results as in `rnn`."""
    options = Options(
        num_layers, has_biases, dropout, training, bidirectional, batch_first, recompute
    )
    states = None if hx is None else (hx,)
    output, (h_n,), _ = _checked_sequence(
        CELLS["gru"], input, states, flat_weights, options, backend, lengths, reset
    )
    return output, h_n


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    flat_weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    has_biases: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    recompute: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    return_cells: bool = False,
    proj_size: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]] | tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Long short-term memory over a batch of sequences.

    Arguments and results are as in `rnn`, except that the state is the pair (h, c), and that with
    ``return_cells`` there is a third result, shaped like the output: the c of every step of the
    last layer. With ``proj_size`` P, not 0, h is projected to that size: for each layer and
    direction, ``flat_weights`` has one tensor more, w_hr (P, H), its w_hh is (G*H, P), and P stands
    for H in the shapes of the output and of h, though not of c.
    """
    options = Options(
        num_layers, has_biases, dropout, training, bidirectional, batch_first, recompute, proj_size
    )
    output, (h_n, c_n), cells = _checked_sequence(
        CELLS["lstm"], input, hx, flat_weights, options, backend, lengths, reset, return_cells
    )
    return (output, (h_n, c_n)) if cells is None else (output, (h_n, c_n), cells)


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    backend: str | None = None,
) -> Tensor:
    """One step of an Elman cell.

    Args:
        input: (B, I).
        hx: The state (B, H); None is zeros.
        w_ih: (G*H, I).
        w_hh: (G*H, H).
        b_ih: (G*H), or None.
        b_hh: (G*H), or None; both biases or neither.
        nonlinearity: "tanh" or "relu".
        backend: None, or the backend to force; see `rnnfast.backend`.

    Returns:
        The next state (B, H).

    Raises:
        ValueError: Unknown ``nonlinearity`` or ``backend``.
        RuntimeError: Shapes, dtypes or devices do not fit, or a forced backend cannot run.
    """
    states = None if hx is None else (hx,)
    weights = (w_ih, w_hh, b_ih, b_hh)
    return _checked_step(elman(nonlinearity), input, states, weights, backend)[0]


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """One step of a gated recurrent unit; arguments and result as in `rnn_cell`."""
    states = None if hx is None else (hx,)
    weights = (w_ih, w_hh, b_ih, b_hh)
    return _checked_step(CELLS["gru"], input, states, weights, backend)[0]


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM cell; arguments and result as in `rnn_cell`, with the state (h, c)."""
    h, c = _checked_step(CELLS["lstm"], input, hx, (w_ih, w_hh, b_ih, b_hh), backend)
    return h, c


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

    With ``extras.lengths`` x may be packed, (N, I), and the output is.

    Returns:
        The output and the final states, in the shapes that `rnn` describes, and the c of every step
        where that was asked for.
    """
    x, states, weights = _autocast(x, states, weights)
    name = _choose_sequence(x, requested, extras, options.proj_size > 0)
    packed = x.dim() == 2
    if name == "aten":
        return *_aten_sequence(cell, x, states, weights, options, extras.lengths), None
    layer = _LAYERS[name]
    if name == "fused" and (options.recompute or extras.return_cells):
        recompute = options.recompute and x.device.type == "cpu"
        layer = partial(layer, recompute=recompute, save_cells=extras.return_cells)
    if not options.batch_first or packed:
        return _stack(layer, cell, x, states, weights, options, extras)
    y, finals, cells = _stack(layer, cell, x.transpose(0, 1), states, weights, options, extras)
    return y.transpose(0, 1), finals, None if cells is None else cells.transpose(0, 1)


def _choose_sequence(x: Tensor, requested: str | None, extras: Extras, projects: bool) -> str:
    """The backend of a call, of which only the reference serves all extras on every device."""
    lengths, reset, return_cells = extras
    name = choose(requested, x)
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


def run_step(
    cell: Cell, x: Tensor, states: States | None, weights: StepWeights, requested: str | None
) -> States:
    """Runs one step on the chosen backend, on arguments that have been checked.

    Returns:
        The next states, each (B, H).
    """
    x, states, weights = _autocast(x, states, weights)
    if states is None:
        states = (x.new_zeros(x.shape[0], weights[1].shape[1]),) * cell.states
    name = choose(requested, x)
    if name == "aten":
        result = getattr(_VF, f"{cell.aten}_cell")(x, _unwrap(states), *weights)
        return result if cell.states > 1 else (result,)
    return _LAYERS[name](cell, x.unsqueeze(0), states, *weights, False)[1]


def _stack(
    layer: Callable[..., tuple[Tensor, States, Tensor | None]],
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
    per_layer = _tensors_per_layer(options)
    directions = _directions(options)
    if states is None:
        batch = x.shape[1] if x.dim() == 3 else len(_given(extras.lengths))
        zeros = tuple(x.new_zeros(batch, size) for size in _state_sizes(cell, weights, options))
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
            w_hr = (w[-1],) if options.proj_size else ()
            w_ih, w_hh, b_ih, b_hh = w[:4] if options.has_biases else (*w[:2], None, None)
            y, final, c = layer(
                cell, x, initial[i], w_ih, w_hh, b_ih, b_hh, direction == 1, *extras[:2], *w_hr
            )
            outputs.append(y)
            finals.append(final)
            cells.append(c)
        x = outputs[0] if directions == 1 else torch.cat(outputs, dim=-1)
    last = torch.cat([_given(c) for c in cells], dim=-1) if extras.return_cells else None
    return x, _join(finals), None if last is None else last.to(x.dtype)


def _state_sizes(cell: Cell, weights: Sequence[Tensor], options: Options) -> list[int]:
    """The features of each state: P, which is H unless h is projected, and, of c, H."""
    rows, h_size = weights[1].shape
    return [h_size, rows // cell.gates if options.proj_size else h_size][: cell.states]


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _split(states: States) -> list[States]:
    """States of shape (L*D, B, H) -> for every layer and direction, its states of shape (B, H)."""
    if states[0].shape[0] == 1:  # the quicker way counts where the sequence is short
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
    layers, biases, *others, batch_first, _, _ = options
    if states is None:
        rows, batch = _directions(options) * layers, x.shape[0 if batch_first else 1]
        states = tuple(x.new_zeros(rows, batch, n) for n in _state_sizes(cell, weights, options))
    uncompiled = cell.aten == "lstm" and torch.compiler.is_dynamo_compiling()
    operator = _uncompiled_lstm if uncompiled else getattr(_VF, cell.aten)
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


def _unwrap(states: States) -> Tensor | States:
    """The states as torch's operators take them: a tensor where there is one, else a tuple."""
    return states if len(states) > 1 else states[0]


def _directions(options: Options) -> int:
    return 2 if options.bidirectional else 1


def _tensors_per_layer(options: Options) -> int:
    return (4 if options.has_biases else 2) + (options.proj_size > 0)


def _is_cast(tensor: Tensor) -> bool:
    """Whether autocast is on and applies to ``tensor``."""
    return (
        tensor.is_floating_point()
        and tensor.dtype is not torch.float64
        and reference.autocast_enabled(tensor.device.type)
    )


def _autocast(
    x: Tensor, states: States | None, weights: Sequence[Tensor | None]
) -> tuple[Tensor, States | None, Any]:
    """Casts the tensors to the dtype of autocast if it is on."""
    device = x.device.type
    if not reference.autocast_enabled(device):
        return x, states, weights
    dtype = torch.get_autocast_dtype(device)

    def cast(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
        return tuple(t.to(dtype) if t is not None and _is_cast(t) else t for t in tensors)

    return cast((x,))[0], states and cast(states), cast(weights)


def elman(nonlinearity: str) -> Cell:
    """The Elman cell with this nonlinearity; ValueError if there is none."""
    if nonlinearity not in ELMAN:
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    return ELMAN[nonlinearity]


def _checked_sequence(
    cell: Cell,
    x: Tensor,
    states: States | None,
    weights: Sequence[Tensor],
    options: Options,
    requested: str | None,
    lengths: Tensor | Sequence[int] | None,
    reset: Tensor | None,
    return_cells: bool = False,
) -> tuple[Tensor, States, Tensor | None]:
    per_layer, directions = _tensors_per_layer(options), _directions(options)
    expected = options.num_layers * directions * per_layer
    if len(weights) != expected or expected < 1:
        raise RuntimeError(f"Expected {expected} tensors in flat_weights, got {len(weights)}")
    for weight in weights:
        if not isinstance(weight, Tensor):
            raise RuntimeError(f"flat_weights should be tensors, got {type(weight).__name__}")
    if weights[1].dim() != 2:
        raise RuntimeError(f"Expected w_hh with 2 dimensions, got {list(weights[1].shape)}")
    problem = sequence_problem(cell, x, states, weights, options)
    h_size, hidden = weights[1].shape[-1], _state_sizes(cell, weights, options)[-1]
    for i in range(0, expected, per_layer):
        inputs = x.shape[-1] if i < directions * per_layer else directions * h_size
        w = weights[i : i + per_layer]
        w_hr_size = (options.proj_size, hidden)
        if options.proj_size and (w[-1].shape != w_hr_size or h_size != options.proj_size):
            problem = problem or f"Expected w_hr size {w_hr_size}, got {list(w[-1].shape)}"
        own = w[: 4 if options.has_biases else 2]
        problem = problem or _weights_problem(cell, own, inputs, hidden, h_size)
    if problem:
        raise RuntimeError(problem)
    extras = check_extras(x, lengths, reset, return_cells, options.batch_first)
    return run_sequence(cell, x, states, weights, options, requested, extras)


def _checked_step(
    cell: Cell, x: Tensor, states: States | None, weights: StepWeights, requested: str | None
) -> States:
    problem = step_problem(cell, x, states, weights)
    hidden = weights[1].shape[-1]
    problem = problem or _weights_problem(cell, weights, x.shape[-1], hidden, hidden)
    if problem:
        raise RuntimeError(problem)
    return run_step(cell, x, states, weights, requested)


def check_extras(
    x: Tensor,
    lengths: Tensor | Sequence[int] | None,
    reset: Tensor | None,
    return_cells: bool,
    batch_first: bool,
) -> Extras:
    """The extras of a call with ``x`` (T, B, I), or (B, T, I) with ``batch_first``.

    Raises:
        TypeError: ``lengths`` are no integers or ``reset`` no booleans.
        RuntimeError: Their shape or, of ``reset``, device does not fit.
        ValueError: A length is out of range; under torch.compile the operator finds that out, and
            under torch.func nobody does.
    """
    steps, batch = x.shape[1::-1] if batch_first else x.shape[:2]
    # copies, as the caller may use the memory again before the backward
    if lengths is not None:
        if not isinstance(lengths, Tensor):
            lengths = torch.as_tensor(lengths)
            lengths = lengths if lengths.numel() else lengths.long()
        if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype is torch.bool:
            raise TypeError(f"lengths should be integers, got {lengths.dtype}")
        if lengths.shape != (batch,):
            shape = list(lengths.shape)
            raise RuntimeError(f"Expected lengths of shape ({batch},), got {shape}")
        lengths = lengths.to("cpu", torch.int64, copy=True)
        # values that are not known yet are left to the operator
        if not torch.compiler.is_compiling() and not transforms_active() and batch > 0:
            low, high = (int(limit) for limit in lengths.aminmax())
            if low < 0 or high > steps:
                found = low if low < 0 else high
                raise ValueError(f"lengths should be between 0 and {steps}, got {found}")
    if reset is not None:
        reset = reset if isinstance(reset, Tensor) else torch.as_tensor(reset)
        if reset.dtype is not torch.bool:
            raise TypeError(f"reset should be booleans, got {reset.dtype}")
        if reset.shape != x.shape[:2]:
            expected, found_shape = tuple(x.shape[:2]), list(reset.shape)
            raise RuntimeError(f"Expected reset of shape {expected}, got {found_shape}")
        if reset.device != x.device:
            raise RuntimeError(
                f"Input and reset tensors are not at the same device, found input tensor at "
                f"{x.device} and reset tensor at {reset.device}"
            )
        reset = reset.transpose(0, 1) if batch_first else reset
        if torch.is_grad_enabled():
            reset = reset.clone(memory_format=torch.contiguous_format)
    return Extras(lengths, reset, return_cells)


def sequence_problem(
    cell: Cell,
    x: Tensor,
    states: States | None,
    weights: Sequence[Tensor],
    options: Options,
    packed_batch: int | None = None,
) -> str | None:
    """What is wrong with the arguments of `run_sequence`, in torch's words where it has words.

    ``packed_batch`` is the number of sequences where ``x`` is packed.

    Returns:
        None if nothing is wrong. The shapes of the weights are not looked at.
    """
    dims = 3 if packed_batch is None else 2
    if x.dim() != dims:
        return f"input must have {dims} dimensions, got {x.dim()}"
    steps, batch = x.shape[1::-1] if options.batch_first else x.shape[:2]
    if packed_batch is not None:
        steps, batch = x.shape[0], packed_batch
    if steps == 0:
        return "Expected sequence length to be larger than 0 in RNN"
    rows = options.num_layers * _directions(options)
    shapes = [(rows, batch, size) for size in _state_sizes(cell, weights, options)]
    return _problem(cell, x, weights[0].shape[-1], states, shapes, weights)


def step_problem(cell: Cell, x: Tensor, states: States | None, weights: StepWeights) -> str | None:
    """What is wrong with the arguments of `run_step`; as `sequence_problem`."""
    if x.dim() != 2:
        return f"input must have 2 dimensions, got {x.dim()}"
    shapes = [(x.shape[0], weights[1].shape[-1])] * cell.states
    return _problem(cell, x, weights[0].shape[-1], states, shapes, weights)


def _problem(
    cell: Cell,
    x: Tensor,
    inputs: int,
    states: States | None,
    shapes: Sequence[tuple[int, ...]],
    weights: Sequence[Tensor | None],
) -> str | None:
    """What steps and sequences have in common; ``shapes`` are those of the states."""
    if x.shape[-1] != inputs:
        return f"input.size(-1) must be equal to input_size. Expected {inputs}, got {x.shape[-1]}"
    if states is None:
        return _mismatch(x, weights, "parameter")
    if not isinstance(states, (tuple, list)) or len(states) != cell.states:
        return f"{cell.name} expects {cell.states} hidden states"
    for state, shape in zip(states, shapes, strict=True):
        if not isinstance(state, Tensor):
            return f"hidden states should be tensors, got {type(state).__name__}"
        if state.shape != shape:
            return f"Expected hidden size {shape}, got {list(state.shape)}"
    return _mismatch(x, states, "hidden") or _mismatch(x, weights, "parameter")


def _mismatch(x: Tensor, tensors: Sequence[Tensor | None], kind: str) -> str | None:
    """Which tensor's device or dtype is not that of the input."""
    device, dtype = x.device, x.dtype
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device != device:
            return (
                f"Input and {kind} tensors are not at the same device, found input tensor at "
                f"{device} and {kind} tensor at {tensor.device}"
            )
        if tensor.dtype is not dtype and not (_is_cast(x) and _is_cast(tensor)):
            return (
                f"Input and {kind} tensors are not the same dtype, found input tensor with "
                f"{dtype} and {kind} tensor with {tensor.dtype}"
            )
    return None


def _weights_problem(
    cell: Cell, weights: Sequence[Tensor | None], inputs: int, hidden: int, h_size: int
) -> str | None:
    """Which weight of one layer and direction has the wrong shape."""
    rows = cell.gates * hidden
    shapes = {"w_ih": (rows, inputs), "w_hh": (rows, h_size), "b_ih": (rows,), "b_hh": (rows,)}
    for (name, shape), weight in zip(shapes.items(), weights, strict=False):
        if weight is not None and weight.shape != shape:
            return f"Expected {name} size {shape}, got {list(weight.shape)}"
    if [weight is None for weight in weights[2:]] not in ([], [False] * 2, [True] * 2):
        return "Expected both b_ih and b_hh or neither"
    return None
