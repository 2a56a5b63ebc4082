"""Speeds up torch.nn's recurrent modules without changing them: their ``forward`` is exchanged.

`patch` puts a function of ours in the place of ``forward`` in the classes torch.nn.RNN, LSTM, GRU,
RNNCell, LSTMCell and GRUCell. Calls that it can serve are run by a module of ours that shares the
attributes of torch.nn's, all others by torch.nn's own ``forward``.
"""

from __future__ import annotations

import functools
import operator
import sys
import warnings
from types import FunctionType, TracebackType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import backend
from .acceleration import _OURS, ADDITIONS, CALLED_BY_FORWARD, is_overridden
from .bases import CELL_WEIGHTS, Backed

_PLAIN = frozenset({Tensor, nn.Parameter})
_PLAIN_OR_NONE = _PLAIN | {type(None)}
_set = object.__setattr__  # without nn.Module's search for parameters
_enabled = False
_exchanged: dict[type[nn.Module], Any] = {}
"""The classes whose ``forward`` `patch` has exchanged, and what it has put there."""


class Patch:
    """What `patch` returns: a context manager, at whose end all is as it was before the call."""

    def __init__(self, before: bool) -> None:
        self._before = before

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._before:
            unpatch()


def patch() -> Patch:
    """Speeds up every RNN, LSTM, GRU and cell of torch.nn in the process.

    Modules that exist, and modules that any library makes later, run on this package's kernels.
    Their classes, attributes and pickles stay torch.nn's. Subclasses run on them too, if they
    inherit ``forward`` or call it.

    Results are those of torch.nn, up to rounding. These calls still run torch.nn's own ``forward``:
    malformed calls, devices without kernels, subclasses of Tensor, autocast, torch.func transforms
    and forward-mode AD, FakeTensorMode and other modes, torch.compile, torch.export,
    torch.jit.trace and script. `rnnfast.use_backend` and ``RNNFAST_BACKEND`` apply.

    A plain call counts until `unpatch`, in all threads. Calling it again changes nothing.

    Returns:
        A context manager. At its end the process is as it was before this call.

    Warns:
        UserWarning: Another package has exchanged the ``forward`` of a class. It is left as it is.

    Example:
        >>> lstm, x = torch.nn.LSTM(10, 20), torch.randn(5, 3, 10)
        >>> expected, _ = lstm(x)
        >>> with rnnfast.patch():
        ...     output, _ = lstm(x)
        >>> torch.allclose(output, expected, atol=1e-5)
        True
    """
    global _enabled
    before, _enabled = _enabled, True
    for theirs in _OURS:
        found = vars(theirs)["forward"]
        if _is_of_torch(found, theirs):
            _exchanged[theirs] = theirs.forward = _replacement(theirs, found)
        elif theirs not in _exchanged:
            warnings.warn(
                f"rnnfast.patch leaves torch.nn.{theirs.__name__} as it is, because its forward "
                f"has been exchanged for {found.__module__}.{found.__qualname__}",
                stacklevel=2,
            )
    return Patch(before)


def unpatch() -> None:
    """Undoes `patch`, however often that was called.

    Example:
        >>> _ = rnnfast.patch()  # all modules of torch.nn are fast from here
        >>> rnnfast.unpatch()  # to here
    """
    global _enabled
    _enabled = False  # switches off replacements that another package has wrapped
    for theirs, ours in list(_exchanged.items()):
        if vars(theirs)["forward"] is ours:
            theirs.forward = _exchanged.pop(theirs).__wrapped__


def _is_of_torch(forward: Any, theirs: type[nn.Module]) -> bool:
    own_globals = getattr(forward, "__globals__", None) is vars(sys.modules[theirs.__module__])
    return own_globals and not hasattr(forward, "__wrapped__")


def _replacement(theirs: type[nn.Module], original: Any) -> Any:
    """Returns the function that replaces ``original``, the ``forward`` of a class."""
    stand_in = _stand_in(theirs, original)

    def forward(self: Any, input: Any, hx: Any = None) -> Any:
        served = serve(stand_in, self, input, hx)
        return original(self, input, hx) if served is None else served

    # TorchScript compiles the source of the wrapped function with the globals of the wrapper, so
    # the wrapper needs torch.nn's globals.
    serve = _serve
    own = FunctionType(
        forward.__code__, original.__globals__, None, forward.__defaults__, forward.__closure__
    )
    return functools.wraps(original)(own)


