"""Export to ONNX: every layer and direction becomes one LSTM, GRU or RNN node.

`rnnfast.frozen.onnx` translates frozen layers.

This is for the exporter that is torch.onnx.export's with ``dynamo=True``. It needs the packages
onnx and onnxscript (the extra ``onnx``), which nothing else here does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from . import backend
from .reference import CELLS, Cell

if TYPE_CHECKING:
    from torch.export import ExportedProgram  # slow to import


class Node(NamedTuple):
    """The ONNX operator of a cell."""

    operator: str
    order: tuple[int, ...]
    """For each H-sized block of rows of ONNX's weights, its index in torch's weights."""
    attributes: dict[str, Any]


NODES = {
    "elman_tanh": Node("RNN", (0,), {"activations": ["Tanh"]}),
    "elman_relu": Node("RNN", (0,), {"activations": ["Relu"]}),
    "gru": Node("GRU", (1, 0, 2), {"linear_before_reset": 1}),  # r, z, n -> z, r, h
    "lstm": Node("LSTM", (0, 3, 1, 2), {}),  # i, f, g, o -> i, o, f, c
}


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How to write each operator of this package in ONNX.

    Returns:
        A ``custom_translation_table`` for torch.onnx.export; empty if the extension is not built,
        for then there are no such operators.

    Raises:
        ImportError: onnxscript is missing.
    """
    if backend.EXTENSION is None:
        return {}
    from .frozen.onnx import translate

    operators = torch.ops.rnnfast
    table = {getattr(operators, cell.name).default: _translation(cell) for cell in CELLS.values()}
    return {**table, operators.frozen_layer.default: translate}


def export(
    module: nn.Module | ExportedProgram,
    args: tuple[Any, ...] = (),
    f: str | PathLike[str] | None = None,
    *,
    custom_translation_table: dict[Callable[..., Any], Callable[..., Any]] | None = None,
    export_params: bool = True,
    keep_initializers_as_inputs: bool = False,
    external_data: bool = True,
    optimize: bool = True,
    **options: Any,
) -> torch.onnx.ONNXProgram:
    """Exports a module to ONNX: torch.onnx.export with what this package's layers need.

    Each layer and direction becomes one LSTM, GRU or RNN node. ``reset`` and ``proj_size`` have no
    counterpart in ONNX and cannot be exported. ``lengths`` become the input ``sequence_lens`` of
    the nodes. There the final state of a sequence of length 0 is zeros, not its initial state.

    The nodes of frozen layers have the rounded weights, as float32. A frozen LSTM of int8 becomes
    com.microsoft.DynamicQuantizeLSTM, which only ONNX Runtime has. It takes the same integers and
    scales, and rounds inputs and states to 8 bits. GRU and RNN of int8 cannot be exported.

    With ``optimize`` the weights are stored in ONNX's order. torch's own optimization leaves large
    weights in torch's order, and the nodes that reorder them run whenever the model is loaded.

    Args:
        module: The module to export. Its rnnfast modules become recurrent nodes if their backend is
            the fused one, and its frozen modules always.
        args: Example inputs.
        f: The file to write, or None.
        custom_translation_table: Translations to add. They take precedence over this package's.
        export_params: Whether ``f`` holds the weights.
        keep_initializers_as_inputs: Whether the weights in ``f`` are inputs, too.
        external_data: Whether the weights go to a file beside ``f``.
        optimize: Whether to simplify the graph.
        options: The other arguments of torch.onnx.export, such as ``dynamic_shapes``.

    Returns:
        The exported program.

    Raises:
        ImportError: onnx or onnxscript is missing.
        torch.onnx.OnnxExporterError: The module cannot be exported.

    Example:
        >>> model = rnnfast.GRU(10, 20).eval()
        >>> x = torch.randn(5, 3, 10)
        >>> program = rnnfast.onnx.export(model, (x,), "gru.onnx", verbose=False)
        >>> [node.op_type for node in program.model.graph if node.op_type == "GRU"]
        ['GRU']
    """
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            raise ImportError(
                f"rnnfast.onnx.export needs {package}, of the extra onnx: pip install "
                "--no-build-isolation '.[onnx]' in the folder of rnnfast"
            )
    table = {**translations(), **(custom_translation_table or {})}
    program = torch.onnx.export(
        module, args, dynamo=True, custom_translation_table=table, optimize=optimize, **options
    )
    assert program is not None
    if optimize:
        _fold_weights(program)
    if f is not None:
        program.save(
            f,
            include_initializers=export_params,
            keep_initializers_as_inputs=keep_initializers_as_inputs,
            external_data=external_data,
        )
    return program


