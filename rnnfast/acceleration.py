"""Replaces the recurrent modules of an existing model by this package's, and undoes it.

The modules are not rebuilt: their ``__class__`` is changed. Each module stays the same object, with
its parameters, buffers, hooks, parametrizations, names and ties. References from optimisers, lists
and closures stay valid. The only new attributes are the keyword-only arguments of the classes here,
such as ``backend``.

By default a torch.nn.LSTM becomes a `rnnfast.LSTM`. torch.compile can compile that, and
``isinstance(module, torch.nn.LSTM)`` is false. With ``keep_class`` its new class is derived from
its former one, so that ``isinstance`` stays true. Subclasses of torch.nn's classes can then be
replaced, too. `rnnfast.patching` speeds up modules without changing them.

With ``weights`` modules are frozen, as by `rnnfast.freeze`. A frozen module has no parameters, so
it is a new object in the place of the old one: `rnnfast.frozen.in_place` does that.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.nn.utils import parametrize

from .bases import Backed, check_backend
from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

_OURS: dict[type[nn.Module], type[Backed]] = {
    kind.torch_class: kind for kind in (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell)
}
_THEIRS: dict[type[nn.Module], type[nn.Module]] = {ours: theirs for theirs, ours in _OURS.items()}
_NAMES = frozenset(kind.__name__ for kind in _OURS)
_MARK = "_accelerated"
"""The attribute of the modules that `accelerate` replaced; copies and pickles carry it along."""
_FORMER = "_accelerated_from"
"""The attribute of the classes that `_kept` makes: the one that each was made for."""
_kept_classes: WeakValueDictionary[type[nn.Module], type[nn.Module]] = WeakValueDictionary()


class Report(NamedTuple):
    """What was done to a module tree; ``print`` shows a line for each recurrent module.

    Names are those of ``module.named_modules()``, of which the root's is empty.
    """

    module: nn.Module
    """The tree, which was changed in place."""
    replaced: dict[str, str]
    """Name of each module that was replaced -> name of its class, the same before and after.

    If it was frozen, the type of its weights follows, as in "LSTM, int8".
    """
    left: dict[str, str]
    """Name of each recurrent module that was left as it is -> why."""

    def __str__(self) -> str:
        rows = [("replaced", *row) for row in self.replaced.items()]
        rows += [("left", *row) for row in self.left.items()]
        if not rows:
            return "no recurrent modules"
        width = max(len(name or "(root)") for _, name, _ in rows)
        return "\n".join(f"{a:<8}  {name or '(root)':<{width}}  {b}" for a, name, b in rows)


def accelerate(
    module: nn.Module,
    *,
    backend: str | None = None,
    keep_class: bool = False,
    weights: str | Mapping[str, str] | None = None,
    keep_float: bool = False,
) -> Report:
    """Replaces every RNN, LSTM, GRU and cell of torch.nn in a module tree, in place.

    The results of the model stay the same, up to rounding. Quantized modules, ScriptModules and
    modules with methods set on the instance are left as they are, because they may behave
    differently; ``weights`` freeze dynamically quantized ones. Modules that are not registered as
    submodules are not found.

    By default only torch.nn's own classes are replaced, and ``isinstance(module, torch.nn.LSTM)``
    is false afterwards. Code that relies on it (weight initialisation, quantization, TorchRL's
    LSTMModule) has to run before, or ``keep_class`` keeps it true. torch.compile compiles the
    modules without a graph break.

    With ``keep_class`` a module's class becomes one that derives from its former class. Subclasses
    of torch.nn's classes are replaced, too, if they inherit ``forward`` or call it by
    ``super().forward``. torch.compile breaks the graph at such modules, as it does at torch.nn's
    RNN, LSTM and GRU.

    With ``weights`` modules are frozen: they run inference only, with weights that are packed once,
    and maybe rounded. `rnnfast.freeze` does the same to a copy, and explains the types. A frozen
    module is a new object without parameters. It takes the place of the old one under all of its
    names; a list or a closure that holds the old one still does. Modules that cannot be frozen are
    left as they are. Everything else in the model stays as it is: its mode, its parameters, and
    whether they need gradients. Call the model under ``torch.no_grad()``, for frozen modules have
    no gradients.

    torch.jit.script has to run before this, or after `restore`.

    Calling it again is harmless: modules that it replaced before get the ``backend`` and
    ``keep_class`` of this call and are reported again. Frozen modules are left as they are.

    **What undoes it silently.** Code that builds the model again, or puts new layers into it, makes
    layers of torch.nn, and nothing fails. Call ``print(rnnfast.accelerate(model))`` after such a
    step: it replaces them and shows what it did.

    - skorch: ``net.fit`` builds the module anew, and so does ``net.set_params(module__...)``. Call
      ``net.initialize()``, ``accelerate(net.module_)`` and then ``net.partial_fit``, or create the
      net with ``warm_start=True``. ``clone`` and grid search build it anew in any case.
    - Lightning: ``load_from_checkpoint`` builds the model anew. Accelerate the model that it
      returns. ``trainer.fit(model, ckpt_path=...)`` keeps what is there.
    - Stable-Baselines3: ``RecurrentPPO.load`` builds the policy anew. Accelerate ``model.policy``
      after it. ``model.set_parameters`` keeps what is there.
    - TorchRL: ``make_cudnn_based`` puts a torch.nn.LSTM or GRU in the place of those here, but not
      with ``keep_class``, which LSTMModule and GRUModule need anyway. ``make_python_based`` puts
      layers of TorchRL there, which are left as they are.
    - ``torch.ao.quantization.quantize_dynamic`` goes the other way: it takes modules of exactly
      torch.nn's classes and leaves those here in full precision, with ``keep_class``, too. Call
      `restore` first. Quantized modules run on torch's kernels, unless ``weights`` freeze them.

    A model that calls ``rnnfast.accelerate(self)`` at the end of its own ``__init__`` is built
    accelerated. With `rnnfast.patch` torch.nn's own modules are fast, however often they are built.

    Args:
        module: The root, which may itself be replaced, but not frozen.
        backend: For all modules replaced: None, or the backend to force; see `rnnfast.backend`.
        keep_class: Whether modules stay instances of their former classes.
        weights: None, or the type of weights to freeze modules with, as for `rnnfast.freeze`:
            "float32", "bfloat16", "float16" or "int8", or a dict from names of recurrent modules to
            these. Those that it does not name get float32.
        keep_float: Whether frozen modules keep the modules that they replace, so that `restore` can
            put these back, as they were. They need their memory on, but are in neither
            ``parameters()`` nor ``state_dict()``, and ``to()`` and ``load_state_dict()`` do not
            reach them.

    Returns:
        The report: ``module`` is the argument, ``replaced`` and ``left`` name the recurrent modules
        that were and were not replaced. ``print`` shows a line for each of them.

    Raises:
        ValueError: ``backend`` is unknown. A type of ``weights`` is unknown, or a name in them is
            not that of a recurrent module. There are ``weights`` with ``backend`` or with
            ``keep_class``, or for a root that is recurrent itself. There is ``keep_float`` without
            ``weights``.
        RuntimeError: Modules are to be frozen, and the compiled kernels are missing.

    Example:
        >>> model = torch.nn.ModuleDict({"rnn": torch.nn.LSTM(10, 20)})
        >>> print(rnnfast.accelerate(model))
        replaced  rnn  LSTM
        >>> type(model["rnn"])
        <class 'rnnfast.modules.LSTM'>
        >>> print(rnnfast.accelerate(model, weights="int8"))
        replaced  rnn  LSTM, int8
        >>> model["rnn"]
        FrozenLayers(10, 20, weights='int8')
    """
    from .frozen import Frozen
    from .frozen.in_place import freeze_in_place

    backend = check_backend(backend)
    if weights is not None:
        if backend is not None:
            raise ValueError(
                f"weights and backend={backend!r} exclude each other: frozen modules run on the "
                "compiled kernels of the CPU alone"
            )
        if keep_class:
            raise ValueError(
                "weights and keep_class=True exclude each other: a frozen module is no instance of "
                "the class that it replaces"
            )
        frozen, left = freeze_in_place(module, weights, keep_float)
        return Report(
            module,
            {n: f"{each.torch_class.__name__}, {each.weights}" for n, each in frozen.items()},
            left,
        )
    if keep_float:
        raise ValueError("keep_float=True needs weights: nothing else takes floats away")
    replaced: dict[str, str] = {}
    left = {}
    for name, each in module.named_modules():
        if isinstance(each, Frozen):
            left[name] = "is frozen already"
            continue
        kind = parametrize.type_before_parametrizations(each)
        if _MARK in vars(each) and (_FORMER in vars(kind)) is not keep_class:
            _restore(each)
            kind = parametrize.type_before_parametrizations(each)
        if _MARK not in vars(each):
            if reason := _reason_to_leave(each, kind, keep_class):
                left[name] = reason
                continue
            theirs = torch_class_of(kind)
            if theirs is None:
                continue
            _change_class(each, _kept(kind, theirs) if keep_class else _OURS[theirs])
            vars(each)[_MARK] = True
        vars(each)["backend"] = backend
        replaced[name] = _name(kind)
    return Report(module, replaced, left)


def restore(module: nn.Module) -> Report:
    """Undoes `accelerate`, in place: modules that it replaced get their former class back.

    Frozen modules give their place back to the modules that they keep, if they were frozen with
    ``keep_float``. Those have the parameters that they had then.

    Args:
        module: The root of a tree that was accelerated, or of a part or a copy of one.

    Returns:
        The report. Modules that were built as rnnfast's are left as they are, and so are frozen
        ones that keep no other.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.GRU(10, 20))
        >>> _ = rnnfast.accelerate(model)
        >>> print(rnnfast.restore(model))
        replaced  0  GRU
        >>> type(model[0]) is torch.nn.GRU
        True
    """
    from .frozen.in_place import put_back

    put, left = put_back(module)
    replaced: dict[str, str] = {}
    for name, each in module.named_modules():
        if _MARK in vars(each):
            if reason := _restore(each):
                left[name] = reason
            else:
                replaced[name] = _name(parametrize.type_before_parametrizations(each))
        elif name in put:
            replaced[name] = _name(parametrize.type_before_parametrizations(each))
        elif isinstance(each, Backed):
            left[name] = "was not torch.nn's before"
    return Report(module, replaced, left)


def _restore(module: nn.Module) -> str | None:
    """Gives a replaced module its former class again; returns the reason if that is impossible."""
    kind = parametrize.type_before_parametrizations(module)
    former = _THEIRS.get(kind) or vars(kind).get(_FORMER)
    theirs = former and torch_class_of(former)
    if former is None or theirs is None:
        return f"its class is {_path(kind)} by now"
    if own := own_methods(module):
        return own
    for attribute in (_MARK, *ADDITIONS[theirs]):
        vars(module).pop(attribute, None)  # some are class defaults and not on the instance
    _change_class(module, former)
    return None


def _reason_to_leave(module: nn.Module, kind: type[nn.Module], keep_class: bool) -> str | None:
    """Returns why ``module`` is not replaced; None if it can be, or if it is not recurrent."""
    if isinstance(module, Backed):
        return "is rnnfast's already"
    theirs = torch_class_of(kind)
    if theirs is None:
        return reason_if_foreign(module, kind)
    if kind is not theirs:
        if not keep_class:
            return f"{_path(kind)} is a subclass of torch.nn.{theirs.__name__}"
        if reason := _reason_to_leave_class(kind, theirs):
            return reason
    clashes = [name for name in ADDITIONS[theirs] if name in vars(module)]
    return f"has an attribute {clashes[0]}" if clashes else own_methods(module)


def reason_if_foreign(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Returns why a recurrent module of other classes is left; None if it is not recurrent."""
    if isinstance(module, torch.jit.ScriptModule):
        return "is compiled by TorchScript" if module.original_name in _NAMES else None
    quantized = kind.__module__.startswith("torch.ao.") and kind.__name__ in _NAMES
    if quantized or issubclass(kind, (nn.RNNBase, nn.RNNCellBase)):
        return f"{_path(kind)} is not of torch.nn"
    return None


