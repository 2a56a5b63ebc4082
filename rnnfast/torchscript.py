"""Layers in traces of torch.jit.

A trace has one operator, ``rnnfast::layer``, for a layer in one direction: TorchScript cannot save
the autograd Functions that run elsewhere. The operator runs them when the trace runs, so that a
trace has the numbers and the gradients of the module. Who loads a trace imports rnnfast before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import autograd, backend, onnx, reference
from .reference import CELLS, Cell, LayerInputs, LayerOutputs

_LIBRARY = torch.library.Library("rnnfast", "FRAGMENT")
_LIBRARY.define(
    "layer(str backend, str cell, Tensor x, Tensor[] states, Tensor[] weights, bool reverse, "
    "Tensor? lengths, Tensor? reset, Tensor? w_hr, bool save_cells, bool recompute) -> Tensor[]"
)


def traced_layer(
    backend_name: str,
    cell: Cell,
    inputs: LayerInputs,
    *,
    save_cells: bool = False,
    recompute: bool = False,
) -> LayerOutputs:
    """`rnnfast.autograd.layer`, or that of `rnnfast.reference`, as an operator that can be saved.

    Raises:
        RuntimeError: It is torch.onnx.export that traces.
    """
    onnx.refuse_unknown(f"rnnfast::{cell.name}", custom=cell.compile is not None)
    if cell.compile is not None:
        raise RuntimeError("torch.jit.trace cannot record a cell of a user's: use torch.compile")
    x, states, w_ih, w_hh, b_ih, b_hh, *options, _ = inputs
    weights = [w_ih, w_hh, *(bias for bias in (b_ih, b_hh) if bias is not None)]
    y, *others = torch.ops.rnnfast.layer.default(
        backend_name, cell.name, x, list(states), weights, *options, save_cells, recompute
    )
    finals, cells = others[: cell.states], others[cell.states :]
    return LayerOutputs(y, tuple(finals), cells[0] if cells else None)


def _run(
    backend_name: str,
    cell: str,
    x: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    reverse: bool,
    lengths: Tensor | None,
    reset: Tensor | None,
    w_hr: Tensor | None,
    save_cells: bool,
    recompute: bool,
) -> list[Tensor]:
    """``rnnfast::layer``: y, the final states and, where they are there, the c of every step."""
    w_ih, w_hh, *biases = weights
    b_ih, b_hh = biases or (None, None)
    inputs = LayerInputs(x, tuple(states), w_ih, w_hh, b_ih, b_hh, reverse, lengths, reset, w_hr)
    if backend.choose(backend_name, w_hh) == "fused":
        outputs = autograd.layer(CELLS[cell], inputs, save_cells=save_cells, recompute=recompute)
    else:
        outputs = reference.layer(CELLS[cell], inputs)
    y, finals, cells = outputs
    return [y, *finals] if cells is None else [y, *finals, cells]


_LIBRARY.impl("layer", _run, "CompositeImplicitAutograd")


def refuse_script(name: str) -> None:
    """Raises the RuntimeError of torch.jit.script on a module of the class of this name."""
    raise RuntimeError(
        f"torch.jit.script cannot compile rnnfast.{name}. Use torch.jit.trace, or script "
        f"torch.nn.{name}: rnnfast.restore(model) undoes rnnfast.accelerate(model), and a "
        f"state_dict of one class fits the other."
    )
