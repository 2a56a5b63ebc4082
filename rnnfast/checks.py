"""What is wrong with the arguments of a call, in torch's words where it has words.

Sizes are those of `rnnfast.functional`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backend import find_freed, transforms_active
from .reference import Cell, States
from .sequences import Extras, Options, StepWeights, is_cast, state_sizes


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
    tokens: bool = False,
) -> str | None:
    """What is wrong with the arguments of `run_sequence`, in torch's words where it has words.

    ``packed_batch`` is the number of sequences where ``x`` is packed; ``tokens`` says that ``x`` is
    what `rnnfast.tokens` makes of them.

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
    if tokens:
        x = weights[1].new_empty((0, weights[0].shape[-1]), device=x.device)
    rows = options.num_layers * options.directions
    shapes = [(rows, batch, size) for size in state_sizes(cell, weights, options)]
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
        return _mismatch(x, weights, "parameter") or _freed(x, (), weights)
    if not isinstance(states, (tuple, list)) or len(states) != cell.states:
        return f"{cell.name} expects {cell.states} hidden states"
    for state, shape in zip(states, shapes, strict=True):
        if not isinstance(state, Tensor):
            return f"hidden states should be tensors, got {type(state).__name__}"
        if state.shape != shape:
            return f"Expected hidden size {shape}, got {list(state.shape)}"
    return (
        _mismatch(x, states, "hidden")
        or _mismatch(x, weights, "parameter")
        or _freed(x, states, weights)
    )


def _freed(x: Tensor, states: States, weights: Sequence[Tensor | None]) -> str | None:
    """Which tensor's memory is gone, at which torch's own kernels would crash as well."""
    place = find_freed((x, *states, *weights))
    if place is None:
        return None
    kind = "input" if place == 0 else "hidden" if place <= len(states) else "parameter"
    return f"the storage of the {kind} tensor has been freed or resized: it lacks elements"


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
        if tensor.dtype is not dtype and not (is_cast(x) and is_cast(tensor)):
            return (
                f"Input and {kind} tensors are not the same dtype, found input tensor with "
                f"{dtype} and {kind} tensor with {tensor.dtype}"
            )
    return None


def weights_problem(
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
