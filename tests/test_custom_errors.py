"""What Layer and LayerCell refuse, and in which words."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from custom_layers import CELLS, Written
from torch import Tensor, nn

import rnnfast
import rnnfast.explain

DOUBLE = torch.float64
X = torch.linspace(-1, 1, 24, dtype=DOUBLE).view(4, 3, 2)


def layer_of(name: str, **options: Any) -> rnnfast.Layer:
    return CELLS[name].layer(2, 5, dtype=DOUBLE, **options)


def step_of(name: str, **options: Any) -> rnnfast.LayerCell:
    return CELLS[name].step(2, 5, dtype=DOUBLE, **options)


HX = tuple(torch.zeros(1, 3, 5, dtype=DOUBLE) for _ in range(4))
STEP_HX = tuple(state[0] for state in HX)


def freed(module: nn.Module, name: str) -> nn.Module:
    getattr(module, name).data.untyped_storage().resize_(0)
    return module


def freed_state(k: int) -> tuple[Tensor, ...]:
    states = tuple(state.clone() for state in HX)
    states[k].untyped_storage().resize_(0)
    return states


def cell_named_lstm() -> rnnfast.Layer:
    def LSTM(x, h, state):  # noqa: N802
        return torch.tanh(x[0] + h[0]), state.c

    return Written(LSTM, 1, ("h", "c")).layer(2, 5, dtype=DOUBLE)


def trace(module: nn.Module, x: Tensor) -> None:
    torch.jit.trace(module, (x,))


LAYER, STEP = (lambda: layer_of("slstm")), (lambda: step_of("slstm"))
CELL = CELLS["slstm"].cell
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no cell": (
        lambda: rnnfast.Layer(torch.tanh, 2, 5),
        TypeError,
        "cell should be what rnnfast.cell",
    ),
    "no cell in a step": (lambda: rnnfast.LayerCell(1, 2, 5), TypeError, "cell should be what"),
    "calling": (
        lambda: CELL(X),
        TypeError,
        "is a cell, which rnnfast.Layer and rnnfast.LayerCell run",
    ),
    "proj_size": (lambda: layer_of("slstm", proj_size=2), TypeError, "proj_size"),
    "hidden_size": (lambda: rnnfast.Layer(CELL, 2, 0), ValueError, "hidden_size must be greater"),
    "float size": (
        lambda: rnnfast.Layer(CELL, 2, 5.0),
        TypeError,
        "hidden_size should be of type int",
    ),
    "layers": (lambda: rnnfast.Layer(CELL, 2, 5, 0), ValueError, "num_layers must be greater"),
    "dropout": (lambda: layer_of("slstm", dropout=2), ValueError, "dropout should be a number"),
    "backend": (lambda: layer_of("slstm", backend="fast"), ValueError, "backend should be one of"),
    "aten": (
        lambda: layer_of("slstm", backend="aten")(X),
        RuntimeError,
        "torch has no kernels for cells",
    ),
    "aten step": (
        lambda: step_of("slstm", backend="aten")(X[0]),
        RuntimeError,
        "torch has no kernels",
    ),
    "one state": (
        lambda: LAYER()(X, HX[0]),
        RuntimeError,
        r"expects 4 hidden states \(h, c, n, m\)",
    ),
    "three states": (lambda: STEP()(X[0], STEP_HX[:3]), RuntimeError, "expects 4 hidden states"),
    "state shapes": (
        lambda: LAYER()(X, (*HX[:3], HX[3][:, :2])),
        RuntimeError,
        r"Expected m size \(1, 3, 5\)",
    ),
    "batch of states": (
        lambda: STEP()(X[0], tuple(s[:2] for s in STEP_HX)),
        RuntimeError,
        r"Expected hidden\[0\] size \(3, 5\)",
    ),
    "no tensor": (lambda: LAYER()(X, (*HX[:3], "m")), RuntimeError, "Expected m to be a tensor"),
    "state dtype": (
        lambda: LAYER()(X, (*HX[:3], HX[3].float())),
        RuntimeError,
        "Expected m of torch.float64, got torch.float32",
    ),
    "state device": (
        lambda: LAYER()(X, (*HX[:3], HX[3].to("meta"))),
        RuntimeError,
        "Expected m on cpu",
    ),
    "dtype": (lambda: LAYER()(X.float()), RuntimeError, "not the same dtype"),
    "device": (lambda: LAYER()(X.to("meta")), RuntimeError, "not at the same device"),
    "dimensions": (lambda: LAYER()(X[None]), RuntimeError, "input must have 3 dimensions"),
    "features": (lambda: LAYER()(X[..., :1]), RuntimeError, "must be equal to input_size"),
    "features of a step": (
        lambda: STEP()(X[0, :, :1]),
        RuntimeError,
        "must be equal to input_size",
    ),
    "text": (lambda: LAYER()("x"), TypeError, "input should be a Tensor or a PackedSequence"),
    "text in a step": (lambda: STEP()("x"), TypeError, "input should be a Tensor"),
    "return_cells": (lambda: LAYER()(X, return_cells=True), ValueError, "return_cells is only"),
    "a cell LSTM": (
        lambda: cell_named_lstm()(X, return_cells=True),
        ValueError,
        "return_cells is only",
    ),
    "script": (
        lambda: torch.jit.script(LAYER()),
        RuntimeError,
        "script cannot compile rnnfast.Layer:",
    ),
    "script a step": (
        lambda: torch.jit.script(STEP()),
        RuntimeError,
        "cannot compile rnnfast.LayerCell",
    ),
    "trace": (lambda: trace(LAYER(), X), RuntimeError, "trace cannot record a cell of a user's"),
    "trace a step": (lambda: trace(STEP(), X[0]), RuntimeError, "trace cannot record a cell"),
    "freeze": (lambda: rnnfast.freeze(nn.Sequential(LAYER())), ValueError, "its cell is a user's"),
    "freeze a step": (lambda: rnnfast.freeze(STEP()), ValueError, "its cell is a user's"),
    "freed weight": (lambda: freed(LAYER(), "weight_hh_l0")(X), RuntimeError, "freed or resized"),
    "freed vector": (lambda: freed(LAYER(), "p_l0")(X), RuntimeError, "freed or resized"),
    "freed in a step": (lambda: freed(STEP(), "p")(X[0]), RuntimeError, "freed or resized"),
    "freed h": (lambda: LAYER()(X, freed_state(0)), RuntimeError, "freed or resized"),
    "freed n": (lambda: LAYER()(X, freed_state(2)), RuntimeError, "freed or resized"),
    "onnx": (
        lambda: torch.onnx.export(LAYER().eval(), (X,), io.BytesIO(), dynamo=False),
        RuntimeError,
        "ONNX has no operator for rnnfast::.*backend='reference'",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    call, kind, words = REFUSED[case]
    with pytest.raises(kind, match=words):
        call()


@pytest.mark.parametrize("name", ["bias", "cell", "backend", "hidden_size", "weight_ih", "forward"])
def test_names_of_parameters_that_are_taken(name: str) -> None:
    with pytest.raises(ValueError, match=f"a parameter cannot be named {name}"):
        rnnfast.cell(gates=1, parameters=(name,))
