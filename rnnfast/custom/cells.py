"""The decorator `rnnfast.cell`: a recurrent cell from its step, written in PyTorch."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import autograd
from .. import backend as _backend
from ..reference import Cell, States
from . import build
from .emission import Emission, emit
from .program import Program
from .tracing import CellError, trace

MAX_GATES = 4
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class CustomCell:
    """A recurrent cell of the user's; `rnnfast.cell` makes it.

    It is plain data that does not change: it can be compared and pickled, and a pickled cell works
    in a process that does not have the function it was made of. Cells of the same content are
    equal.

    Attributes:
        name: The name of the function.
        gates: G, how many blocks of H rows W_ih and W_hh have.
        state: The names of the states. The first is h, the output of the cell.
        parameters: The learnable vectors with one number for each unit: their names and initial
            values. None stands for random ones, drawn as weights are.
        program: The step, as a list of elementwise operations.
        norm_eps: What is added to the variance if the gates are normalised; None if they are not.
        recurrent: Whether there is a W_hh.
    """

    def __init__(
        self,
        name: str,
        gates: int,
        state: tuple[str, ...],
        parameters: tuple[tuple[str, float | None], ...],
        program: Program,
        norm_eps: float | None = None,
        recurrent: bool = True,
    ) -> None:
        self.name, self.gates, self.state = name, gates, state
        self.parameters, self.program = parameters, program
        self.norm_eps, self.recurrent = norm_eps, recurrent

    @property
    def source(self) -> str:
        """The C++ that the kernels are compiled from: the step and its backward."""
        return self._emission.header

    @property
    def formula(self) -> str:
        """The step in plain PyTorch, as it was understood."""
        return self.program.source(self.name)

    def prepare(self, dtype: torch.dtype) -> str | None:
        """Compiles the kernels for tensors of a dtype on the CPU, unless that has been done.

        The first call of a layer does it too. It takes some seconds, once on a machine.

        Returns:
            None, or why there are no kernels; plain PyTorch runs then.
        """
        return _prepare(self.row.name, dtype)

    @cached_property
    def row(self) -> Cell:
        """The cell as the rest of the package knows it, with operators that torch knows.

        The name of the operators has a digest of the content, so it is the same in every process.
        """
        content = f"{self.state}{self.norm_eps}{self.recurrent}{self.source}"
        digest = hashlib.sha256(content.encode()).hexdigest()[:12]
        name = f"{self.name}_{digest}"
        with _lock:
            if name not in _registered:
                _registered[name] = _register(self, name)
            return _registered[name].row

    @cached_property
    def parameter_names(self) -> tuple[str, ...]:
        """The names of the learnable vectors."""
        return tuple(name for name, _ in self.parameters)

    @cached_property
    def _emission(self) -> Emission:
        return emit(self.name, self.program, self.gates, self.state, self.parameter_names)

    @property
    def _content(self) -> tuple[Any, ...]:
        return (
            *(self.name, self.gates, self.state, self.parameters, self.program),
            *(self.norm_eps, self.recurrent),
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CustomCell):
            return NotImplemented
        return self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)

    def __reduce__(self) -> tuple[type[CustomCell], tuple[Any, ...]]:
        return CustomCell, self._content

    def __deepcopy__(self, memo: dict[int, Any]) -> CustomCell:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses to be called as the function was."""
        raise TypeError(
            f"{self.name} is a cell, which rnnfast.Layer and rnnfast.LayerCell run: "
            f"rnnfast.Layer({self.name}, input_size, hidden_size)"
        )

    def __repr__(self) -> str:
        words = [f"gates={self.gates}", f"state={self.state}"]
        if self.parameters:
            words.append(f"parameters={self.parameter_names}")
        if not self.recurrent:
            words.append("recurrent=False")
        if self.norm_eps is not None:
            words.append(f"norm='layer', eps={self.norm_eps}")
        return f"<rnnfast.cell {self.name}: {', '.join(words)}>"


