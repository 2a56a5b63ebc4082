"""Reads modules that ``torch.ao.quantization.quantize_dynamic`` has quantized.

Their weights are integers of 8 bits with scales, or float16, packed for torch's kernels. Frozen
modules take them as they are, without rounding them again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .weights import Weights

_MODULE = "torch.ao.nn.quantized.dynamic.modules.rnn"
_FLOAT_CLASSES: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
}


def float_class_of(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch.nn that a dynamically quantized module was made of; None for others."""
    kind = type(module)
    return _FLOAT_CLASSES.get(kind.__name__) if kind.__module__ == _MODULE else None


def read(module: Any, float_class: type[nn.Module]) -> tuple[nn.Module, dict[str, Weights]]:
    """Reads a dynamically quantized module.

    Returns:
        The module of torch.nn of the same sizes, without memory, and the weights by the names of
        its parameters: int8 with a scale for each row, or float16.

    Raises:
        ValueError: The weights cannot be read, or have zero points.
    """
    try:
        weights, biases = module.get_weight(), module.get_bias()
    except Exception as error:  # how they are packed is torch's own business
        raise ValueError(f"its packed weights cannot be read: {error}") from error
    found = {
        name: _unquantized(name, weight, biases[name.replace("weight", "bias")])
        for name, weight in weights.items()
    }
    bias = any(each.bias is not None for each in found.values())
    sizes = module.input_size, module.hidden_size
    options: dict[str, Any] = {"bias": bias, "device": "meta"}
    if issubclass(float_class, nn.RNNBase):
        for name in ("num_layers", "batch_first", "bidirectional"):
            options[name] = getattr(module, name)
    elif float_class is nn.RNNCell:
        options["nonlinearity"] = module.nonlinearity
    return float_class(*sizes, **options), found


def _unquantized(name: str, weight: Tensor, bias: Tensor | None) -> Weights:
    if not weight.is_quantized:  # float16, which torch unpacks to float32
        return Weights(weight.half(), None, bias).on_cpu()
    if weight.qscheme() is torch.per_tensor_affine:
        zero_points = torch.tensor([weight.q_zero_point()])
        scale = torch.full(weight.shape[:1], weight.q_scale())
    else:
        zero_points = weight.q_per_channel_zero_points()
        scale = weight.q_per_channel_scales()
    if zero_points.any():
        raise ValueError(
            f"{name} has zero points other than 0, and frozen integers have none: quantize with "
            "a symmetric qscheme, such as torch.per_tensor_symmetric"
        )
    return Weights(weight.int_repr(), scale, bias).on_cpu()
