"""Loads the compiled module ``rnnfast._C``, unless it was built with another torch.

torch's C++ interface changes from one minor version to the next. A module that was built with
another one fails with an undefined symbol, or loads and misreads torch's objects. So ``setup.py``
writes the version of torch into a JSON file beside the module, and `load` reads that first.
"""

from __future__ import annotations

import json
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

NAME = "rnnfast._C"


class TorchMismatchError(ImportError):
    """The compiled module was built with another minor version of torch than is installed."""


def built_with() -> str | None:
    """The version of torch that the compiled module was built with, None if nothing tells it."""
    spec = find_spec(NAME)
    if spec is None or spec.origin is None:
        return None
    facts = Path(spec.origin).with_suffix(".json")
    try:
        version: str = json.loads(facts.read_text(encoding="utf-8"))["torch"]
    except (OSError, ValueError, KeyError, TypeError):  # the module was copied without it
        return None
    return version


def load() -> tuple[ModuleType | None, ImportError | None]:
    """Imports the compiled module.

    A module that was built with another torch is reported by a warning, which shows the line that
    imports rnnfast. A module that is missing is reported later, by the first call that needs it.

    Returns:
        The module and None, or None and the reason why it cannot be used.
    """
    built, installed = built_with(), torch.__version__
    if built is not None and _minor(built) != _minor(installed):
        cause = f"rnnfast was built with torch {built}, but torch {installed} is installed"
        warnings.warn(
            f"{cause}. torch's own kernels run in place of rnnfast's. To build rnnfast for this "
            "torch, type `pip install --no-build-isolation .` in its source folder. To install the "
            f"torch that it was built with, type `pip install 'torch=={_minor(built)}.*'`.",
            stacklevel=4,  # load, backend.py and __init__.py come before the importing line
        )
        return None, TorchMismatchError(cause)
    try:
        return import_module(NAME), None
    except ImportError as error:
        return None, error


def _minor(version: str) -> str:
    """The major and minor version: "2.13" for "2.13.0+cpu"."""
    return ".".join(version.split(".")[:2])
