"""The fused operators with gradients: one layer, one direction, a whole sequence per call.

Every cell has the operators ``rnnfast::<cell>`` and ``rnnfast::<cell>_backward``, which differ only
in the number of states, so that two autograd Functions serve them all:

    forward    (x, *states, w_ih, w_hh, b_ih, b_hh, reverse, save, recompute, lengths, reset
               [, w_hr]) -> (y, *final states, gates[, cells])
    backward   (*gradients of y and the final states, x, *states, w_ih, w_hh, b_ih, b_hh, y, gates
               [, cells], reverse, mask, lengths, reset[, w_hr, gradient of cells])
               -> gradients of (x, *states, w_ih, w_hh, b_ih, b_hh[, w_hr])

Items in brackets exist for cells with two states; ``cells`` is the c of every step. With
``recompute`` gates is empty on devices whose backward can recompute it. Below, "the tensors of a
layer" are (x, *states, w_ih, w_hh, b_ih, b_hh[, w_hr]).
The second and higher derivatives go through `rnnfast.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend, onnx, reference
from .reference import CELLS, Cell, States

_Operator = Callable[..., States]


class _Operators(NamedTuple):
    forward: _Operator
    backward: _Operator


def _find_operators(cell: str) -> _Operators:
    ops = torch.ops.rnnfast
    return _Operators(getattr(ops, cell).default, getattr(ops, f"{cell}_backward").default)


def layer(
    cell: Cell,
    x: Tensor,
    states: States,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    reverse: bool,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    w_hr: Tensor | None = None,
    *,
    save_cells: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, States, Tensor | None]:
    """`rnnfast.reference.layer` on the fused kernels: the same arguments and results.

    ``lengths`` is int64 and on the CPU. The c of every step is only there with ``save_cells``.
    ``recompute`` saves no gates for the backward, which computes them again from the states.

    The extension must be built, and no torch.func transform or forward-mode AD may be active.
    """
    tensors: tuple[Tensor | None, ...] = (x, *states, w_ih, w_hh, b_ih, b_hh)
    if cell.states > 1:
        tensors += (w_hr,)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        if torch.compiler.is_compiling():
            tensors = _distinct(tensors)
        outputs = _Layer.apply(cell.name, reverse, recompute, lengths, reset, *tensors)
    else:
        without_gates = save_cells and x.device.type == "cpu"
        outputs = _fused_forward(
            cell.name, tensors, reverse, save_cells, without_gates, lengths, reset
        )
    return outputs[0], outputs[1 : 1 + cell.states], outputs[-1] if save_cells else None


def _distinct(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Replaces repeated tensors by views: torch.compile rejects a Function with a tensor twice."""
    distinct: list[Tensor | None] = []
    for tensor in tensors:
        if tensor is not None and any(tensor is other for other in distinct):
            tensor = tensor.view_as(tensor)
        distinct.append(tensor)
    return tuple(distinct)


# The Functions save tensors in `forward` and have no `setup_context`. With one, torch would inspect
# the signature of `forward` in every call, which takes longer than a step of a small cell.


class _Layer(torch.autograd.Function):
    """(cell, reverse, recompute, lengths, reset, *tensors) -> (y, *final states[, cells])."""

    @staticmethod
    def forward(
        ctx: Any,
        cell: str,
        reverse: bool,
        recompute: bool,
        lengths: Tensor | None,
        reset: Tensor | None,
        *tensors: Tensor | None,
    ) -> States:
        outputs = _fused_forward(cell, tensors, reverse, True, recompute, lengths, reset)
        states = CELLS[cell].states
        ctx.cell, ctx.reverse = cell, reverse
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, outputs[0], *outputs[1 + states :], lengths, reset)
        return outputs[: 1 + states] + outputs[2 + states :]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        mask = list(ctx.needs_input_grad[5:])
        return *[None] * 5, *_gradients(ctx.cell, ctx.reverse, mask, grads, ctx.saved_tensors)


