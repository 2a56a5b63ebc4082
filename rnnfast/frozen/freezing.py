"""`freeze` makes a module for inference of a model; `quantize_error` tells what rounding costs."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from ..acceleration import CALLED_BY_FORWARD, is_overridden, own_methods, torch_class_of
from ..bases import Backed, Layers, OneStep
from . import quantized
from .modules import FrozenCell, FrozenLayers
from .weights import TYPES, Frozen


def freeze(module: nn.Module, weights: str | Mapping[str, str] = "float32") -> nn.Module:
    """Makes an inference module of a model: a copy whose recurrent layers are frozen.

    The copy computes the same in less time. Its weights are packed once, and not in every call;
    types other than float32 round them, need less memory, and are faster where weights are large:

    - ``"bfloat16"`` and ``"float16"``: products are those of floats with the rounded weights.
    - ``"int8"``: symmetric, with a scale for each row of a weight matrix. Inputs and states are
      rounded in every step, with a scale for each row of the batch: to 8 bits on a processor with
      VNNI, else to 13 bits. Products are summed as integers, without saturation. Gates and the
      state c are float32.

    `quantize_error` says what the rounding costs on data of yours.

    The model itself does not change. Everything else in the copy is copied, in eval mode, and its
    parameters need no gradients. Later changes of the model's parameters do not reach the copy.
    ``load_state_dict`` of the copy takes new weights, frozen or not.

    Modules that ``torch.ao.quantization.quantize_dynamic`` has quantized are frozen, too. With
    ``weights="int8"`` their integers are taken as they are, and with "float16" their float16
    weights. With another type the numbers that these stand for are rounded to it.

    Args:
        module: A model, or a recurrent module. RNN, LSTM, GRU and cells of rnnfast and of torch.nn
            are frozen wherever they are in it, and those of torch.ao.nn.quantized.dynamic. They
            must be float32 and on the CPU, or quantized without zero points. Those on the device
            "meta" have no memory: the copy's weights are NaN until ``load_state_dict``.
        weights: "float32", "bfloat16", "float16" or "int8". Or a dict from names of recurrent
            modules, as in ``module.named_modules()``, to these: others get float32.

    Returns:
        The copy. Its frozen modules are `FrozenLayers` and `FrozenCell`.

    Raises:
        ValueError: A type of weights is unknown, a name in ``weights`` is not that of a recurrent
            module, there is no recurrent module, or one cannot be frozen.
        RuntimeError: The compiled kernels are missing.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.LSTM(10, 20))
        >>> frozen = rnnfast.freeze(model, weights="int8")
        >>> output, (h_n, c_n) = frozen(torch.randn(5, 3, 10))
        >>> output.shape
        torch.Size([5, 3, 20])
        >>> frozen[0]
        FrozenLayers(10, 20, weights='int8')
    """
    found = {name: each for name, each in module.named_modules() if is_recurrent(each)}
    if not found:
        is_frozen = any(isinstance(each, Frozen) for each in module.modules())
        words = "is frozen already" if is_frozen else "has no RNN, LSTM, GRU or cell to freeze"
        raise ValueError(f"{type(module).__name__} {words}")
    types = types_of(found, weights)
    memo: dict[int, Any] = {}
    for name, each in found.items():
        try:
            memo[id(each)] = freeze_one(each, types[name])
        except ValueError as error:
            raise ValueError(f"{name or type(module).__name__} cannot be frozen: {error}") from None
    return copy.deepcopy(module, memo).eval().requires_grad_(False)


def is_recurrent(module: nn.Module) -> bool:
    """Whether a module is an RNN, LSTM, GRU or cell, maybe quantized, and not frozen."""
    if isinstance(module, Frozen):
        return False
    return isinstance(module, (nn.RNNBase, nn.RNNCellBase)) or bool(
        quantized.float_class_of(module)
    )


def types_of(names: Collection[str], weights: str | Mapping[str, str]) -> dict[str, str]:
    """The type of weights for each of the recurrent modules with these names.

    Raises:
        ValueError: A type is unknown, or a name in ``weights`` is none of ``names``.
    """
    chosen = weights if isinstance(weights, Mapping) else dict.fromkeys(names, weights)
    for name, chosen_type in chosen.items():
        if name not in names:
            raise ValueError(f"no recurrent module is named {name!r}; there are {sorted(names)}")
        if chosen_type not in TYPES:
            raise ValueError(f"expected weights {', '.join(TYPES)}, got {chosen_type!r}")
    return {name: chosen.get(name, "float32") for name in names}


def freeze_one(module: nn.Module, weights: str) -> Frozen:
    """Makes a frozen module of a recurrent one, whose parameters are read as in eval mode.

    Raises:
        ValueError: The reason why the module cannot be frozen.
    """
    if reason := own_methods(module):
        raise ValueError(f"it {reason}")
    if module._forward_hooks or module._forward_pre_hooks:
        raise ValueError("it has hooks, which a frozen module would not run")
    source, given = module, None
    torch_class = quantized.float_class_of(module)
    if torch_class is None:
        torch_class = _class_to_freeze(module)
    else:
        source, given = quantized.read(module, torch_class)
    with _in_eval_mode(source):  # some parametrizations are random, or change, in training
        if isinstance(source, nn.RNNBase):
            return FrozenLayers(source, torch_class, weights, given)
        assert isinstance(source, nn.RNNCellBase)
        return FrozenCell(source, torch_class, weights, given)


def _class_to_freeze(module: nn.Module) -> type[nn.Module]:
    """The class of torch.nn that computes what a module does.

    Raises:
        ValueError: The module may compute something else.
    """
    kind = parametrize.type_before_parametrizations(module)
    if issubclass(kind, Backed) and not hasattr(kind, "torch_class"):
        raise ValueError("its cell is a user's, and only torch.nn's cells can be frozen")
    torch_class: type[nn.Module] | None = (
        kind.torch_class if issubclass(kind, Backed) else torch_class_of(kind)
    )
    if torch_class is None:
        raise ValueError(f"{kind} is not of torch.nn or rnnfast")
    if issubclass(kind, Backed):
        ours: type[Backed] = Layers if issubclass(kind, Layers) else OneStep
        names = ["__call__", "forward"]
        changed = [one for one in names if getattr(kind, one) is not getattr(ours, one)]
    else:
        names = sorted({"__call__", "forward", *CALLED_BY_FORWARD[torch_class]})
        own = cast(type[nn.Module], kind)
        changed = [one for one in names if is_overridden(own, torch_class, one)]
    if changed:
        raise ValueError(f"{kind} has its own {', '.join(changed)}")
    return torch_class


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    before = {each: each.training for each in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for each, training in before.items():
            each.training = training


class LayerError(NamedTuple):
    """How far the output of a frozen module is from that of the module that it was made of."""

    name: str
    """The module's name in ``module.named_modules()``; empty for the whole model."""
    weights: str
    """The type of its weights."""
    largest: float
    """The largest difference of two numbers."""
    rms: float
    """The root of the mean square of the differences."""
    relative: float
    """``rms``, divided by the root mean square of the output itself."""


