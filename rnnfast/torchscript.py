"""Layers in traces of torch.jit.

A trace has one operator, ``rnnfast::layer``, for a layer in one direction: TorchScript cannot save
the autograd Functions that run elsewhere. The operator runs them when the trace runs, so that a
trace has the numbers and the gradients of the module. Who loads a trace imports rnnfast before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import autograd, backend, onnx, reference
from .reference import CELLS, Cell, States

_LIBRARY = torch.library.Library("rnnfast", "FRAGMENT")
_LIBRARY.define(
    "layer(str backend, str cell, Tensor x, Tensor[] states, Tensor[] weights, bool reverse, "
    "Tensor? lengths, Tensor? reset, Tensor? w_hr, bool save_cells, bool recompute) -> Tensor[]"
)


def traced_layer(
    backend_name: str,
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
    """`rnnfast.autograd.layer`, or that of `rnnfast.reference`, as an operator that can be saved.

    Raises:
        RuntimeError: It is torch.onnx.export that traces.
    """
    onnx.refuse_unknown(f"rnnfast::{cell.name}")
    weights = [w_ih, w_hh, *(bias for bias in (b_ih, b_hh) if bias is not None)]
    arguments = (x, list(states), weights, reverse, lengths, reset, w_hr, save_cells, recompute)
    y, *others = torch.ops.rnnfast.layer.default(backend_name, cell.name, *arguments)
    return y, tuple(others[: cell.states]), others[cell.states] if others[cell.states :] else None


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
    """The kernel of ``rnnfast::layer``; returns y, the final states and, if any, the c of steps."""
    biases: list[Tensor | None] = [*weights[2:]] or [None, None]
    arguments: tuple[Any, ...] = (CELLS[cell], x, tuple(states), *weights[:2], *biases, reverse)
    arguments += (lengths, reset, w_hr)
    if backend.choose(backend_name, weights[1]) == "fused":
        y, finals, cells = autograd.layer(*arguments, save_cells=save_cells, recompute=recompute)
    else:
        y, finals, cells = reference.layer(*arguments)
    return [y, *finals] if cells is None else [y, *finals, cells]


_LIBRARY.impl("layer", _run, "CompositeImplicitAutograd")


def refuse_script(name: str) -> None:
    """Raises the RuntimeError of torch.jit.script on a module of the class of this name."""
    raise RuntimeError(
        f"torch.jit.script cannot compile rnnfast.{name}. Use torch.jit.trace, or script "
        f"torch.nn.{name}: rnnfast.restore(model) undoes rnnfast.accelerate(model), and a "
        f"state_dict of one class fits the other."
    )
