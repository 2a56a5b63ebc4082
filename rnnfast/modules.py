"""Drop-in RNN, LSTM, GRU and their cells.

They take the arguments of torch.nn's modules of the same names, have the same parameters, initial
values and state_dict, and return the same. What is malformed goes to torch.nn's own ``forward``,
which refuses it in its own words; so does, to be served, what only torch's kernels do.

They derive from torch.nn.RNNBase and RNNCellBase, not from torch.nn.LSTM and its like, because
torch.compile refuses those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

from . import backend as _backend
from . import checks, functional, sequences, torchscript
from . import tokens as _tokens
from .reference import CELLS, Cell
from .sequences import Extras, Options

_CELL_OF_MODE = {
    "RNN_TANH": CELLS["elman_tanh"],
    "RNN_RELU": CELLS["elman_relu"],
    "GRU": CELLS["gru"],
    "LSTM": CELLS["lstm"],
}
_NO_EXTRAS = Extras()
_CELL_WEIGHTS = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
_Device = torch.device | str | int | None


class _Backed(nn.Module):
    """What all modules here share: the choice of the backend and the way out to torch.nn."""

    torch_class: ClassVar[type[nn.Module]]
    """The module of torch.nn whose ``forward`` takes over what is not served here."""
    backend: str | None = None
    """The backend to force. Every attribute that has a default has it here, in the class, too: that
    is what a module has which was pickled before there was the attribute."""

    def _read(self, names: list[str]) -> Any:
        """The parameters of these names, as functional_call or a parametrization has them now."""
        parameters = self._parameters
        try:
            return [parameters[name] for name in names]
        except KeyError:
            return [getattr(self, name) for name in names]

    def _forward_in_torch(self, input: Any, hx: Any, reason: str) -> Any:
        """torch.nn's own ``forward``; an error if another backend is forced and this accepts."""
        result = self.torch_class.forward(self, input, hx)
        name = _backend.in_force(self.backend)
        if name not in ("auto", "aten"):
            _backend.refuse(name, reason)
        return result

    def _in_graph(self, input: fx.Proxy, *args: Any, **kwargs: Any) -> Any:
        """One node of a torch.fx graph, as torch.fx makes of torch.nn's modules."""
        tracer: Any = input.tracer
        return tracer.create_proxy(
            "call_module", tracer.path_of_module(self), (input, *args), kwargs
        )

    def __prepare_scriptable__(self) -> None:
        """torch.jit.script asks for a module to compile in place of this one."""
        torchscript.refuse_script(self.torch_class.__name__)

    def extra_repr(self) -> str:
        own = super().extra_repr()
        return own if self.backend is None else f"{own}, backend={self.backend!r}"