class ErrorTable(list[LayerError]):
    """The result of `quantize_error`; ``print`` shows a line for each entry."""

    def __str__(self) -> str:
        width = max([len("module"), *(len(row.name or "(whole)") for row in self)])
        lines = [f"{'module':<{width}}  weights   largest      RMS  RMS / RMS of output"]
        lines += [
            f"{row.name or '(whole)':<{width}}  {row.weights:<8}  {row.largest:7.1e}  "
            f"{row.rms:7.1e}  {row.relative:.2%}"
            for row in self
        ]
        return "\n".join(lines)


def quantize_error(
    module: nn.Module, *data: Any, weights: str | Mapping[str, str] = "int8"
) -> ErrorTable:
    """Compares a model with its frozen copy on data of yours.

    Two copies run ``module(*data)`` in eval mode without gradients. A module that is called several
    times is compared over all of its calls. What a module gets as input is rounded by those before
    it, so its error has theirs in it.

    Args:
        module: A model, as for `freeze`.
        data: The arguments of a call of it.
        weights: The types of the frozen weights, as for `freeze`. Default: "int8".

    Returns:
        An entry for each recurrent module that was called, and one for the output of the whole
        model if that is another module. Of several results, such as output and states, only the
        first tensor counts. A result without a tensor has no entry, and neither has a module whose
        ``forward`` is called directly.

    Raises:
        ValueError: As `freeze`; or the copy was not called as often as the model.

    Example:
        >>> model = torch.nn.GRU(10, 20)
        >>> (row,) = rnnfast.quantize_error(model, torch.randn(50, 3, 10))
        >>> row.weights, row.relative < 0.02
        ('int8', True)
    """
    frozen = freeze(module, weights)
    names = {
        name: each.weights for name, each in frozen.named_modules() if isinstance(each, Frozen)
    }
    if "" not in names:
        names[""] = ", ".join(sorted(set(names.values())))
    exact, rounded = (_outputs(copy.deepcopy(model), names, data) for model in (module, frozen))
    table = ErrorTable()
    for name, weight_type in names.items():
        before, after = exact[name], rounded[name]
        if [t.shape for t in before] != [t.shape for t in after]:
            raise ValueError(f"{name or 'the frozen model'} had other outputs than the model")
        reference = torch.cat([torch.empty(0), *(t.flatten().double() for t in before)])
        if not reference.numel():
            continue
        difference = torch.cat([t.flatten().double() for t in after]) - reference
        rms = difference.square().mean().sqrt().item()
        size = reference.square().mean().sqrt().item()
        largest = difference.abs().max().item()
        table.append(LayerError(name, weight_type, largest, rms, rms / size if size else 0.0))
    return table


def _outputs(
    model: nn.Module, names: Mapping[str, str], data: tuple[Any, ...]
) -> dict[str, list[Tensor]]:
    """The first tensor of the result of every call of the modules of these names."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:

        def keep(_: nn.Module, __: Any, result: Any, name: str = name) -> None:
            tensor = _first_tensor(result)
            if tensor is not None:
                found[name].append(tensor.detach().clone())

        model.get_submodule(name).register_forward_hook(keep)
    with torch.no_grad():
        model.eval()(*data)
    return found


def _first_tensor(result: Any) -> Tensor | None:
    if isinstance(result, Tensor):
        return result
    if isinstance(result, PackedSequence):
        return result.data
    parts = result.values() if isinstance(result, Mapping) else result
    if isinstance(result, (Mapping, tuple, list)):
        return next((t for t in map(_first_tensor, parts) if t is not None), None)
    return None