class _StandIn(NamedTuple):
    """Runs the calls of one class of torch.nn."""

    theirs: type[nn.Module]
    kind: Any
    """A subclass of rnnfast's class. Its instances share a module's attributes during a call."""
    reserved: frozenset[str]
    """Names that must not be set on the instance: methods of torch.nn, attributes of rnnfast."""
    weights: frozenset[type]
    """The types that weights and biases may have; a cell's may be None."""


def _stand_in(theirs: type[nn.Module], original: Any) -> _StandIn:
    ours = _OURS[theirs]

    def read(self: Any, names: list[str]) -> Any:
        return self._weights

    def forward_in_torch(self: Any, input: Any, hx: Any, reason: str) -> Any:
        return original(self._of, input, hx)

    own = {"__slots__": ("_of", "_weights"), "_read": read, "_forward_in_torch": forward_in_torch}
    reserved = CALLED_BY_FORWARD[theirs] - {"_flat_weights"}
    return _StandIn(
        theirs,
        type(ours.__name__, (ours,), own),
        reserved.union(ADDITIONS[theirs]),
        _PLAIN if issubclass(theirs, nn.RNNBase) else _PLAIN_OR_NONE,
    )


def _serve(stand_in: _StandIn, module: Any, input: Any, hx: Any) -> Any:
    """Returns the result of a call, or None if torch.nn's own ``forward`` must run."""
    if torch.compiler.is_compiling() or not _enabled or _is_watched():
        return None
    theirs, kind, reserved, weight_types = stand_in
    attributes = vars(module)
    if not _is_ordinary(type(module), theirs) or not attributes.keys().isdisjoint(reserved):
        return None
    data = input[0] if type(input) is PackedSequence else input
    states = hx if type(hx) in (tuple, list) else (hx,)
    weights = _weights(module, attributes["_parameters"])
    if type(data) not in _PLAIN or not _PLAIN_OR_NONE.issuperset(map(type, states)):
        return None
    if not weight_types.issuperset(map(type, weights)):
        return None
    name = backend.choose(None, data)
    if name == "aten" or (name == "reference" and backend.transforms_active()):
        return None
    own = kind.__new__(kind)
    _set(own, "__dict__", attributes)
    _set(own, "_of", module)
    _set(own, "_weights", weights)
    result = kind.forward(own, input, hx)
    return _changeable(result) if issubclass(kind, nn.RNNBase) else result


def _is_watched() -> bool:
    """Whether a mode, autocast or tracing is active that observes or changes torch.nn's calls."""
    return (
        backend.is_tracing()
        or torch._C._is_any_autocast_enabled()  # torch.nn's results then have other dtypes
        or torch._C._len_torch_dispatch_stack() > 0
        or (torch._C._len_torch_function_stack() > 0 and not _has_device_only())
    )


def _has_device_only() -> bool:
    """Whether the only mode is that of torch.set_default_device, which has no effect on rnnfast."""
    from torch.utils._device import DeviceContext  # already imported if a mode is active

    modes = range(torch._C._len_torch_function_stack())
    return all(type(torch._C._get_function_stack_at(k)) is DeviceContext for k in modes)


_ordinary: WeakKeyDictionary[type, bool] = WeakKeyDictionary()
"""For each subclass seen so far: whether it computes what torch.nn's class computes."""


def _is_ordinary(kind: type, theirs: type[nn.Module]) -> bool:
    if kind is theirs:
        return True
    if kind not in _ordinary:
        called = CALLED_BY_FORWARD[theirs]
        _ordinary[kind] = (
            issubclass(kind, theirs)
            and not issubclass(kind, Backed)
            and not any(is_overridden(kind, theirs, name) for name in called)
        )
    return _ordinary[kind]


def _weights(module: Any, parameters: dict[str, Any]) -> list[Any]:
    """Returns the weights and biases that torch.nn's own ``forward`` would use."""
    if not isinstance(module, nn.RNNBase):
        try:
            return [parameters[name] for name in CELL_WEIGHTS]
        except KeyError:
            return [getattr(module, name) for name in CELL_WEIGHTS]
    named = map(parameters.get, module._flat_weights_names)
    if not all(map(operator.is_, named, module._flat_weights)):
        module._update_flat_weights()
    return module._flat_weights


def _changeable(result: Any) -> Any:
    """Copies the output, since the backward has saved the original.

    So the output may be changed in place before the backward, like that of torch.nn.
    """
    output, *rest = result
    data = output.data if isinstance(output, PackedSequence) else output
    if not data.requires_grad:
        return result
    if data is not output:
        return output._replace(data=data.clone()), *rest
    return data.clone(), *rest
