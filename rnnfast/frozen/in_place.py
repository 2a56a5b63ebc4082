"""Freezes the recurrent modules of a model in place, and puts the float modules back.

`rnnfast.accelerate` and `rnnfast.restore` are built on this. A frozen module is a new object, since
it has no parameters: it takes the place of the float module in every module that holds that one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import nn

from ..acceleration import reason_if_foreign
from .freezing import freeze_one, is_recurrent, types_of
from .weights import Frozen

_Places = dict[int, list[tuple[nn.Module, str]]]
"""Where a module is held, by its id: the modules that hold it, and its name in them."""


class Outcome(NamedTuple):
    """What was done, by the names of ``module.named_modules()``."""

    replaced: dict[str, Frozen]
    """The frozen modules that are in the tree now."""
    left: dict[str, str]
    """Why a recurrent module was left as it is."""


def freeze_in_place(
    module: nn.Module, weights: str | Mapping[str, str], keep_float: bool
) -> Outcome:
    """Replaces the recurrent modules of a tree by frozen ones; see `rnnfast.accelerate`.

    Raises:
        ValueError: The root is recurrent, or ``weights`` are not as for `freeze`.
        RuntimeError: The compiled kernels are missing.
    """
    if is_recurrent(module):
        raise ValueError(
            f"{type(module).__name__} is the root and recurrent itself: it cannot be replaced in "
            "place, since no module holds it. rnnfast.freeze(module, weights=...) returns a frozen "
            "copy"
        )
    found = dict(module.named_modules())
    types = types_of([name for name, each in found.items() if is_recurrent(each)], weights)
    places = _places_of(module, is_recurrent)
    replaced: dict[str, Frozen] = {}
    left: dict[str, str] = {}
    for name in list(found):
        each = found.pop(name)  # its memory is free as soon as it is replaced
        if isinstance(each, Frozen):
            left[name] = f"is frozen already, with weights={each.weights!r}"
        elif name in types:
            try:
                frozen = freeze_one(each, types[name])
            except ValueError as error:
                left[name] = f"cannot be frozen: {error}"
                continue
            frozen.train(each.training)
            if keep_float:
                frozen.replaced = (each,)
            _replace(places[id(each)], frozen)
            replaced[name] = frozen
        elif reason := reason_if_foreign(each, type(each)):
            left[name] = reason
    return Outcome(replaced, left)


def put_back(module: nn.Module) -> Outcome:
    """Replaces frozen modules of a tree by the float modules that they keep."""
    places = _places_of(module, lambda each: isinstance(each, Frozen))
    replaced: dict[str, Frozen] = {}
    left: dict[str, str] = {}
    for name, each in list(module.named_modules()):
        if not isinstance(each, Frozen):
            continue
        if not each.replaced:
            left[name] = "is frozen, and its float module was not kept"
        elif each is module:
            left[name] = "is frozen and the root: restore the model that holds it"
        else:
            (before,) = each.replaced
            _replace(places[id(each)], before.train(each.training))
            replaced[name] = each
    return Outcome(replaced, left)


def _places_of(root: nn.Module, wanted: Callable[[nn.Module], bool]) -> _Places:
    places: _Places = {}
    for parent in root.modules():
        for name, child in parent._modules.items():
            if child is not None and wanted(child):
                places.setdefault(id(child), []).append((parent, name))
    return places


def _replace(places: list[tuple[nn.Module, str]], new: nn.Module) -> None:
    for parent, name in places:
        parent._modules[name] = new