def _reason_to_leave_class(kind: type[nn.Module], theirs: type[nn.Module]) -> str | None:
    """Returns why instances of ``kind``, a subclass of ``theirs``, cannot be replaced, or None."""
    path = _path(kind)
    for name in sorted(CALLED_BY_FORWARD[theirs]):
        if is_overridden(kind, theirs, name):
            return f"{path} has its own {name}"
    for name in ADDITIONS[theirs]:
        if hasattr(kind, name):
            return f"{path} has an attribute {name}"
    if is_overridden(kind, theirs, "forward"):
        code = getattr(inspect.unwrap(kind.forward), "__code__", None)
        # The super().forward of such a forward becomes rnnfast's.
        if code is None or not {"super", "forward"} <= {*code.co_names}:
            return f"{path} has its own forward, which does not call super().forward"
    try:
        _kept(kind, theirs)
    except Exception as error:  # the user's metaclass or __init_subclass__ may raise anything
        return f"no class can be derived from {path}: {error}"
    return None


def _kept(former: type[nn.Module], theirs: type[nn.Module]) -> type[nn.Module]:
    """Returns a class derived from ``former`` (``theirs`` or a subclass) that runs rnnfast's code.

    Its method resolution order is: ``former`` and its own bases, a class with only rnnfast's
    ``forward``, torch.nn's class, rnnfast's class. So ``super().forward`` in ``former`` is
    rnnfast's, everything else that ``former`` and torch.nn define is unchanged, and the other
    attributes that rnnfast's ``forward`` needs are found last.
    """
    if former in _kept_classes:
        return _kept_classes[former]
    ours = _OURS[theirs]

    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        # Constructed as a `former`: super().__init__() in torch.nn must not call rnnfast's.
        own = type(self)
        object.__setattr__(self, "__class__", former)
        former.__init__(self, *args, **kwargs)
        object.__setattr__(self, "__class__", own)
        vars(self)[_MARK] = True

    def reduce(self: Any, protocol: Any) -> Any:
        reduced = former.__reduce_ex__(self, protocol)
        # (function, (class, ...), state, ...): replaces the class, which pickle cannot find by name
        if isinstance(reduced, tuple) and reduced[1][:1] == (kept,):
            function, (_, *args), *rest = reduced
            return _rebuild, (function, former, *args), *rest
        return reduced

    names = {name: getattr(former, name) for name in ("__module__", "__qualname__", "__doc__")}
    own = {**names, _FORMER: former, "__init__": construct, "__reduce_ex__": reduce}
    middle = type(ours.__name__, (theirs, ours), {**names, "forward": ours.forward})
    bases = (middle,) if former is theirs else (former, middle)
    kept = type(former.__name__, bases, own)
    _kept_classes[former] = kept
    return kept


