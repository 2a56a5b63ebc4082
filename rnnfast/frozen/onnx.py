"""Frozen layers as nodes of ONNX.

Float weights, rounded or not, go into ONNX's own LSTM, GRU and RNN. ONNX has no such node for int8,
but ONNX Runtime has one for the LSTM: com.microsoft.DynamicQuantizeLSTM. It takes the integers of a
frozen layer and the scales of their rows. It rounds inputs and states to 8 bits in every step.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..onnx import NODES, recurrent_node
from .weights import unpack


def translate(
    cell: str,
    x: Any,
    h0: Any,
    c0: Any,
    w_ih: Any,
    w_hh: Any,
    w_hr: Any,
    reverse: bool,
    lengths: Any = None,
    reset: Any = None,
) -> list[Any]:
    """Translates a call of ``rnnfast::frozen_layer`` to ONNX nodes.

    Raises:
        NotImplementedError: There are no nodes for it.
    """
    from onnxscript import ir, opset18

    if reset is not None or w_hr is not None:
        raise NotImplementedError("ONNX's recurrent nodes have no reset and no projection")
    node = NODES[cell]
    matrices = [unpack(_data_of(value)) for value in (w_ih, w_hh)]
    gates, hidden = len(node.order), matrices[1].weight.shape[1]
    if x.dtype == ir.DataType.INT64:  # tokens: no node reads a table
        x = _one_hot(x, matrices[0].weight.shape[1])

    def ordered(rows: Tensor) -> Tensor:
        """Reorders gate blocks (G*H, ...) from torch's order to ONNX's (1, G*H, ...)."""
        blocks = rows.unflatten(0, (gates, hidden))
        return blocks[list(node.order)].flatten(0, 1).unsqueeze(0)

    biases = [ordered(each.bias) for each in matrices if each.bias is not None]
    scales = [ordered(each.scale) for each in matrices if each.scale is not None]
    if scales and cell != "lstm":
        raise NotImplementedError(
            f"ONNX Runtime has no node for int8 weights of {node.operator}, only of LSTM: freeze "
            "the model with weights='float32', or export it unfrozen"
        )
    if scales:
        operator, attributes = _dynamic_quantize_lstm(), {}
        weights = [_constant(ordered(each.weight).transpose(1, 2)) for each in matrices]
        zero_points = _constant(torch.zeros_like(scales[0], dtype=torch.int8))
        no_peepholes = None
        more = [no_peepholes, *(v for s in scales for v in (_constant(s), zero_points))]
    else:
        operator, attributes = getattr(opset18, node.operator), node.attributes
        weights = [_constant(ordered(each.weight.float())) for each in matrices]
        more = []
    y, *finals = recurrent_node(
        operator,
        x,
        weights,
        _constant(torch.cat(biases, 1)) if biases else None,
        lengths,
        [h0] if c0 is None else [h0, c0],
        *more,
        hidden_size=hidden,
        reverse=reverse,
        **attributes,
    )
    return [y, *finals, *([_constant(torch.empty(0))] if c0 is None else [])]


def _one_hot(tokens: Any, count: int) -> Any:
    """Vectors (T, B, V) of float32 in place of tokens (T, B, 1)."""
    from onnxscript import opset18

    zero_and_one = _constant(torch.tensor([0.0, 1.0]))
    last: Any = opset18.Constant(value_ints=[-1])
    return opset18.OneHot(
        opset18.Squeeze(tokens, last), _constant(torch.tensor(count)), zero_and_one, axis=-1
    )


def _constant(values: Tensor) -> Any:
    from onnxscript import ir, opset18

    tensor: Any = ir.tensor(values.contiguous().numpy())
    return opset18.Constant(value=tensor)


def _data_of(value: Any) -> Tensor:
    """The tensor behind a value of the graph, which the exporter adds only after translating.

    Raises:
        NotImplementedError: It is none of the tensors that the exported program holds.
    """
    program = _program_being_translated()
    signature = program.graph_signature
    names = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    tensors = {**program.constants, **dict(program.named_buffers())}
    found = tensors.get(names.get(value.name, ""))
    if not isinstance(found, Tensor):
        raise NotImplementedError(
            "the weights of a frozen layer are no constants here, as in a branch of torch.cond"
        )
    return found


def _program_being_translated() -> ExportedProgram:
    """The program that torch.onnx.export translates: it is in a frame of the exporter alone."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        for value in frame.f_locals.values():
            if isinstance(value, ExportedProgram):
                return value
    raise NotImplementedError("frozen layers are translated within torch.onnx.export alone")


@cache
def _dynamic_quantize_lstm() -> Any:
    """ONNX Runtime's operator, of which onnx has no schema."""
    from onnx.defs import OpSchema
    from onnxscript import values

    optional = OpSchema.FormalParameterOption.Optional
    types = {"T": "tensor(float)", "T1": "tensor(int32)", "T2": "tensor(int8)"}
    inputs = [
        OpSchema.FormalParameter(name, kind, param_option=option)
        for name, kind, *options in (
            ("X", "T"),
            ("W", "T2"),
            ("R", "T2"),
            ("B", "T", optional),
            ("sequence_lens", "T1", optional),
            ("initial_h", "T", optional),
            ("initial_c", "T", optional),
            ("P", "T", optional),
            ("W_scale", "T"),
            ("W_zero_point", "T2"),
            ("R_scale", "T"),
            ("R_zero_point", "T2"),
        )
        for option in (options or [OpSchema.FormalParameterOption.Single])
    ]
    schema = OpSchema(
        "DynamicQuantizeLSTM",
        "com.microsoft",
        1,
        inputs=inputs,
        outputs=[OpSchema.FormalParameter(name, "T") for name in ("Y", "Y_h", "Y_c")],
        type_constraints=[(name, [type_name], "") for name, type_name in types.items()],
        attributes=[
            OpSchema.Attribute("hidden_size", OpSchema.AttrType.INT, ""),
            OpSchema.Attribute("direction", OpSchema.AttrType.STRING, ""),
        ],
    )
    return values.Op(values.Opset("com.microsoft", 1), schema.name, schema)
