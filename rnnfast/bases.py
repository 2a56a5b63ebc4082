"""What the modules of `rnnfast.modules` and `rnnfast.cells` have in common: how a call runs.

A malformed call goes to torch.nn's own ``forward``, which raises the error in torch.nn's words. So
does a call that only torch's kernels can run.

The classes derive from torch.nn.RNNBase and RNNCellBase, not from torch.nn.LSTM and its like,
because torch.compile breaks the graph at those.

torch.nn.Module declares ``__call__`` without types. The classes whose names end in ``OneState`` and
``TwoStates`` are there for type checkers alone: they give ``__call__`` and ``forward`` an overload
for each kind of input and result, by way of protocols, as pyright takes no ``__call__ = forward``.
At run time they are `Layers` and `OneStep` themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, Protocol, overload

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

from . import backend as _backend
from . import checks, sequences, torchscript
from . import tokens as _tokens
from .reference import CELLS, Cell
from .sequences import Extras, Options

CELL_OF_MODE = {
    "RNN_TANH": CELLS["elman_tanh"],
    "RNN_RELU": CELLS["elman_relu"],
    "GRU": CELLS["gru"],
    "LSTM": CELLS["lstm"],
}
CELL_WEIGHTS = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
Device = torch.device | str | int | None
_NO_EXTRAS = Extras()


class Backed(nn.Module):
    """What all modules share: the choice of the backend and the calls of torch.nn's ``forward``.

    Attributes that have a default have it in the class, too. Modules that were pickled before the
    attribute existed then have the default.
    """

    torch_class: ClassVar[type[nn.Module]]
    """The module of torch.nn whose ``forward`` runs the calls that are not served here."""
    backend: str | None = None
    """The backend to force, or None."""

    def _read(self, names: list[str]) -> list[Tensor]:
        """The parameters of these names, as functional_call or a parametrization has set them."""
        parameters: dict[str, Any] = self._parameters
        try:
            return [parameters[name] for name in names]
        except KeyError:
            return [getattr(self, name) for name in names]

    def _forward_in_torch(self, input: Any, hx: Any, reason: str) -> Any:
        """torch.nn's own ``forward``.

        Raises:
            RuntimeError: torch.nn accepts the call, but another backend is forced.
        """
        result = self.torch_class.forward(self, input, hx)
        name = _backend.in_force(self.backend)
        if name not in ("auto", "aten"):
            _backend.refuse(name, reason)
        return result

    def _in_graph(self, input: fx.Proxy, *args: Any, **kwargs: Any) -> Any:
        """Records the call as one node of a torch.fx graph, as torch.fx does for torch.nn."""
        tracer: Any = input.tracer
        return tracer.create_proxy(
            "call_module", tracer.path_of_module(self), (input, *args), kwargs
        )

    def __prepare_scriptable__(self) -> None:
        """Refuses torch.jit.script, which calls this first."""
        torchscript.refuse_script(self.torch_class.__name__)

    def extra_repr(self) -> str:
        """The arguments that ``repr`` shows, with the backend if one is forced."""
        own = super().extra_repr()
        return own if self.backend is None else f"{own}, backend={self.backend!r}"


class Layers(Backed, nn.RNNBase):
    """A stack of layers of one kind of cell."""

    recompute: bool = False
    """Whether the backward computes the gates again instead of reading saved ones. It may be set
    at any time."""
    tokens: bool = False
    """Whether inputs are integer tokens, each of which stands for a one-hot vector."""

    def __init__(
        self,
        mode: str,
        *args: Any,
        tokens: bool,
        recompute: bool,
        backend: str | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(mode, *args, **kwargs)
        self.tokens = tokens
        self.recompute = recompute
        self.backend = check_backend(backend)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        # not keyword-only: torch.onnx.export(dynamo=False) passes the defaults by position
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
        return_cells: bool = False,
        embedding: nn.Embedding | None = None,
    ) -> Any:
        """Runs the layers over a batch of sequences, or over a single one.

        The arguments and results are those under "Inputs" and "Outputs" in the class.
        """
        cell, weights = self._cell, self._read(self._flat_weights_names)
        tokens = self.tokens or embedding is not None
        if tokens:
            input, weights, tokens = self._take_tokens(input, weights, lengths, embedding)
        plain = lengths is None and reset is None and not return_cells
        if not plain:
            self._check_extras(input, lengths, reset, return_cells)
        if not isinstance(input, Tensor):
            if isinstance(input, fx.Proxy):
                given = {"lengths": lengths, "reset": reset, "return_cells": return_cells}
                return self._in_graph(input, hx, **({} if plain else given))
            return self._forward_packed(cell, input, hx, weights, tokens, return_cells)
        extras = _NO_EXTRAS
        if not plain and input.dim() == 3:
            extras = checks.check_extras(input, lengths, reset, return_cells, self.batch_first)
        if not return_cells and (extension := _backend.short_path(self.backend)):
            # `_layout` inlined: in a single step of a small layer its call would be noticed
            result = extension.run_layers(
                _backend.CELL_KINDS[cell.name],
                input,
                hx,
                weights,
                self.num_layers,
                self.bias,
                self.proj_size,
                self.dropout if self.training else 0.0,
                self.batch_first,
                self.bidirectional,
                self.recompute,
                extras[0],
                extras[1],
            )
            if result is not None:
                return result
        x, states, single = input, states_of(cell, hx), input.dim() == 2
        time = 1 if self.batch_first else 0
        if single:
            checks.refuse_freed(input=x, hidden=states)
            x, states = x.unsqueeze(1 - time), unsqueeze_states(states, 1)
        options = self._options()
        problem = checks.sequence_problem(cell, x, states, weights, options, tokens=tokens)
        if problem and tokens:
            raise RuntimeError(problem)
        if problem:
            self._refuse(input, hx, problem)
        self._check_weights(cell, weights, options)
        if single and not plain:
            reset = None if reset is None else checks.as_reset(reset, x).unsqueeze(1 - time)
            extras = checks.check_extras(x, None, reset, return_cells, self.batch_first)
        y, finals, cells = sequences.run_sequence(
            cell, x, states, weights, options, self.backend, extras
        )
        if single:
            y, finals = y.squeeze(1 - time), tuple(final.squeeze(1) for final in finals)
            cells = None if cells is None else cells.squeeze(1 - time)
        results = y, finals if cell.states > 1 else finals[0]
        return results if cells is None else (*results, cells)

    @property
    def _cell(self) -> Cell:
        """The row of the table of cells."""
        return CELL_OF_MODE[self.mode]

    def _take_tokens(
        self, input: Any, weights: list[Tensor], lengths: Any, embedding: nn.Embedding | None
    ) -> tuple[Any, list[Tensor], bool]:
        """The input and weights that `run_sequence` takes, and whether the input is still tokens.

        Raises:
            ValueError: The layer reads one-hot tokens, and an embedding is given.
            RuntimeError, TypeError, IndexError: As `rnnfast.tokens.read`.
        """
        if isinstance(input, fx.Proxy):
            return input if embedding is None else embedding(input), weights, False
        if self.tokens and embedding is not None:
            raise ValueError("tokens=True stands for one-hot vectors: no embedding can be given")
        data, *rest = input if isinstance(input, PackedSequence) else (input,)
        x, weights = _tokens.read(
            data, weights, self._options(), self.backend, embedding, lengths, packed=bool(rest)
        )
        return PackedSequence(x, *rest) if rest else x, weights, x.dtype is torch.int64

    def _forward_packed(
        self,
        cell: Cell,
        input: Any,
        hx: Any,
        weights: list[Tensor],
        tokens: bool,
        return_cells: bool,
    ) -> Any:
        if not isinstance(input, PackedSequence):
            return self._forward_in_torch(input, hx, "input is no tensor")
        data, batch_sizes, order, inverse = input
        if problem := checks.packed_problem(input):
            raise RuntimeError(problem)
        name = _backend.choose(self.backend, weights[1])
        served = name == "reference" or (name == "fused" and data.device.type == "cpu")
        served = served and not _backend.is_tracing()  # a trace would fix the number of sequences
        states, options, batch = states_of(cell, hx), self._options(), int(batch_sizes[0])
        problem = checks.sequence_problem(cell, data, states, weights, options, batch, tokens)
        if problem and tokens:
            raise RuntimeError(problem)
        if problem:
            self._refuse(PackedSequence(data, batch_sizes), hx, problem)
        self._check_weights(cell, weights, options)
        if not (served or return_cells):
            reason = f"packed sequences have no kernels on {data.device.type}"
            return self._forward_in_torch(input, hx, reason)
        if order is not None and states is not None:
            states = tuple(state.index_select(1, order) for state in states)
        lengths = (batch_sizes.unsqueeze(1) > torch.arange(batch, device="cpu")).sum(0)
        result = None
        if not return_cells and (extension := _backend.short_path(self.backend)):
            hx = states if cell.states > 1 or states is None else states[0]
            result = extension.run_layers(
                _backend.CELL_KINDS[cell.name], data, hx, weights, *self._layout(), lengths, None
            )
        cells = None
        if result is not None:
            y, finals = result[0], result[1] if cell.states > 1 else result[1:]
        else:
            extras = Extras(lengths, None, return_cells)
            y, finals, cells = sequences.run_sequence(
                cell, data, states, weights, options, self.backend, extras
            )
        if inverse is not None:
            finals = tuple(final.index_select(1, inverse) for final in finals)
        output = PackedSequence(y, batch_sizes, order, inverse)  # Dynamo cannot trace _replace
        results = output, finals if cell.states > 1 else finals[0]
        if cells is None:
            return results
        return *results, PackedSequence(cells, batch_sizes, order, inverse)

    def _check_weights(self, cell: Cell, weights: list[Tensor], options: Options) -> None:
        """Checks the sizes of the weights for torch's kernels, which do not check them.

        Raises:
            RuntimeError: A weight has been replaced by one of another size.
        """
        if _backend.choose(self.backend, weights[1]) == "aten":
            sizes = self.input_size, self.hidden_size
            if problem := checks.stack_problem(cell, weights, options, *sizes):
                raise RuntimeError(problem)

    def _refuse(self, input: Any, hx: Any, problem: str) -> NoReturn:
        """Raises torch.nn's error for a malformed call, or ``problem`` if torch.nn raises none."""
        with checks.ChecksOnly(problem):
            self.torch_class.forward(self, input, hx)
        raise RuntimeError(problem)

    def _check_extras(self, input: Any, lengths: Any, reset: Any, return_cells: bool) -> None:
        """Refuses arguments that exclude each other; `checks.check_extras` checks their values."""
        if return_cells and self.mode != "LSTM":
            raise ValueError(f"return_cells is only supported for LSTM, not {self.mode}")
        if isinstance(input, PackedSequence) and not (lengths is None and reset is None):
            raise RuntimeError("lengths and reset need a tensor as input, got a PackedSequence")
        if lengths is not None and isinstance(input, Tensor) and input.dim() == 2:
            raise RuntimeError("lengths need a batch of sequences, got a single one")

    def _options(self) -> Options:
        return Options(
            self.num_layers,
            self.bias,
            self.dropout,
            self.training,
            self.bidirectional,
            self.batch_first,
            self.recompute,
            self.proj_size,
            self._cell.parameters > 0,
        )

    def _layout(self) -> tuple[Any, ...]:
        """The options in the order of the extension's ``run_layers``."""
        return (
            self.num_layers,
            self.bias,
            self.proj_size,
            self.dropout if self.training else 0.0,
            self.batch_first,
            self.bidirectional,
            self.recompute,
        )


