"""Modules for inference, whose weights are packed, and maybe rounded, once.

`rnnfast.freeze` makes them. A call of the other modules packs the weights into the order in which
the kernels read them, since the parameters may have changed since the last call. A frozen module
has packed its weights before. It may store them in a shorter type: bfloat16, float16 or int8.
"""

from .freezing import ErrorTable, LayerError, freeze, quantize_error
from .modules import FrozenCell, FrozenLayers
from .stream import Stream
from .stream_batch import StreamBatch
from .weights import TYPES, Frozen, Weights

__all__ = [
    "TYPES",
    "ErrorTable",
    "Frozen",
    "FrozenCell",
    "FrozenLayers",
    "LayerError",
    "Stream",
    "StreamBatch",
    "Weights",
    "freeze",
    "quantize_error",
]