def _gradients(
    cell: str,
    reverse: bool,
    mask: list[bool],
    grads: Sequence[Tensor | None],
    saved: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Computes the backward of `_Layer`; also called by the extension's own autograd Function."""
    results: Sequence[Tensor | None]
    if all(grad is None for grad in grads):
        results = [None] * len(mask)
    elif backend.transforms_active():
        results = _reference_backward(cell, reverse, mask, *grads, *saved)
    elif torch.is_grad_enabled():
        results = _LayerBackward.apply(cell, reverse, mask, *grads, *saved)
    else:
        results = _fused_backward(cell, reverse, mask, *grads, *saved)
    return [grad if needed else None for grad, needed in zip(results, mask, strict=True)]


def _fused_forward(
    cell: str, tensors: Sequence[Tensor | None], *options: Any
) -> tuple[Tensor, ...]:
    """Calls the forward operator on the tensors of a layer."""
    count = 5 + CELLS[cell].states
    return _OPERATORS[cell].forward(*tensors[:count], *options, *tensors[count:])


def _fused_backward(
    cell: str, reverse: bool, mask: list[bool], *arguments: Tensor | None
) -> States:
    """Calls the backward operator on the gradients of `_Layer`'s outputs and its saved tensors."""
    states = CELLS[cell].states
    grads, (*rest, lengths, reset) = (
        arguments[: _count_grads(cell)],
        arguments[_count_grads(cell) :],
    )
    tensors, w_hr, saved = rest[: 5 + states], rest[5 + states : len(mask)], rest[len(mask) :]
    if w_hr and w_hr[0] is None:
        mask = mask[:-1]
    return _OPERATORS[cell].backward(
        *grads[: 1 + states],
        *tensors,
        *saved,
        reverse,
        mask,
        lengths,
        reset,
        *w_hr,
        *grads[1 + states :],
    )


def _count_grads(cell: str) -> int:
    """Returns the number of `_Layer`'s outputs: y, final states and, for cells with c, cells."""
    states = CELLS[cell].states
    return 1 + states + (states > 1)


class _LayerBackward(torch.autograd.Function):
    """(cell, reverse, mask, *grads, *tensors, y, gates[, cells], lengths, reset) -> *gradients.

    ``grads`` are those of `_Layer`'s outputs. A gradient that ``mask`` does not ask for is an empty
    tensor.
    """

    @staticmethod
    def forward(
        ctx: Any, cell: str, reverse: bool, mask: list[bool], *arguments: Tensor | None
    ) -> States:
        ctx.cell, ctx.reverse, ctx.mask = cell, reverse, mask
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments)
        return _fused_backward(cell, reverse, mask, *arguments)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        third_order = torch.is_grad_enabled()
        with torch.enable_grad():
            # The aliases make these partial derivatives, even if one argument depends on another.
            arguments: list[Any] = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
            grads = _reference_backward(ctx.cell, ctx.reverse, ctx.mask, *arguments)
        found = [
            (grad, grad_grad)
            for grad, grad_grad in zip(grads, grad_grads, strict=True)
            if grad is not None and grad.requires_grad and grad_grad is not None
        ]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
        results: list[Tensor | None] = [None] * len(arguments)
        if found:
            seconds = torch.autograd.grad(
                [grad for grad, _ in found],
                [arguments[i] for i in wanted],
                [grad_grad for _, grad_grad in found],
                create_graph=third_order,
                allow_unused=True,
            )
            for i, second in zip(wanted, seconds, strict=True):
                results[i] = second
        return None, None, None, *results