if TYPE_CHECKING:
    _Lengths = Tensor | Sequence[int] | None
    _Pair = tuple[Tensor, Tensor]

    class _CallOneState(Protocol):
        @overload
        def __call__(
            self,
            input: Tensor,
            hx: Tensor | None = None,
            lengths: _Lengths = None,
            reset: Tensor | None = None,
            return_cells: Literal[False] = False,
            embedding: nn.Embedding | None = None,
        ) -> tuple[Tensor, Tensor]: ...
        @overload
        def __call__(
            self,
            input: PackedSequence,
            hx: Tensor | None = None,
            lengths: None = None,
            reset: None = None,
            return_cells: Literal[False] = False,
            embedding: nn.Embedding | None = None,
        ) -> tuple[PackedSequence, Tensor]: ...

    class LayersOneState(Layers):
        """Layers whose state is a tensor; see the top of this file."""

        forward: _CallOneState  # type: ignore[assignment]
        __call__: _CallOneState

    class _CallTwoStates(Protocol):
        @overload
        def __call__(
            self,
            input: Tensor,
            hx: _Pair | None = None,
            lengths: _Lengths = None,
            reset: Tensor | None = None,
            return_cells: Literal[False] = False,
            embedding: nn.Embedding | None = None,
        ) -> tuple[Tensor, _Pair]: ...
        @overload
        def __call__(
            self,
            input: Tensor,
            hx: _Pair | None = None,
            lengths: _Lengths = None,
            reset: Tensor | None = None,
            *,
            return_cells: Literal[True],
            embedding: nn.Embedding | None = None,
        ) -> tuple[Tensor, _Pair, Tensor]: ...
        @overload
        def __call__(
            self,
            input: Tensor,
            hx: _Pair | None = None,
            lengths: _Lengths = None,
            reset: Tensor | None = None,
            *,
            return_cells: bool,
            embedding: nn.Embedding | None = None,
        ) -> tuple[Tensor, _Pair] | tuple[Tensor, _Pair, Tensor]: ...
        @overload
        def __call__(
            self,
            input: PackedSequence,
            hx: _Pair | None = None,
            lengths: None = None,
            reset: None = None,
            return_cells: Literal[False] = False,
            embedding: nn.Embedding | None = None,
        ) -> tuple[PackedSequence, _Pair]: ...
        @overload
        def __call__(
            self,
            input: PackedSequence,
            hx: _Pair | None = None,
            lengths: None = None,
            reset: None = None,
            *,
            return_cells: Literal[True],
            embedding: nn.Embedding | None = None,
        ) -> tuple[PackedSequence, _Pair, PackedSequence]: ...
        @overload
        def __call__(
            self,
            input: PackedSequence,
            hx: _Pair | None = None,
            lengths: None = None,
            reset: None = None,
            *,
            return_cells: bool,
            embedding: nn.Embedding | None = None,
        ) -> tuple[PackedSequence, _Pair] | tuple[PackedSequence, _Pair, PackedSequence]: ...

    class LayersTwoStates(Layers):
        """Layers whose state is the pair (h, c); see the top of this file."""

        forward: _CallTwoStates  # type: ignore[assignment]
        __call__: _CallTwoStates

