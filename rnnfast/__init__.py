"""Fused CPU and CUDA kernels for recurrent networks, behind drop-in replacements of torch.nn's."""

from . import backend, explain, functional, reference
from .acceleration import accelerate, restore
from .backend import doctor, release_memory, use_backend
from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "accelerate",
    "backend",
    "doctor",
    "explain",
    "functional",
    "reference",
    "release_memory",
    "restore",
    "use_backend",
]
