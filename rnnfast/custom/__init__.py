"""Recurrent cells that users write in PyTorch, turned into fused kernels."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .build import CACHE_VARIABLE, cache_folder
from .cells import CellError, CustomCell, cell
from .modules import Layer, LayerCell

if TYPE_CHECKING:
    from . import library as library
else:  # hidden from type checkers, which would take any name for a module

    def __getattr__(name: str) -> Any:
        if name == "library":  # imported when it is used
            return import_module(f"{__name__}.library")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CACHE_VARIABLE",
    "CellError",
    "CustomCell",
    "Layer",
    "LayerCell",
    "cache_folder",
    "cell",
    "library",
]
