"""Recurrent cells that users write in PyTorch, turned into fused kernels."""

from .build import CACHE_VARIABLE, cache_folder
from .cells import CellError, CustomCell, cell
from .modules import Layer, LayerCell

__all__ = [
    "CACHE_VARIABLE",
    "CellError",
    "CustomCell",
    "Layer",
    "LayerCell",
    "cache_folder",
    "cell",
]
