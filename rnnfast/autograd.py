"""What torch has to know of the fused operators beside their kernels.

Every cell has the operators ``rnnfast::<cell>`` and ``rnnfast::<cell>_backward``: one layer, one
direction, a whole sequence per call. They differ only in the number of states:

    forward    (x, *states, w_ih, w_hh, b_ih, b_hh, reverse, save, recompute, lengths, reset
               [, w_hr][, parameters]) -> (y, *final states, gates[, cells])
    backward   (*gradients of y and the final states, x, *states, w_ih, w_hh, b_ih, b_hh, y, gates
               [, cells], reverse, mask, lengths, reset[, w_hr][, parameters]
               [, gradient of cells])
               -> gradients of (x, *states, w_ih, w_hh, b_ih, b_hh[, w_hr][, parameters])

What is in brackets is there for cells that have it: ``w_hr`` if h may be projected, ``parameters``
if a user's cell has learnable vectors. ``cells`` is the c of every step. With
``save`` the caller gets ``gates`` and ``cells``, else they are empty. ``gates`` is also empty with
``recompute``, where the device's backward can do without, and where plain PyTorch runs. Below, the
tensors of a layer are (x, *states, w_ih, w_hh, b_ih, b_hh[, w_hr][, parameters]).

The extension has the kernels, and those for autograd and autocast (csrc/torch/autograd.cpp). Here
are the shapes of results, the rules for vmap, and what the extension calls where the kernels cannot
be differentiated: the operators ``rnnfast::_<cell>_reference`` and
``rnnfast::_<cell>_backward_reference``, by way of `rnnfast.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend, onnx, reference
from .reference import CELLS, Cell, LayerInputs, LayerOutputs, States

_Operator = Callable[..., States]


class _Operators(NamedTuple):
    forward: _Operator
    backward: _Operator


def _find_operators(cell: str) -> _Operators:
    ops = torch.ops.rnnfast
    return _Operators(getattr(ops, cell).default, getattr(ops, f"{cell}_backward").default)


def layer(
    cell: Cell, inputs: LayerInputs, *, save_cells: bool = False, recompute: bool = False
) -> LayerOutputs:
    """`rnnfast.reference.layer` on the fused kernels, which must be there.

    Args:
        cell: A row of `CELLS`.
        inputs: As there; ``lengths`` is int64 and on the CPU.
        save_cells: Whether to return the c of every step.
        recompute: Whether to save no gates for the backward, which then computes them again from
            the states.
    """
    x, states, w_ih, w_hh, b_ih, b_hh, reverse, lengths, reset, w_hr, parameters = inputs
    tensors = (x, *states, w_ih, w_hh, b_ih, b_hh)
    more = ((w_hr,) if cell.projects else ()) + ((parameters,) if cell.parameters else ())
    if save_cells and x.device.type == "cpu" and not _records(*tensors, *more):
        recompute = True  # the operator need not save gates beside the cells
    operator = _OPERATORS[cell.name].forward
    y, *others = operator(*tensors, reverse, save_cells, recompute, lengths, reset, *more)
    return LayerOutputs(y, tuple(others[: cell.states]), others[-1] if save_cells else None)


def _records(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call with these arguments."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _last_arguments(cell: Cell, given: Sequence[Any]) -> dict[str, Any]:
    """The arguments from ``lengths`` on by their names.

    torch leaves out trailing arguments that have their default values.
    """
    names = ["lengths", "reset"]
    names += ["w_hr"] if cell.projects else []
    names += ["parameters"] if cell.parameters else []
    names += ["grad_cells"] if cell.states > 1 else []
    found = dict.fromkeys(("lengths", "reset", "w_hr", "parameters", "grad_cells"))
    return found | dict(zip(names, given, strict=False))


def _reference_forward(cell: Cell, x: Tensor, *arguments: Any) -> States:
    """``rnnfast::_<cell>_reference``. It has no gates to save."""
    states, rest = arguments[: cell.states], arguments[cell.states :]
    w_ih, w_hh, b_ih, b_hh, reverse, save, *given = rest
    last = _last_arguments(cell, given[1:])
    del last["grad_cells"]
    inputs = LayerInputs(x, states, w_ih, w_hh, b_ih, b_hh, reverse, **last)
    y, finals, cells = reference.layer(cell, inputs)
    outputs = (y, *finals, y.new_empty((0,)))
    if cells is None:
        return outputs
    return *outputs, cells if save else cells.new_empty((0,))


class _BackwardCall(NamedTuple):
    """The arguments of ``rnnfast::<cell>_backward``, without what the forward has saved."""

    grads: tuple[Tensor | None, ...]
    """Those of y, the final states and, with two of these, cells."""
    tensors: tuple[Tensor | None, ...]
    """Those of the layer."""
    mask: tuple[bool, ...]
    """Which gradients of the tensors are wanted."""
    reverse: bool
    lengths: Tensor | None
    reset: Tensor | None


def _parse_backward(cell: Cell, arguments: Sequence[Any]) -> _BackwardCall:
    outputs, options = 1 + cell.states, _place_of_options(cell)
    grads, tensors = arguments[:outputs], arguments[outputs : outputs + 5 + cell.states]
    reverse, mask, *given = arguments[options:]
    last = _last_arguments(cell, given)
    if cell.states > 1:
        grads = (*grads, last["grad_cells"])
    if cell.projects:
        tensors = (*tensors, last["w_hr"])
        mask = (*mask, False)[: len(tensors)]  # it has no entry for a w_hr of None
    if cell.parameters:
        tensors = (*tensors, last["parameters"])
    return _BackwardCall(
        tuple(grads), tuple(tensors), tuple(mask), reverse, last["lengths"], last["reset"]
    )


def _place_of_options(cell: Cell) -> int:
    """Where ``reverse`` and ``mask`` stand: after gradients, tensors, y, gates[, cells]."""
    return 7 + 3 * cell.states


def _reference_backward(cell: Cell, *arguments: Any) -> States:
    """The backward operator by way of `rnnfast.reference`, as a differentiable function.

    It recomputes the forward, and so does without y and what the fused forward saved. A gradient
    that is not wanted is an empty tensor.
    """
    call = _parse_backward(cell, arguments)
    freed = backend.find_freed(call.tensors)
    if freed is not None:
        names = ("x", *("h0", "c0")[: cell.states], "w_ih", "w_hh", "b_ih", "b_hh")
        names += ("w_hr",) if cell.projects else ("parameters",)
        raise RuntimeError(
            f"rnnfast::{cell.name}: the storage of {names[freed]} has been freed or resized"
        )
    with torch.enable_grad():
        # Aliases make the derivatives partial where one argument was computed from another.
        tensors: list[Any] = [None if t is None else t.view_as(t) for t in call.tensors]
        wanted = [
            i
            for i, (tensor, needed) in enumerate(zip(tensors, call.mask, strict=True))
            if needed and tensor is not None and tensor.is_floating_point()
        ]
        for i in wanted:
            if not tensors[i].requires_grad:
                tensors[i] = tensors[i].detach().requires_grad_()
        states = tuple(tensors[1 : 1 + cell.states])
        w_ih, w_hh, b_ih, b_hh, *more = tensors[1 + cell.states :]
        w_hr = more[0] if cell.projects else None
        parameters = more[-1] if cell.parameters else None
        options = call.reverse, call.lengths, call.reset
        inputs = LayerInputs(tensors[0], states, w_ih, w_hh, b_ih, b_hh, *options, w_hr, parameters)
        y, finals, cells = reference.layer(cell, inputs)
        outputs = (y, *finals) if cells is None else (y, *finals, cells)
        pairs = zip(outputs, call.grads, strict=True)
        found = [(output, grad) for output, grad in pairs if grad is not None]
        gradients = torch.autograd.grad(
            [output for output, _ in found],
            [tensors[i] for i in wanted],
            [grad for _, grad in found],
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    results = [states[0].new_empty((0,)) for _ in tensors]
    for i, gradient in zip(wanted, gradients, strict=True):
        results[i] = gradient
    return tuple(results)


class _LayerBackward(torch.autograd.Function):
    """(cell, *arguments of the backward operator) -> its results.

    It has no ``setup_context``: no torch.func transform may be active.
    """

    @staticmethod
    def forward(ctx: Any, cell: Cell, *arguments: Any) -> States:
        place = _place_of_options(cell)
        ctx.cell, ctx.options = cell, arguments[place : place + 2]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments[:place], *arguments[place + 2 :])
        return _OPERATORS[cell.name].backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        third_order = torch.is_grad_enabled()
        with torch.enable_grad():
            # Aliases, as above.
            arguments: list[Any] = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
            place = _place_of_options(ctx.cell)
            arguments[place:place] = ctx.options
            grads = _reference_backward(ctx.cell, *arguments)
        found = [
            (grad, grad_grad)
            for grad, grad_grad in zip(grads, grad_grads, strict=True)
            if grad.requires_grad and grad_grad is not None
        ]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
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
        return None, *results


def _differentiable_backward(cell: Cell, *arguments: Any) -> States:
    """``rnnfast::_<cell>_backward_reference``: plain PyTorch at the latest when differentiated."""
    if backend.transforms_active():
        return _reference_backward(cell, *arguments)
    results: States = _LayerBackward.apply(cell, *arguments)
    return results


_Dims = Sequence[Any]
"""For each argument of an operator the dimension that vmap maps over, or None."""
_Batched = tuple[States, tuple[int | None, ...]]
"""Results of an operator and the dimension of each that vmap maps over."""


def _batched_forward(cell: Cell, info: Any, in_dims: _Dims, *arguments: Any) -> _Batched:
    """The rule for vmap of ``rnnfast::<cell>``: a larger batch if all share the weights."""
    operator, count = _OPERATORS[cell.name].forward, 1 + cell.states
    # of what has a row or a column for each sequence: where the batch is
    batches = {0: 1, **dict.fromkeys(range(1, count), 0), count + 7: 0, count + 8: 1}
    x, x_dim = arguments[0], in_dims[0]
    packed = x.dim() - (x_dim is not None) == 2
    mapped = {i for i, dim in enumerate(in_dims) if isinstance(dim, int)}
    if packed or not mapped <= batches.keys():
        return _one_by_one(operator, info, in_dims, *arguments)
    size, folded = info.batch_size, list(arguments)
    for i, batch in batches.items():
        if i < len(arguments) and arguments[i] is not None:
            tensor, dim = arguments[i], in_dims[i]
            if dim is None:
                tensor, dim = tensor.expand(size, *tensor.shape), 0
            folded[i] = tensor.movedim(dim, batch).flatten(batch, batch + 1)
    outputs = operator(*folded)
    results, out_dims = [], []
    for i, output in enumerate(outputs):
        dim = 0 if 0 < i < count else 1 if output.dim() > 1 else None  # None: nothing is saved
        results.append(output if dim is None else output.unflatten(dim, (size, -1)))
        out_dims.append(dim)
    return tuple(results), tuple(out_dims)


def _one_by_one(operator: _Operator, info: Any, in_dims: _Dims, *arguments: Any) -> _Batched:
    """The rule for vmap that serves every operator: a loop."""
    results = []
    for i in range(info.batch_size):
        pairs = zip(arguments, in_dims, strict=True)
        one = [value.select(dim, i) if isinstance(dim, int) else value for value, dim in pairs]
        results.append(operator(*one))
    outputs = tuple(torch.stack(values) for values in zip(*results, strict=True))
    return outputs, (0,) * len(outputs)


def _check_devices(x: Tensor, arguments: Sequence[Any]) -> None:
    """Raises an error for tensors on different devices, which fake kernels would not notice."""
    for tensor in arguments:
        if isinstance(tensor, Tensor) and tensor.device != x.device:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, "
                f"{x.device} and {tensor.device}!"
            )


def _register_fakes(cell: Cell) -> None:
    """Tells torch.compile and torch.export the shapes that the operators of ``cell`` return."""

    def forward(x: Tensor, *arguments: Any) -> States:
        onnx.refuse_unknown(f"rnnfast::{cell.name}", custom=cell.compile is not None)
        states = arguments[: cell.states]
        # torch leaves out trailing arguments that have their default values
        _, save, recompute, *_ = (*arguments[cell.states + 4 :], False)
        _check_devices(x, arguments[: cell.states + 4])
        hidden = states[-1].shape[1] // max(cell.cells, 1)
        rows = x.shape[:-1]  # (T, B), or (N) of packed x
        like = states[0]  # x may be tokens
        y = like.new_empty((*rows, like.shape[1]))
        finals = tuple(like.new_empty(state.shape) for state in states)
        save_gates = save and not (recompute and cell.recomputes)
        gates = like.new_empty((*rows, cell.saved * hidden) if save_gates else (0,))
        if cell.states == 1:
            return y, *finals, gates
        dtype = reference.compute_dtype(like.dtype)
        columns = cell.cells * hidden
        return y, *finals, gates, like.new_empty((*rows, columns) if save else (0,), dtype=dtype)

    def backward(*arguments: Any) -> States:
        call = _parse_backward(cell, arguments)
        x, h0 = arguments[1 + cell.states :][:2]
        _check_devices(x, arguments[: _place_of_options(cell)])
        w_ih = call.tensors[1 + cell.states]
        assert w_ih is not None
        # the gradient of a transposed table of tokens is transposed, too
        transposed = not (x.is_floating_point() or w_ih.is_contiguous())
        transposed = transposed and w_ih.t().is_contiguous()

        def empty(tensor: Tensor) -> Tensor:
            if transposed and tensor is w_ih:
                return tensor.new_empty(tensor.shape[::-1]).t()
            return tensor.new_empty(tensor.shape)

        return tuple(
            empty(tensor)
            if needed and tensor is not None and tensor.is_floating_point()
            else h0.new_empty((0,))
            for tensor, needed in zip(call.tensors, call.mask, strict=True)
        )

    torch.library.register_fake(f"rnnfast::{cell.name}", forward)
    torch.library.register_fake(f"rnnfast::{cell.name}_backward", backward)


def _frozen_layer_shapes(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    reverse: bool,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes that ``rnnfast::frozen_layer`` returns; see `rnnfast.frozen`."""
    onnx.refuse_unknown("rnnfast::frozen_layer")
    y = h0.new_empty((*x.shape[:-1], h0.shape[-1]))  # x may be tokens
    c_n = h0.new_empty((0,)) if c0 is None else torch.empty_like(c0)
    return y, torch.empty_like(h0), c_n