def _reference_backward(
    cell: str, reverse: bool, mask: list[bool], *arguments: Any
) -> list[Tensor | None]:
    """Computes the backward operator through `rnnfast.reference`, as a differentiable function.

    It recomputes the forward, so it needs neither y nor what the fused forward saved.
    """
    row = CELLS[cell]
    grads, tensors = arguments[: _count_grads(cell)], arguments[_count_grads(cell) :][: len(mask)]
    freed = backend.find_freed(tensors)
    if freed is not None:
        names = ("x", *("h0", "c0")[: row.states], "w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
        raise RuntimeError(
            f"rnnfast::{cell}: the storage of {names[freed]} has been freed or resized"
        )
    states = tensors[1 : 1 + row.states]
    w_ih, w_hh, b_ih, b_hh = tensors[1 + row.states : 5 + row.states]
    lengths, reset = arguments[-2:]
    w_hr = tensors[-1] if row.states > 1 else None
    with torch.enable_grad():
        y, finals, cells = reference.layer(
            row, tensors[0], states, w_ih, w_hh, b_ih, b_hh, reverse, lengths, reset, w_hr
        )
        outputs = (y, *finals) if cells is None else (y, *finals, cells)
        found = [
            (output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None
        ]
        results = iter(
            torch.autograd.grad(
                [output for output, _ in found],
                [tensor for tensor, needed in zip(tensors, mask, strict=True) if needed],
                [grad for _, grad in found],
                create_graph=True,
                allow_unused=True,
            )
        )
    return [next(results) if needed else None for needed in mask]


def _check_devices(x: Tensor, arguments: Sequence[Any]) -> None:
    """Raises an error for tensors on different devices, which fake kernels would not notice."""
    for tensor in arguments:
        if isinstance(tensor, Tensor) and tensor.device != x.device:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, "
                f"{x.device} and {tensor.device}!"
            )


def _register_fakes(cell: Cell) -> None:
    """Registers fake kernels: the shapes that the operators of ``cell`` return."""
    # torch omits trailing arguments that have their default values.

    def forward(x: Tensor, *arguments: Any) -> States:
        onnx.refuse_unknown(f"rnnfast::{cell.name}")
        states = arguments[: cell.states]
        _, save, recompute, *_ = (*arguments[cell.states + 4 :], False)
        _check_devices(x, arguments[: cell.states + 4])
        hidden = states[-1].shape[1]
        rows = x.shape[:-1]  # (T, B), or (N) of packed x
        like = states[0]  # x may be tokens
        y = like.new_empty((*rows, like.shape[1]))
        finals = tuple(like.new_empty(state.shape) for state in states)
        save_gates = save and not recompute
        gates = like.new_empty((*rows, cell.saved * hidden) if save_gates else (0,))
        if cell.states == 1:
            return y, *finals, gates
        dtype = reference.compute_dtype(like.dtype)
        return y, *finals, gates, like.new_empty((*rows, hidden) if save else (0,), dtype=dtype)

    def backward(*arguments: Any) -> States:
        outputs, inputs = 1 + cell.states, 5 + cell.states
        tensors = arguments[outputs : outputs + inputs]
        mask = arguments[outputs + inputs + 1 + cell.states + 1]  # after y, gates[, cells], reverse
        _check_devices(tensors[0], arguments[: outputs + inputs + 1 + cell.states])
        if cell.states > 1:
            # after mask, lengths and reset
            w_hr = arguments[outputs + inputs + 1 + cell.states + 4 :][:1]
            tensors, mask = (*tensors, *(w_hr or (None,))), (*mask, False)[: inputs + 1]
        w_ih = tensors[1 + cell.states]
        # the gradient of a transposed table of tokens is transposed, too
        transposed = not (tensors[0].is_floating_point() or w_ih.is_contiguous())
        transposed = transposed and w_ih.t().is_contiguous()

        def empty(tensor: Tensor) -> Tensor:
            if transposed and tensor is w_ih:
                return tensor.new_empty(tensor.shape[::-1]).t()
            return tensor.new_empty(tensor.shape)

        return tuple(
            empty(tensor)
            if needed and tensor is not None and tensor.is_floating_point()
            else tensors[1].new_empty((0,))
            for tensor, needed in zip(tensors, mask, strict=True)
        )

    torch.library.register_fake(f"rnnfast::{cell.name}", forward)
    torch.library.register_fake(f"rnnfast::{cell.name}_backward", backward)


_OPERATORS: dict[str, _Operators] = {}
if backend.EXTENSION is not None:
    backend.EXTENSION.set_python_backward(_gradients)
    for _cell in CELLS.values():
        _OPERATORS[_cell.name] = _find_operators(_cell.name)
        _register_fakes(_cell)