class _Layers(_Backed, nn.RNNBase):
    """A stack of layers of one kind of cell."""

    recompute: bool = False
    """Whether no gates are saved for the backward; may be set at any time."""
    tokens: bool = False
    """Whether inputs are integer tokens, which stand for one-hot vectors."""

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
        self.backend = _check_backend(backend)
        for name in [name for name in self._flat_weights_names if name.startswith("weight_ih_l0")]:
            if tokens:
                weight = getattr(self, name)
                weight.data = _tokens.column_major(weight.data)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        # by name only, if torch.onnx.export(dynamo=False) did not give defaults by position
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
        return_cells: bool = False,
        embedding: nn.Embedding | None = None,
    ) -> Any:
        """Runs the layers over a batch of sequences or a single one.

        Args:
            input: (T, B, I), (B, T, I) with ``batch_first``, (T, I) for a single sequence, or a
                PackedSequence. With ``tokens`` or ``embedding``, integers without the dimension I.
            hx: The initial state (L*D, B, H), or (L*D, H) for a single sequence; for LSTM a pair of
                such, (h, c). None is zeros.
            lengths: Integers (B) from 0 to T, or None: how many steps each sequence has, in any
                order and on any device. Outputs beyond are zeros, and the final state is that after
                the last step.
            reset: Booleans (T, B), (B, T) with ``batch_first``, (T) for a single sequence, or None:
                where ``reset[t]`` is true, the state is zeros before step t and no gradient passes;
                if bidirectional, nothing passes from step t back to t - 1 either.
            return_cells: Whether to return the c of every step, too; only LSTM has them.
            embedding: If not None, what ``input`` are tokens of: the same as ``embedding(input)``
                in place of ``input``, but W_ih is multiplied with each vector once, however often
                its token occurs.

        Returns:
            output (T, B, D*H), arranged like ``input``, and the final state, shaped like ``hx``;
            with ``return_cells`` also the c of every step of the last layer, shaped like the
            output.

        Raises:
            ValueError, RuntimeError: As torch.nn, and where a forced backend cannot run.
            ValueError: A length is out of range, or ``return_cells`` is asked of another cell than
                LSTM.
            TypeError: ``lengths`` or tokens are no integers, ``reset`` no booleans.
            IndexError: A token is out of range.
        """
        cell, weights = _CELL_OF_MODE[self.mode], self._read(self._flat_weights_names)
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
        if not return_cells and (extension := _backend.short_way(self.backend)):
            # `_layout` written out, as its call would take a good part of a single step
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
        x, states, single = input, _states(cell, hx), input.dim() == 2
        time = 1 if self.batch_first else 0
        if single:
            checks.refuse_freed(input=x, hidden=states)
            x, states = x.unsqueeze(1 - time), _unsqueeze(states, 1)
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

    def _take_tokens(
        self, input: Any, weights: Any, lengths: Any, embedding: nn.Embedding | None
    ) -> tuple[Any, Any, bool]:
        """Input and weights as for input that is not of tokens; whether they are tokens still."""
        if isinstance(input, fx.Proxy):
            return input if embedding is None else embedding(input), weights, False
        if self.tokens and embedding is not None:
            raise ValueError("tokens=True stands for one-hot vectors: no embedding can be given")
        data, *rest = input if isinstance(input, PackedSequence) else (input,)
        if not isinstance(data, Tensor) or not 1 <= data.dim() <= (1 if rest else 2):
            found = list(data.shape) if isinstance(data, Tensor) else type(data).__name__
            raise RuntimeError(f"expected tokens of 1 or 2 dimensions, time and batch, got {found}")
        checks.refuse_freed(tokens=data, parameter=weights)
        if embedding is not None:
            checks.refuse_freed(embedding=embedding.weight)
        steps = None
        if lengths is not None and data.dim() == 2:
            # refused here already where wrong, as the tokens beyond are replaced
            extras = checks.check_extras(data, lengths, None, False, self.batch_first)
            time = torch.arange(data.shape[1 if self.batch_first else 0], device=data.device)
            steps = time.unsqueeze(1) < _given(extras.lengths).to(data.device)
            steps = steps.t() if self.batch_first else steps
        data = _tokens.check(data, steps)
        options = self._options()
        if embedding is None:
            x, weights = _tokens.one_hot_input(data, weights, options, self.backend)
        elif embedding.embedding_dim != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, "
                f"got {embedding.embedding_dim}"
            )
        else:
            x, weights = _tokens.embedded_input(data, embedding, weights, options, self.backend)
        result = PackedSequence(x, *rest) if rest else x
        return result, weights, x.dtype is torch.int64

    def _forward_packed(
        self, cell: Cell, input: Any, hx: Any, weights: Any, tokens: bool, return_cells: bool
    ) -> Any:
        if not isinstance(input, PackedSequence):
            return self._forward_in_torch(input, hx, "input is no tensor")
        data, batch_sizes, order, inverse = input
        if problem := checks.packed_problem(input):
            raise RuntimeError(problem)
        name = _backend.choose(self.backend, weights[1])
        served = name == "reference" or (name == "fused" and data.device.type == "cpu")
        served = served and not _backend.is_tracing()  # which would keep the number of sequences
        states, options, batch = _states(cell, hx), self._options(), int(batch_sizes[0])
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
        if not return_cells and (extension := _backend.short_way(self.backend)):
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

    def _check_weights(self, cell: Cell, weights: Any, options: Options) -> None:
        """Refuses weights whose sizes have changed; only torch's kernels do not look themselves.

        Raises:
            RuntimeError: There are some.
        """
        if _backend.choose(self.backend, weights[1]) == "aten":
            sizes = self.input_size, self.hidden_size
            if problem := checks.stack_problem(cell, weights, options, *sizes):
                raise RuntimeError(problem)

    def _refuse(self, input: Any, hx: Any, problem: str) -> NoReturn:
        """Raises what torch.nn raises for a malformed call, or else ``problem``."""
        with checks.ChecksOnly(problem):
            self.torch_class.forward(self, input, hx)
        raise RuntimeError(problem)

    def _check_extras(self, input: Any, lengths: Any, reset: Any, return_cells: bool) -> None:
        """Refuses combinations; `checks.check_extras` looks at the values."""
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
        )

    def _layout(self) -> tuple[Any, ...]:
        """How layers are put together, as the extension's ``run_layers`` takes it."""
        return (
            self.num_layers,
            self.bias,
            self.proj_size,
            self.dropout if self.training else 0.0,
            self.batch_first,
            self.bidirectional,
            self.recompute,
        )