def refuse_unknown(operator: str, custom: bool = False) -> None:
    """Refuses an operator of this package in a torch.onnx.export that lacks its translation.

    A ``custom`` operator is one of a user's cell, which has no translation.

    torch says whether an export is running, but not with which translations: its frame knows that.
    The exporter that traces (``dynamo=False``) takes none.

    Raises:
        RuntimeError: What is running lacks it.
    """
    frame = sys._getframe()
    while frame.f_code is not torch.onnx.export.__code__:
        if frame.f_back is None:
            return
        frame = frame.f_back
    if custom:
        raise RuntimeError(
            f"ONNX has no operator for {operator}, a cell of a user's. With backend='reference' "
            f"its steps are exported one after the other, for a fixed number of steps."
        )
    table = frame.f_locals["custom_translation_table"] or {}
    if backend.is_tracing() or operator not in {known.name() for known in table}:
        raise RuntimeError(
            f"torch.onnx.export has no translation of {operator}. Use rnnfast.onnx.export(model, "
            f"...), or export torch's own layers: rnnfast.restore(model) undoes "
            f"rnnfast.accelerate(model), and rnnfast.use_backend('aten') runs torch's kernels."
        )


def _translation(cell: Cell) -> Callable[..., Any]:
    """Returns the function that translates a call of ``cell``'s operator to ONNX nodes."""
    from onnxscript import opset18 as op

    node = NODES[cell.name]
    operator = getattr(op, node.operator)

    def translate(x: Any, *arguments: Any) -> Any:
        states, arguments = arguments[: cell.states], arguments[cell.states :]
        # torch omits trailing arguments that have their default values
        w_ih, w_hh, b_ih, b_hh, reverse, *rest = arguments
        lengths, reset, w_hr = (*rest[2:], None, None, None)[:3]  # after what to save
        if reset is not None or w_hr is not None:
            raise NotImplementedError("ONNX's recurrent nodes have no reset and no projection")
        hidden = w_hh.shape[1]

        def ordered(weight: Any) -> Any:
            """Reorders gate blocks (G*H, ...) from torch's order to ONNX's (1, G*H, ...)."""
            columns = weight.shape[1:]
            blocks = op.Reshape(weight, _ints(cell.gates, hidden, *columns))
            blocks = op.Gather(blocks, _ints(*node.order), axis=0)
            return op.Reshape(blocks, _ints(1, cell.gates * hidden, *columns))

        # Outputs saved for the backward are omitted, since no ONNX graph reads them.
        return recurrent_node(
            operator,
            x,
            [ordered(w_ih), ordered(w_hh)],
            None if b_ih is None else op.Concat(ordered(b_ih), ordered(b_hh), axis=1),
            lengths,
            states,
            hidden_size=hidden,
            reverse=reverse,
            **node.attributes,
        )

    return translate


def recurrent_node(
    operator: Callable[..., Any],
    x: Any,
    weights: Sequence[Any],
    bias: Any,
    lengths: Any,
    states: Sequence[Any],
    *more: Any,
    hidden_size: int,
    reverse: bool,
    **attributes: Any,
) -> list[Any]:
    """Adds a node for a layer in one direction, with all but x and states in ONNX's order.

    Args:
        operator: Which node.
        x: (T, B, I).
        weights: Those of the input and of the state.
        bias: Both biases in one, or None.
        lengths: (B), or None.
        states: The initial states, (B, H).
        more: The inputs of the node that follow the states.
        hidden_size: H.
        reverse: Whether the layer reads x from its end.
        attributes: The other attributes of the node.

    Returns:
        y (T, B, H) and the final states (B, H).
    """
    from onnxscript import INT32
    from onnxscript import opset18 as op

    y, *finals = operator(
        x,
        *weights,
        bias,
        None if lengths is None else op.Cast(lengths, to=INT32.dtype),
        *(op.Unsqueeze(state, _ints(0)) for state in states),
        *more,
        hidden_size=hidden_size,
        direction="reverse" if reverse else "forward",
        **attributes,
    )
    return [op.Squeeze(y, _ints(1)), *(op.Squeeze(final, _ints(0)) for final in finals)]


def _ints(*values: int) -> Any:
    from onnxscript import opset18 as op

    return op.Constant(value_ints=values)


def _fold_weights(program: torch.onnx.ONNXProgram) -> None:
    """Folds what `_translation` does to weights into constants, however large they are."""
    from onnxscript import optimizer

    optimizer.fold_constants(
        program.model,
        output_size_limit=sys.maxsize,
        should_fold=lambda node: node.op_type in ("Reshape", "Gather", "Concat"),
    )
    optimizer.remove_unused_nodes(program.model)
