"""What is wrong with the arguments of a call, in torch's words where it has words.

Sizes are those of `rnnfast.functional`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from .backend import find_freed, is_tracing, transforms_active
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
    refuse_freed(lengths=lengths, reset=reset)
    # Lengths and resets are copied, since the caller may change them before the backward.
    if lengths is not None:
        if not isinstance(lengths, Tensor):
            lengths = torch.as_tensor(lengths, device="cpu")
            lengths = lengths if lengths.numel() else lengths.long()
        if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype is torch.bool:
            raise TypeError(f"lengths should be integers, got {lengths.dtype}")
        if lengths.shape != (batch,):
            shape = list(lengths.shape)
            raise RuntimeError(f"Expected lengths of shape ({batch},), got {shape}")
        lengths = lengths.to("cpu", torch.int64, copy=True)
        # While compiling, tracing or under transforms values are unavailable; the operator checks.
        unknown = torch.compiler.is_compiling() or is_tracing() or transforms_active()
        if not unknown and batch > 0:
            low, high = (int(limit) for limit in lengths.aminmax())
            if low < 0 or high > steps:
                found = low if low < 0 else high
                raise ValueError(f"lengths should be between 0 and {steps}, got {found}")
    if reset is not None:
        reset = as_reset(reset, x)
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
        if torch.is_grad_enabled() or is_tracing():
            reset = reset.clone(memory_format=torch.contiguous_format)
    return Extras(lengths, reset, return_cells)


def as_reset(reset: Any, x: Tensor) -> Tensor:
    """``reset``, which may be an array or lists, as a tensor; these are put where ``x`` is."""
    return reset if isinstance(reset, Tensor) else torch.as_tensor(reset, device=x.device)


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
        None if nothing is wrong. `stack_problem` looks at the shapes of the weights.
    """
    dims = 3 if packed_batch is None else 2
    if x.dim() != dims:
        return f"input must have {dims} dimensions, got {x.dim()}"
    steps, batch = x.shape[1::-1] if options.batch_first else x.shape[:2]
    if packed_batch is not None:
        steps, batch = x.shape[0], packed_batch
    if weights[1].dim() != 2:
        return f"Expected w_hh with 2 dimensions, got {list(weights[1].shape)}"
    if steps == 0:
        return "Expected sequence length to be larger than 0 in RNN"
    if tokens:
        x = weights[1].new_empty((0, weights[0].shape[-1]), device=x.device)
    rows = options.num_layers * options.directions
    shapes = [(rows, batch, size) for size in state_sizes(cell, weights, options)]
    return _problem(cell, x, weights[0].shape[-1], states, shapes, weights)


def packed_problem(packed: PackedSequence) -> str | None:
    """What is wrong with how a batch is packed; None if nothing is.

    Which sequences the indices name is only looked at on the CPU: elsewhere it would have to be
    waited for.
    """
    data, batch_sizes, order, inverse = packed
    if not isinstance(data, Tensor) or data.dim() < 1:
        return "data of a PackedSequence should be a tensor of at least 1 dimension"
    refuse_freed(data=data, batch_sizes=batch_sizes, sorted_indices=order, unsorted_indices=inverse)
    if not _is_integers(batch_sizes, "cpu"):
        return "batch_sizes should be an int64 tensor on the CPU with 1 dimension"
    sizes = batch_sizes.tolist()
    if not sizes:
        return "Expected sequence length to be larger than 0 in RNN"
    if sizes != sorted(sizes, reverse=True) or sizes[-1] < 1:
        return f"batch_sizes should not rise and be at least 1, got {_shortened(sizes)}"
    if sum(sizes) != data.shape[0]:
        return f"batch_sizes should sum to the rows of data, {data.shape[0]}, got {sum(sizes)}"
    for name, indices in (("sorted_indices", order), ("unsorted_indices", inverse)):
        if indices is None:
            continue
        if not _is_integers(indices, data.device.type) or indices.device != data.device:
            return f"{name} should be an int64 tensor on the data's device with 1 dimension"
        if indices.shape[0] != sizes[0]:
            return f"{name} should have {sizes[0]} entries, one a sequence, got {indices.shape[0]}"
    if inverse is None or data.device.type != "cpu":
        return None if order is None or inverse is not None else "unsorted_indices are missing"
    numbers, places = list(range(sizes[0])), inverse.tolist()
    if sorted(places) != numbers:
        return f"unsorted_indices should be a permutation, got {_shortened(places)}"
    if order is not None and order[inverse].tolist() != numbers:
        return f"unsorted_indices should undo sorted_indices, got {_shortened(places)}"
    return None