class RNN(_Layers):
    """Elman layers, h' = tanh or relu of (W_ih x + b_ih + W_hh h + b_hh); as torch.nn.RNN.

    Args:
        input_size: I, the number of features of an input.
        hidden_size: H, the number of features of the state.
        num_layers: L; each layer reads the outputs of the one below.
        nonlinearity: "tanh" or "relu".
        bias: Whether to add b_ih and b_hh.
        batch_first: Whether inputs and outputs are (B, T, features) and not (T, B, features).
        dropout: Probability of zeroing an output of any layer but the last, in training.
        bidirectional: Whether each layer also runs from the end of the sequence to the start.
        device, dtype: Of the parameters.
        recompute: Save no gates for the backward, which computes them again from the states: less
            memory for more time. The fused kernels on the CPU do; elsewhere it changes nothing.
        tokens: Whether inputs are integers (T, B) from 0 to I - 1, each standing for a one-hot
            vector, which is not written out. ``weight_ih_l0`` has its usual shape but lies column
            by column in memory: what asks for contiguous parameters (safetensors,
            ``parameters_to_vector``, ``torch.optim.LBFGS``) needs a ``contiguous()`` copy of it.
        backend: None, or the backend to force; see `rnnfast.backend`.

    Raises:
        ValueError, TypeError: As torch.nn.RNN, and ValueError for an unknown ``backend``.
    """

    torch_class = nn.RNN

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: _Device = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        tokens: bool = False,
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        _refuse_projection(kwargs)
        functional.elman(nonlinearity)
        self.nonlinearity = nonlinearity
        super().__init__(
            f"RNN_{nonlinearity.upper()}",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            recompute=recompute,
            tokens=tokens,
            backend=backend,
            **kwargs,
        )


class LSTM(_Layers):
    """Long short-term memory; as torch.nn.LSTM.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional: As in `RNN`.
        proj_size: If not 0, the size P to which h is projected, h = W_hr (o * tanh(c)): outputs and
            h have P features then, c has ``hidden_size``.
        device, dtype, recompute, tokens, backend: As in `RNN`.
    """

    torch_class = nn.LSTM

    # torch.nn's forward calls these on self; Any, because they differ in type from RNNBase's.
    get_expected_cell_size: Any = nn.LSTM.get_expected_cell_size
    check_forward_args: Any = nn.LSTM.check_forward_args
    permute_hidden: Any = nn.LSTM.permute_hidden

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: _Device = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        tokens: bool = False,
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device=device,
            dtype=dtype,
            recompute=recompute,
            tokens=tokens,
            backend=backend,
            **kwargs,
        )


class GRU(_Layers):
    """Gated recurrent units; as torch.nn.GRU.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional: As in `RNN`.
        device, dtype, recompute, tokens, backend: As in `RNN`.
    """

    torch_class = nn.GRU

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: _Device = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        tokens: bool = False,
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        _refuse_projection(kwargs)
        super().__init__(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            recompute=recompute,
            tokens=tokens,
            backend=backend,
            **kwargs,
        )


