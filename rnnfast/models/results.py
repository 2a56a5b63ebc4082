"""The return types of the recurrent models, with clear errors for common mistakes in their use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, SupportsIndex, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

State = Tensor | tuple[Tensor, Tensor]
AnyState = TypeVar("AnyState", bound=State)


class OutputAndState(NamedTuple):
    """The pair that a model returns: ``output, state = model(x)``.

    Hand-written networks often return the output alone. If this pair is used as a tensor, as in
    ``loss_function(model(x), target)`` or ``model(x).shape``, an error explains how to unpack it.

    Attributes:
        output: The output of the model.
        state: The state after the last step. A further call continues from it as ``hidden``.
    """

    output: Tensor
    state: Any

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{_PAIR}; a pair has no attribute {name!r}")

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, (SupportsIndex, slice)) and not isinstance(index, Tensor):
            return tuple.__getitem__(self, index)
        raise TypeError(f"{_PAIR}; a pair has no index {index!r:.60}")

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Tensor):
            raise TypeError(f"{_PAIR}; == compares the output alone with a tensor")
        return tuple.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return tuple.__hash__(self)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> NoReturn:
        """Raise TypeError; torch's functions call this when they get the pair as a tensor."""
        raise TypeError(f"{_PAIR}; {function.__name__} takes the output alone")


_PAIR = (
    "the model returned a pair (output, state): write `output, state = model(...)`, or "
    "`output, _ = model(...)`"
)

_BINARY = (
    *("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow"),
    *("and", "or", "xor", "lshift", "rshift"),
)
_OPERATORS = (
    *_BINARY,
    *(f"r{name}" for name in _BINARY),
    *("neg", "pos", "abs", "invert", "float", "int", "lt", "le", "gt", "ge"),
)


def _refusal(name: str) -> Callable[..., NoReturn]:
    """A method that refuses an operator of tensors. Tuples lack it or give it another meaning."""

    def refuse(self: OutputAndState, *operands: object) -> NoReturn:
        raise TypeError(f"{_PAIR}; {name} takes the output alone")

    return refuse


for _name in _OPERATORS:
    setattr(OutputAndState, f"__{_name}__", _refusal(f"__{_name}__"))


def pair(output: Tensor, state: AnyState) -> tuple[Tensor, AnyState]:
    """The pair that a model returns; a plain tuple in compiled and exported programs."""
    return (output, state) if torch.compiler.is_compiling() else OutputAndState(output, state)


class StepLogits(Tensor):
    """Logits (B, 1, V) of a single step, which refuse a softmax over the time axis.

    A loop written for logits (B, V) calls ``softmax(logits, dim=1)``. Here that axis has length 1,
    so every probability would be 1 and the samples would be noise. A softmax over an axis of length
    1 that is not the last therefore raises ValueError. Otherwise this behaves as a tensor. Copies
    and pickles of it are plain tensors.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SOFTMAX:
            _check_softmax(func.__name__, *args, **kwargs)
        return cls._unwrapped(func, super().__torch_function__(func, types, args, kwargs))

    @classmethod
    def _unwrapped(cls, function: Callable[..., Any], result: Any) -> Any:
        """The result of a function, with every tensor that does not hold logits made plain."""
        if isinstance(result, (tuple, list)):
            parts = [cls._unwrapped(function, part) for part in result]
            return type(result)._make(parts) if hasattr(result, "_make") else type(result)(parts)
        if isinstance(result, cls) and not _is_logits(function, result):
            return result.as_subclass(Tensor)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.as_subclass(Tensor).__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


_SOFTMAX = {
    *(F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax),
    *(F.log_softmax, torch.log_softmax, Tensor.log_softmax, torch.special.log_softmax),
    *(F.softmin, F.gumbel_softmax),
}


def _is_logits(function: Callable[..., Any], result: Tensor) -> bool:
    """Whether the result holds logits, rather than probabilities, a loss or tokens."""
    return function not in _SOFTMAX and result.dim() > 0 and result.is_floating_point()


def _check_softmax(name: str, input: Tensor, *args: Any, **kwargs: Any) -> None:
    """Raise ValueError for a softmax over an axis of length 1 that is not the vocabulary's."""
    position = 3 if name == "gumbel_softmax" else 0
    dim = kwargs.get("dim", args[position] if len(args) > position else None)
    if dim is None and name == "gumbel_softmax":
        dim = -1
    elif dim is None:
        dim = 0 if input.dim() in (0, 1, 3) else 1  # as torch.nn.functional chooses
    shape = tuple(input.shape)
    if -len(shape) <= dim < len(shape) - 1 and dim != -1 and shape[dim] == 1:
        raise ValueError(
            f"{name} over dimension {dim} of logits of shape {shape}, which has length 1, makes "
            f"every probability 1. CharLSTM returns logits (batch, time, vocabulary): take "
            f"dim=-1, or logits[:, -1] for logits (batch, vocabulary); `CharLSTM.generate` is the "
            f"whole loop"
        )


def as_step(logits: Tensor) -> Tensor:
    """Turn logits (B, 1, V) into `StepLogits`; leave others, and compiled programs, alone."""
    if logits.shape[1] != 1 or torch.compiler.is_compiling():
        return logits
    return logits.as_subclass(StepLogits)