def _is_integers(value: Any, device: str) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dtype is torch.int64
        and value.dim() == 1
        and value.device.type == device
    )


def _shortened(values: list[int]) -> str:
    return str(values) if len(values) <= 10 else f"{str(values[:10])[:-1]}, ...]"


class ChecksOnly(TorchFunctionMode):
    """In it torch.nn's layers check a call in their words and raise ``problem`` instead of running.

    For their kernels rely on what they are given, and not all of it has been checked by then.
    """

    def __init__(self, problem: str) -> None:
        super().__init__()
        self.problem = problem

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", None) in ("rnn_tanh", "rnn_relu", "gru", "lstm"):
            raise RuntimeError(self.problem)
        return func(*args, **(kwargs or {}))


def step_problem(cell: Cell, x: Tensor, states: States | None, weights: StepWeights) -> str | None:
    """What is wrong with the arguments of `run_step`; as `sequence_problem`."""
    if x.dim() != 2:
        return f"input must have 2 dimensions, got {x.dim()}"
    hidden = weights[1].shape[-1] if cell.recurrent else weights[1].shape[0] // cell.gates
    shapes = [(x.shape[0], hidden), (x.shape[0], cell.cells * hidden)][: cell.states]
    return _problem(cell, x, weights[0].shape[-1], states, shapes, weights)


def _problem(
    cell: Cell,
    x: Tensor,
    inputs: int,
    states: States | None,
    shapes: Sequence[tuple[int, ...]],
    weights: Sequence[Tensor | None],
) -> str | None:
    """Checks what steps and sequences have in common; ``shapes`` are those of the states."""
    if x.shape[-1] != inputs:
        return f"input.size(-1) must be equal to input_size. Expected {inputs}, got {x.shape[-1]}"
    if states is None:
        refuse_freed(input=x, parameter=weights)
        return _mismatch(x, weights, "parameter")
    if not isinstance(states, (tuple, list)) or len(states) != cell.states:
        return "lstm expects two hidden states" if cell.aten else f"expected {cell.states} states"
    for k, (state, shape) in enumerate(zip(states, shapes, strict=True)):
        name = "hidden" if cell.states == 1 else f"hidden[{k}]"
        if not isinstance(state, Tensor):
            return f"Expected {name} to be a tensor, got {type(state).__name__}"
        if state.shape != shape:
            return f"Expected {name} size {shape}, got {list(state.shape)}"
    refuse_freed(input=x, hidden=states, parameter=weights)
    return _mismatch(x, states, "hidden") or _mismatch(x, weights, "parameter")


def refuse_freed(**tensors: Any) -> None:
    """RuntimeError for a tensor whose memory is gone: torch's own kernels might crash as well.

    Each argument is a tensor or a sequence of them; anything else is passed over.
    """
    for name, value in tensors.items():
        values = value if isinstance(value, (tuple, list)) else (value,)
        if find_freed([t for t in values if isinstance(t, Tensor)]) is not None:
            raise RuntimeError(f"The storage of the {name} tensor has been freed or resized")


def _mismatch(x: Tensor, tensors: Sequence[Tensor | None], kind: str) -> str | None:
    """Describes the first tensor whose device or dtype differs from the input's, or None."""
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


def stack_problem(
    cell: Cell, weights: Sequence[Tensor], options: Options, inputs: int, hidden: int
) -> str | None:
    """Which weight of a stack of layers has the wrong shape, given I and H."""
    per_layer, directions = options.tensors_per_layer, options.directions
    h_size = options.proj_size or hidden
    for i in range(0, len(weights), per_layer):
        columns = inputs if i < directions * per_layer else directions * h_size
        w = weights[i : i + per_layer]
        if options.proj_size and w[-1].shape != (h_size, hidden):
            return f"Expected w_hr size {(h_size, hidden)}, got {list(w[-1].shape)}"
        own = w[: 4 if options.has_biases else 2]
        if problem := weights_problem(cell, own, columns, hidden, h_size):
            return problem
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