class _OneStep(_Backed, nn.RNNCellBase):
    """One step of one kind of cell."""

    @property
    def _cell(self) -> Cell | None:
        """The row of the table of cells, None if there is none for this module."""
        raise NotImplementedError

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Takes one step.

        Args:
            input: (B, I), or (I) for a single input.
            hx: The state (B, H), or (H); for LSTMCell a pair of such, (h, c). None is zeros.

        Returns:
            The next state, shaped like ``hx``.

        Raises:
            ValueError, RuntimeError: As torch.nn, and where a forced backend cannot run.
        """
        cell = self._cell
        if not isinstance(input, Tensor) and isinstance(input, fx.Proxy):
            return self._in_graph(input, hx)
        if cell is None or not isinstance(input, Tensor):
            return self._forward_in_torch(input, hx, "the module or its input is malformed")
        weights = self._read(_CELL_WEIGHTS)
        if extension := _backend.short_way(self.backend):
            kind = _backend.CELL_KINDS[cell.name]
            biases = weights[2] is not None or weights[3] is not None
            result = extension.run_step(kind, input, hx, weights if biases else weights[:2], biases)
            if result is not None:
                return result
        x, states, single = input, _states(cell, hx), input.dim() == 1
        if single:
            checks.refuse_freed(input=x, hidden=states)
            x, states = x.unsqueeze(0), _unsqueeze(states, 0)
        problem = checks.step_problem(cell, x, states, weights)
        if problem:
            return self._forward_in_torch(input, hx, problem)
        finals = sequences.run_step(cell, x, states, weights, self.backend)
        if single:
            finals = tuple(final.squeeze(0) for final in finals)
        return finals if cell.states > 1 else finals[0]


class RNNCell(_OneStep):
    """One step of an Elman cell; as torch.nn.RNNCell.

    Args:
        input_size: I, the number of features of an input.
        hidden_size: H, the number of features of the state.
        bias: Whether to add b_ih and b_hh.
        nonlinearity: "tanh" or "relu".
        device, dtype: Of the parameters.
        backend: None, or the backend to force; see `rnnfast.backend`.

    Raises:
        ValueError: Unknown ``backend``.
    """

    torch_class = nn.RNNCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: _Device = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity
        self.backend = _check_backend(backend)

    @property
    def _cell(self) -> Cell | None:
        return functional.ELMAN.get(self.nonlinearity)


class LSTMCell(_OneStep):
    """One step of an LSTM cell; as torch.nn.LSTMCell.

    Args:
        input_size, hidden_size, bias, device, dtype, backend: As in `RNNCell`.
    """

    torch_class = nn.LSTMCell
    _cell = CELLS["lstm"]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: _Device = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        gates = CELLS["lstm"].gates
        super().__init__(input_size, hidden_size, bias, gates, device=device, dtype=dtype)
        self.backend = _check_backend(backend)


class GRUCell(_OneStep):
    """One step of a gated recurrent unit; as torch.nn.GRUCell.

    Args:
        input_size, hidden_size, bias, device, dtype, backend: As in `RNNCell`.
    """

    torch_class = nn.GRUCell
    _cell = CELLS["gru"]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: _Device = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        gates = CELLS["gru"].gates
        super().__init__(input_size, hidden_size, bias, gates, device=device, dtype=dtype)
        self.backend = _check_backend(backend)


def _check_backend(name: str | None) -> str | None:
    return None if name is None else _backend.check_name(name, "backend")


def _refuse_projection(kwargs: dict[str, Any]) -> None:
    if "proj_size" in kwargs:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _states(cell: Cell, hx: Any) -> Any:
    """``hx`` as a sequence of states; anything malformed is left for the checks to find."""
    return hx if hx is None or cell.states > 1 else (hx,)


def _unsqueeze(states: Any, dim: int) -> Any:
    """Gives the states of a single sequence the dimension of the batch."""
    if not isinstance(states, (tuple, list)):
        return states
    return tuple(s.unsqueeze(dim) if isinstance(s, Tensor) else s for s in states)