def _rebuild(function: Any, former: type[nn.Module], *args: Any) -> Any:
    """Creates the object that copy or pickle then fills; its class is `_kept` of ``former``."""
    theirs = torch_class_of(former)
    assert theirs is not None
    return function(_kept(former, theirs), *args)


def torch_class_of(kind: type) -> type[nn.Module] | None:
    """The one of torch.nn's recurrent classes that ``kind`` is or derives from, if any."""
    return next((theirs for theirs in _OURS if issubclass(kind, theirs)), None)


def _called_by_forward(theirs: type[nn.Module]) -> frozenset[str]:
    found, names = {"_flat_weights"}, ["forward"]
    while names:
        code = getattr(inspect.unwrap(getattr(theirs, names.pop())), "__code__", None)
        for name in code.co_names if code else ():  # a replacement by another package may have none
            method = getattr(theirs, name, None)
            if name not in found and getattr(method, "__module__", None) == theirs.__module__:
                found.add(name)
                names.append(name)
    return frozenset(found - {"forward", "flatten_parameters"})


CALLED_BY_FORWARD = {theirs: _called_by_forward(theirs) for theirs in _OURS}
"""The methods that torch.nn's forward of a class calls, and the list where it finds weights.

What has its own of these is not to be replaced, as our forward does without. It also does without
flatten_parameters, which weight-drop layers empty.
"""
ADDITIONS = {theirs: sorted({*dir(ours)} - {*dir(theirs)}) for theirs, ours in _OURS.items()}
"""The attributes that our modules have and those of torch.nn's class have not."""


