"""Fused CPU and CUDA kernels for recurrent networks, behind drop-in replacements of torch.nn's.

Modules that ``import rnnfast`` does not need, such as ``rnnfast.models``, are imported when they
are first used.
"""

__version__ = "0.1.0"  # pyproject.toml reads it here

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import backend, functional, reference
from .acceleration import accelerate, restore
from .backend import doctor, release_memory, use_backend
from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .patching import patch, unpatch

if TYPE_CHECKING:
    from . import cli as cli
    from . import custom as custom
    from . import explain as explain
    from . import frozen as frozen
    from . import generation as generation
    from . import models as models
    from . import onnx as onnx
    from . import text as text
    from .custom import Layer as Layer
    from .custom import LayerCell as LayerCell
    from .custom import cell as cell
    from .frozen import Stream as Stream
    from .frozen import StreamBatch as StreamBatch
    from .frozen import freeze as freeze
    from .frozen import quantize_error as quantize_error
else:  # hidden from type checkers, which would take any name for a module
    _IMPORTED_WHEN_USED = (
        "cli",
        "custom",
        "explain",
        "frozen",
        "generation",
        "models",
        "onnx",
        "text",
    )
    _MODULE_OF = {
        **dict.fromkeys(("Stream", "StreamBatch", "freeze", "quantize_error"), "frozen"),
        **dict.fromkeys(("Layer", "LayerCell", "cell"), "custom"),
    }

    def __getattr__(name: str) -> Any:
        if name in _IMPORTED_WHEN_USED:
            return import_module(f"{__name__}.{name}")
        if name in _MODULE_OF:
            return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *_IMPORTED_WHEN_USED, *_MODULE_OF})


__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "Layer",
    "LayerCell",
    "RNNCell",
    "Stream",
    "StreamBatch",
    "accelerate",
    "backend",
    "cell",
    "custom",
    "doctor",
    "freeze",
    "frozen",
    "functional",
    "patch",
    "quantize_error",
    "reference",
    "release_memory",
    "restore",
    "unpatch",
    "use_backend",
]