def _frozen_table_shape(cell: str, x: Tensor, w_ih: Tensor, hidden: int) -> Tensor:
    """The shape that ``rnnfast::frozen_table`` returns: the bytes of csrc/cpu/frozen.h."""
    header, element = 64, 4
    return w_ih.new_empty((header + x.shape[0] * CELLS[cell].gates * hidden * element,))


def register(cell: Cell) -> None:
    """Tells torch all about the operators of a cell, which the extension has."""
    _OPERATORS[cell.name] = _find_operators(cell.name)
    _register_fakes(cell)
    for name, call in (
        (f"_{cell.name}_reference", _reference_forward),
        (f"_{cell.name}_backward_reference", _differentiable_backward),
    ):
        _LIBRARY.impl(name, partial(call, cell), "CompositeImplicitAutograd")
    backward = _OPERATORS[cell.name].backward
    torch.library.register_vmap(f"rnnfast::{cell.name}", partial(_batched_forward, cell))
    torch.library.register_vmap(f"rnnfast::{cell.name}_backward", partial(_one_by_one, backward))


_LIBRARY = torch.library.Library("rnnfast", "FRAGMENT")
_OPERATORS: dict[str, _Operators] = {}
if backend.EXTENSION is not None:
    for _cell in CELLS.values():
        register(_cell)
    torch.library.register_fake("rnnfast::frozen_layer", _frozen_layer_shapes)
    torch.library.register_fake("rnnfast::frozen_table", _frozen_table_shape)