def cell(
    *,
    gates: int,
    state: Sequence[str] = ("h",),
    parameters: Sequence[str] | Mapping[str, float | None] = (),
    norm: str | None = None,
    eps: float = 1e-5,
    recurrent: bool = True,
) -> Callable[[Callable[..., Any]], CustomCell]:
    """Makes a recurrent cell of a function that computes one step.

    `rnnfast.Layer` and `rnnfast.LayerCell` are the modules that run it. The function is called
    once, with stand-ins for tensors, to record what it computes. From that come the kernels with
    their backward, which are compiled when they are first needed, and the same in plain PyTorch.

    The function takes

    - ``x``: what W_ih x + b_ih gives, one tensor for each gate,
    - ``h``: what W_hh h + b_hh gives, one tensor for each gate,
    - ``state``: the states before the step, by their names,
    - ``parameters``: the learnable vectors by their names, if there are any.

    With ``norm="layer"`` it takes ``gates`` in place of ``x`` and ``h``: the sums W_ih x + b_ih +
    W_hh h + b_hh of each row, normalised over all units of all gates, times a weight, plus a bias,
    as torch.nn.LayerNorm does it (Ba, Kiros and Hinton, arXiv:1607.06450).

    With ``recurrent=False`` there is no W_hh, and the function does not take ``h``: a step depends
    on the one before by ``state`` alone, as in minGRU (Feng et al., arXiv:2410.01201) and IndRNN
    (Li et al., arXiv:1803.04831). Such a step takes a fraction of the time.

    It returns the next state, or a tuple of the next states in the order of ``state``. All tensors
    have one number for each hidden unit, and the units do not mix: the function may use arithmetic,
    comparisons, ``torch.where``, and functions such as exp, log, tanh, sigmoid, relu, softplus,
    gelu, sqrt, abs, minimum and clamp. Python's numbers are constants.

    Args:
        gates: G, from 1 to 4: how many gates W_ih and W_hh have.
        state: The names of the states. The first, which W_hh multiplies, is the output.
        parameters: The names of learnable vectors (H), such as peepholes; or a mapping from names
            to initial values, where None stands for random ones, drawn as weights are.
        norm: None, or "layer" to normalise the gates.
        eps: What the normalisation adds to the variance.
        recurrent: Whether there is a W_hh.

    Returns:
        A decorator that turns the function into a `CustomCell`.

    Raises:
        ValueError: An argument is out of range.
        CellError: The decorated function does something else than such a step. The message names
            the line. It is a ValueError, too.

    Example:
        >>> @rnnfast.cell(gates=2)
        ... def light_gru(x, h, state):  # Ravanelli et al., arXiv:1803.10225, without batch norm
        ...     z = torch.sigmoid(x[0] + h[0])
        ...     candidate = torch.relu(x[1] + h[1])
        ...     return z * state.h + (1 - z) * candidate
        >>> layer = rnnfast.Layer(light_gru, input_size=10, hidden_size=20)
        >>> output, h_n = layer(torch.randn(5, 3, 10))
        >>> output.shape
        torch.Size([5, 3, 20])
    """
    names, vectors = _checked_names(state, "state"), _checked_parameters(parameters)
    if isinstance(gates, bool) or not isinstance(gates, int) or not 1 <= gates <= MAX_GATES:
        raise ValueError(f"gates should be a number from 1 to {MAX_GATES}, got {gates!r}")
    if not names:
        raise ValueError("state should name one state at least, got none")
    if norm not in (None, "layer"):
        raise ValueError(f"norm should be None or 'layer', got {norm!r}")
    if norm and not 0 < eps < float("inf"):
        raise ValueError(f"eps should be positive, got {eps}")
    if shared := sorted({*names} & {name for name, _ in vectors}):
        raise ValueError(f"a state and a parameter are both named {shared[0]}")

    def decorate(function: Callable[..., Any]) -> CustomCell:
        own = tuple(name for name, _ in vectors)
        only = "gates" if norm else None if recurrent else "x"
        program = trace(function, gates, names, own, only=only)
        name = getattr(function, "__name__", type(function).__name__)
        name = name if _NAME.fullmatch(name) else "cell"
        of_norm = float(eps) if norm else None
        made = CustomCell(name, gates, names, vectors, program, of_norm, bool(recurrent))
        made.__doc__ = function.__doc__
        return made

    return decorate


def _checked_names(names: Sequence[str], kind: str) -> tuple[str, ...]:
    """The names as a tuple; ValueError unless they are different names that Python can use."""
    if isinstance(names, str):
        raise ValueError(f"{kind} should be a sequence of names, got the text {names!r}")
    result = tuple(names)
    for name in result:
        if not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
            raise ValueError(f"{kind} should be names that start with a letter, got {name!r}")
    if len(set(result)) < len(result):
        raise ValueError(f"{kind} should be different names, got {result}")
    return result


_OF_LAYERS = (
    *("weight_ih", "weight_hh", "bias_ih", "bias_hh", "norm_weight", "norm_bias"),
    *("bias", "cell", "backend", "training", "input_size", "hidden_size"),
)


def _checked_parameters(
    given: Sequence[str] | Mapping[str, float | None],
) -> tuple[tuple[str, float | None], ...]:
    names = _checked_names(given if isinstance(given, str) else list(given), "parameters")
    for name in names:
        if name in _OF_LAYERS or hasattr(torch.nn.Module, name):
            raise ValueError(f"a parameter cannot be named {name}, which layers use themselves")
    if not isinstance(given, Mapping):
        return tuple((name, None) for name in names)
    return tuple((name, None if value is None else float(value)) for name, value in given.items())


_lock = threading.RLock()


