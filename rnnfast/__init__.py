"""Fused CPU and CUDA kernels for recurrent networks, behind drop-in replacements of torch.nn's."""

from . import backend, functional, reference
from .backend import doctor, use_backend
from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "backend",
    "doctor",
    "functional",
    "reference",
    "use_backend",
]