else:
    LayersOneState = LayersTwoStates = Layers


class OneStep(Backed, nn.RNNCellBase):
    """One step of one kind of cell."""

    @property
    def _cell(self) -> Cell | None:
        """The row of the table of cells, or None if the nonlinearity is unknown."""
        raise NotImplementedError

    def _read_parameters(self) -> Tensor:
        """The learnable vectors of a user's cell (N, H)."""
        raise NotImplementedError

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Computes the next state.

        The arguments and results are those under "Inputs" and "Outputs" in the class.
        """
        cell = self._cell
        if not isinstance(input, Tensor) and isinstance(input, fx.Proxy):
            return self._in_graph(input, hx)
        if cell is None or not isinstance(input, Tensor):
            return self._forward_in_torch(input, hx, "the module or its input is malformed")
        weights: Any = self._read(CELL_WEIGHTS)
        parameters = self._read_parameters() if cell.parameters else None
        if extension := _backend.short_path(self.backend):
            kind = _backend.CELL_KINDS[cell.name]
            biases = weights[2] is not None or weights[3] is not None
            given = weights if biases else weights[:2]
            given = given if parameters is None else [*given, parameters]
            result = extension.run_step(kind, input, hx, given, biases)
            if result is not None:
                return result
        x, states, single = input, states_of(cell, hx), input.dim() == 1
        if single:
            checks.refuse_freed(input=x, hidden=states)
            x, states = x.unsqueeze(0), unsqueeze_states(states, 0)
        problem = checks.step_problem(cell, x, states, weights)
        if problem:
            return self._forward_in_torch(input, hx, problem)
        finals = sequences.run_step(cell, x, states, weights, self.backend, parameters)
        if single:
            finals = tuple(final.squeeze(0) for final in finals)
        return finals if cell.states > 1 else finals[0]


if TYPE_CHECKING:

    class StepOneState(OneStep):
        """A cell whose state is a tensor; see the top of this file."""

        def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:  # noqa: D102
            ...

        def __call__(self, input: Tensor, hx: Tensor | None = None) -> Tensor:  # noqa: D102
            ...

    class StepTwoStates(OneStep):
        """A cell whose state is the pair (h, c); see the top of this file."""

        def forward(self, input: Tensor, hx: _Pair | None = None) -> _Pair:  # noqa: D102
            ...

        def __call__(self, input: Tensor, hx: _Pair | None = None) -> _Pair:  # noqa: D102
            ...

else:
    StepOneState = StepTwoStates = OneStep


def check_backend(name: str | None) -> str | None:
    """Returns the argument ``backend`` of a module; ValueError if it names no backend."""
    return None if name is None else _backend.check_name(name, "backend")


def states_of(cell: Cell, hx: Any) -> Any:
    """``hx`` as a sequence of states; anything malformed is left for the checks to find."""
    return hx if hx is None or cell.states > 1 else (hx,)


def unsqueeze_states(states: Any, dim: int) -> Any:
    """Gives the states of a single sequence the dimension of the batch."""
    if not isinstance(states, (tuple, list)):
        return states
    return tuple(s.unsqueeze(dim) if isinstance(s, Tensor) else s for s in states)