def is_overridden(kind: type[nn.Module], theirs: type[nn.Module], name: str) -> bool:
    """Whether a subclass of one of torch.nn's classes has an attribute of its own of this name."""
    return getattr(kind, name, None) is not getattr(theirs, name, None)


def own_methods(module: nn.Module) -> str | None:
    """Names the methods that were set on the instance, as they may rely on its class; or None.

    flatten_parameters does not count: weight-drop layers replace it by an empty one, and nothing
    here needs it.
    """
    names = [name for name in vars(module) if callable(getattr(type(module), name, None))]
    names = [name for name in names if name != "flatten_parameters"]
    return f"has its own {', '.join(names)}, set on the instance" if names else None


def _name(kind: type[nn.Module]) -> str:
    """Returns the name of a class of torch.nn or rnnfast, and the full path of any other."""
    return kind.__name__ if kind in _OURS or kind in _THEIRS else _path(kind)


def _path(kind: type[nn.Module]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _change_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Changes the class of ``module`` to ``kind``.

    A parametrized module has a class of its own, derived from the former one, with properties that
    compute its parameters. Copies of the module share that class, so a new one is made.
    """
    if parametrize.is_parametrized(module):
        own = type(module)
        kind = type(own.__name__, (kind,), dict(vars(own)))
    module.__class__ = kind