def _begin_child() -> None:
    """Makes a new lock in a forked child, where no thread lives that could release the old one."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_begin_child)


def _inputs(cell: CustomCell, gates_x: Tensor, gates_h: Tensor, h: Tensor, *rest: Tensor) -> States:
    """The inputs of the program of a step from the arguments of `rnnfast.reference.Cell.step`.

    There the states beside h lie side by side.
    """
    states: States = (h,)
    parameters: States = ()
    if len(cell.state) > 1:
        states = (h, *rest[0].chunk(len(cell.state) - 1, dim=-1))
    if cell.parameters:
        parameters = rest[-1][: len(cell.parameters)].unbind(0)
    if cell.norm_eps is not None:
        weight, bias = rest[-1][len(parameters) :].chunk(2)
        size = (gates_x.shape[-1],)
        gates_x = F.layer_norm(
            gates_x + gates_h, size, weight.flatten(), bias.flatten(), cell.norm_eps
        )
        gates_h = torch.zeros_like(gates_h)
    gates = (*gates_x.chunk(cell.gates, dim=-1), *gates_h.chunk(cell.gates, dim=-1))
    return *gates, *states, *parameters


def _step(cell: CustomCell, *arguments: Tensor) -> States:
    """The step as `rnnfast.reference.Cell` has it."""
    inputs = _inputs(cell, *arguments)
    h = inputs[2 * cell.gates]
    results = cell.program.run(*inputs)
    first, *others = (result.expand_as(h) for result in results if result is not None)
    return (first, torch.cat(others, dim=-1)) if others else (first,)


def named_values(cell: CustomCell, *arguments: Tensor) -> dict[str, Tensor]:
    """What a step computes, by the names of the variables in the user's function.

    The arguments are those of `rnnfast.reference.Cell.step`.
    """
    inputs = _inputs(cell, *arguments)
    h, values = inputs[2 * cell.gates], cell.program.values(*inputs)[len(inputs) :]
    pairs = zip(cell.program.operations, values, strict=True)
    return {operation.name: value.expand_as(h) for operation, value in pairs if operation.name}


class _Registered(NamedTuple):
    """What this process knows of a cell."""

    cell: CustomCell
    row: Cell
    kind: int | None
    """The number by which the extension knows the cell, None without the extension."""


_registered: dict[str, _Registered] = {}
"""By the names of the operators."""
_problems: dict[tuple[str, torch.dtype], str] = {}
"""Why there are no kernels of a cell for a dtype."""


def _register(cell: CustomCell, name: str) -> _Registered:
    saved, states = cell._emission.facts.saved, len(cell.state)
    parameters, normalizes = len(cell.parameters), cell.norm_eps is not None
    if normalizes:  # it saves the gates before, and has a weight and a bias of its own
        saved, parameters = saved + cell.gates, parameters + 2 * cell.gates
    row = Cell(
        name,
        gates=cell.gates,
        states=min(states, 2),
        saved=saved,
        aten="",
        step=partial(_step, cell),
        cells=states - 1,
        parameters=parameters,
        recurrent=cell.recurrent,
        recomputes=not normalizes,
        compile=partial(_prepare, name),
    )
    if _backend.EXTENSION is None:
        return _Registered(cell, row, None)
    kind = _backend.EXTENSION.add_cell(
        name, cell.gates, saved, states, parameters, cell.norm_eps or 0.0, cell.recurrent
    )
    _backend.CELL_KINDS[name] = kind
    autograd.register(row)
    return _Registered(cell, row, kind)


def _prepare(name: str, dtype: torch.dtype) -> str | None:
    """What `CustomCell.prepare` does, for the cell whose operators have this name."""
    cell, _, kind = _registered[name]
    extension = _backend.EXTENSION
    if extension is None or kind is None:
        return "the compiled extension of rnnfast is missing"
    if dtype not in build.DTYPES:
        return f"there are no kernels for {dtype}"
    number = build.DTYPES.index(dtype)
    if extension.has_cell(kind, number):
        return None
    target = extension.cell_target(number)
    if target is None:
        return "the kernels in use know no cells of users"
    with _lock:
        if (name, dtype) in _problems or extension.has_cell(kind, number):
            return _problems.get((name, dtype))
        code = cell._emission
        try:
            address = build.load(cell.name, code.struct, code.header, target, dtype)
        except build.CompileError as error:
            _problems[name, dtype] = str(error)
            warnings.warn(
                f"rnnfast: the cell {cell.name} runs in plain PyTorch: {error}", stacklevel=3
            )
            return str(error)
        extension.set_cell_functions(kind, target, number, address)
    return None


def _builder(name: str, dtype: int) -> str | None:
    """`_prepare` as the extension calls it where it finds no kernels."""
    return _prepare(name, build.DTYPES[dtype])


# torch.compile calls it while it compiles, and takes the result as a constant
_prepare = torch.compiler.assume_constant_result(_prepare)
if _backend.EXTENSION is not None:
    _backend.EXTENSION.set_cell_builder(_builder)

__all__ = ["CellError", "CustomCell", "cell"]
