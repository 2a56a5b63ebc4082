"""Turns the recurrent modules of a model that is already built into this package's, and back.

The modules are not rebuilt: their ``__class__`` is changed. All that torch and the model know of a
module then stays, for it is the same object: parameters, buffers, hooks, parametrizations, names,
ties, and references from optimisers, lists and closures. What the classes here keep that torch.nn's
lack are their keyword-only arguments (``backend``).

``isinstance(module, torch.nn.LSTM)`` is false afterwards, as the classes here derive from
torch.nn.RNNBase and RNNCellBase only.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell, _Backed, _check_backend

_OURS: dict[type[nn.Module], type[_Backed]] = {
    kind.torch_class: kind for kind in (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell)
}
_THEIRS: dict[type[nn.Module], type[nn.Module]] = {ours: theirs for theirs, ours in _OURS.items()}
_NAMES = frozenset(kind.__name__ for kind in _OURS)
_MARK = "_accelerated"
"""The attribute of the modules that `accelerate` replaced; copies and pickles carry it along."""


class Report(NamedTuple):
    """What was done to a module tree; ``print`` shows a line for each recurrent module.

    Names are those of ``module.named_modules()``, of which the root's is empty.
    """

    module: nn.Module
    """The tree, which was changed in place."""
    replaced: dict[str, str]
    """Name of each module that was replaced -> name of its class, the same in both packages."""
    left: dict[str, str]
    """Name of each recurrent module that was left as it is -> why."""

    def __str__(self) -> str:
        rows = [("replaced", *row) for row in self.replaced.items()]
        rows += [("left", *row) for row in self.left.items()]
        if not rows:
            return "no recurrent modules"
        width = max(len(name or "(root)") for _, name, _ in rows)
        return "\n".join(f"{a:<8}  {name or '(root)':<{width}}  {b}" for a, name, b in rows)


def accelerate(module: nn.Module, *, backend: str | None = None) -> Report:
    """Replaces every RNN, LSTM, GRU and cell of torch.nn in a module tree, in place.

    Only torch.nn's own classes are replaced: not subclasses, quantized modules, ScriptModules and
    modules with methods set on the instance, whose behaviour may be another. What is not registered
    as a submodule is not found. Code that asks whether a module is a torch.nn.LSTM (initialisation,
    quantization) has to run before this, or after `restore`, and so has torch.jit.script.

    Calling it again is harmless; what it replaced before is reported as replaced, and gets the
    ``backend`` of this call.

    Args:
        module: The root, which may itself be replaced.
        backend: For all modules replaced: None, or the backend to force; see `rnnfast.backend`.

    Returns:
        The report; its ``module`` is the argument.

    Raises:
        ValueError: Unknown ``backend``.
    """
    backend = _check_backend(backend)
    replaced: dict[str, str] = {}
    left: dict[str, str] = {}
    for name, each in module.named_modules():
        kind = parametrize.type_before_parametrizations(each)
        if _MARK not in vars(each):
            if reason := _reason_to_leave(each, kind):
                left[name] = reason
                continue
            if kind not in _OURS:
                continue
            _change_class(each, _OURS[kind])
            vars(each).update({**_additions(_OURS[kind]), _MARK: True})
        vars(each)["backend"] = backend
        replaced[name] = kind.__name__
    return Report(module, replaced, left)


def restore(module: nn.Module) -> Report:
    """Undoes `accelerate`: what it replaced in a module tree is torch.nn's again, in place.

    Args:
        module: The root of a tree that was accelerated, or of a part or a copy of one.

    Returns:
        The report; what was built as rnnfast's is among what was left.
    """
    replaced: dict[str, str] = {}
    left: dict[str, str] = {}
    for name, each in module.named_modules():
        kind = parametrize.type_before_parametrizations(each)
        if _MARK not in vars(each):
            if isinstance(each, _Backed):
                left[name] = "was not torch.nn's before"
        elif kind not in _THEIRS:
            left[name] = f"its class is {_path(kind)} by now"
        elif own := _own_methods(each):
            left[name] = own
        else:
            _change_class(each, _THEIRS[kind])
            for attribute in (_MARK, *_additions(kind)):
                vars(each).pop(attribute, None)  # a pickle of an older version may lack some
            replaced[name] = kind.__name__
    return Report(module, replaced, left)


def _reason_to_leave(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why ``module`` of class ``kind`` is not replaced; None if it is or is not recurrent."""
    if isinstance(module, torch.jit.ScriptModule):
        return "is compiled by TorchScript" if module.original_name in _NAMES else None
    if isinstance(module, _Backed):
        return "is rnnfast's already"
    if kind in _OURS:
        clashes = [name for name in _additions(_OURS[kind]) if name in vars(module)]
        return f"has an attribute {clashes[0]}" if clashes else _own_methods(module)
    for theirs in _OURS:
        if issubclass(kind, theirs):
            return f"{_path(kind)} is a subclass of torch.nn.{theirs.__name__}"
    quantized = kind.__module__.startswith("torch.ao.") and kind.__name__ in _NAMES
    if quantized or issubclass(kind, (nn.RNNBase, nn.RNNCellBase)):
        return f"{_path(kind)} is not of torch.nn"
    return None


def _additions(kind: type[nn.Module]) -> dict[str, Any]:
    """The attributes that the modules of our class ``kind`` have and torch.nn's have not."""
    arguments = inspect.signature(kind).parameters.values()
    return {each.name: each.default for each in arguments if each.kind is each.KEYWORD_ONLY}


def _own_methods(module: nn.Module) -> str | None:
    """Says which methods were set on the instance; they may rely on the class that it has.

    But for flatten_parameters: weight-drop layers empty it so, and nothing here needs it.
    """
    names = [name for name in vars(module) if callable(getattr(type(module), name, None))]
    names = [name for name in names if name != "flatten_parameters"]
    return f"has its own {', '.join(names)}, set on the instance" if names else None


def _path(kind: type[nn.Module]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _change_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Makes ``module`` a ``kind``.

    A parametrized module has a class of its own, derived from the former one and holding the
    properties that compute its parameters. Copies of the module share it: a new one is made.
    """
    if parametrize.is_parametrized(module):
        own = type(module)
        kind = type(own.__name__, (kind,), dict(vars(own)))
    module.__class__ = kind
