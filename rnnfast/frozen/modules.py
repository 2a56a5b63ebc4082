"""Frozen layers and cells: how a call runs.

Sizes: T time steps, B sequences, I inputs, H hidden units, P the size of h (H unless projected), G
gates, L layers, D directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .. import backend, checks, onnx, sequences
from .. import tokens as _tokens
from ..bases import CELL_OF_MODE, states_of, unsqueeze_states
from ..functional import ELMAN
from ..reference import CELLS, Cell, LayerInputs, LayerOutputs, autocast_enabled
from ..sequences import Extras, Options
from .weights import Frozen, Matrix, Weights


class FrozenLayers(Frozen):
    """Frozen layers, which `freeze` makes of RNN, LSTM and GRU.

    A call takes the arguments of `rnnfast.LSTM` and its like, without ``return_cells``, and returns
    the same. Dropout never applies. Inputs and states are float32. Under autocast other
    floating-point types are converted, and the results have the type of autocast.
    """

    tokens: bool = False
    """Whether inputs are integer tokens, each of which stands for a one-hot vector."""

    def __init__(
        self,
        source: nn.RNNBase,
        torch_class: type[nn.Module],
        weights: str,
        given: Mapping[str, Weights] | None = None,
    ) -> None:
        sizes = source.input_size, source.hidden_size, source.proj_size or source.hidden_size
        cell, tokens = CELL_OF_MODE[source.mode], getattr(source, "tokens", False)
        matrices = _matrices_of_layers(
            cell, sizes, source.num_layers, source.bias, source.bidirectional, tokens
        )
        super().__init__(source, matrices, weights, given)
        self.torch_class = torch_class
        self._cell_name, self.tokens = cell.name, tokens
        self.mode, self.bias, self.dropout = source.mode, source.bias, 0.0
        self.input_size, self.hidden_size = source.input_size, source.hidden_size
        self.num_layers, self.proj_size = source.num_layers, source.proj_size
        self.batch_first, self.bidirectional = source.batch_first, source.bidirectional

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
        embedding: nn.Embedding | None = None,
    ) -> Any:
        """Runs the layers over a batch of sequences, or over a single one.

        Raises:
            RuntimeError: Shapes, dtypes or devices do not fit, in torch.nn's words, or an argument
                needs a gradient.
            ValueError: The layers read one-hot tokens, and an embedding is given.
            TypeError: Tokens are no integers.
            IndexError: A token is out of range.
        """
        if lengths is None and reset is None and embedding is None:
            x = input.unsqueeze(-1) if self.tokens and isinstance(input, Tensor) else input
            result = self._run_short(x, hx, None, None, self._blocks())
            if result is not None:
                return result
        tables: list[Tensor] = []
        if self.tokens or embedding is not None:
            input, tables = self._take_tokens(input, hx, lengths, embedding)
        self._refuse_gradients(input, hx)
        if isinstance(input, PackedSequence) and not (lengths is None and reset is None):
            raise RuntimeError("lengths and reset need a tensor as input, got a PackedSequence")
        if lengths is not None and isinstance(input, Tensor) and input.dim() == 2:
            raise RuntimeError("lengths need a batch of sequences, got a single one")
        if not autocast_enabled("cpu"):
            return self._forward(input, hx, lengths, reset, tables)
        dtype = torch.get_autocast_dtype("cpu")
        with torch.autocast("cpu", enabled=False):
            input, hx = (_converted(value, torch.float32) for value in (input, hx))
            return _converted(self._forward(input, hx, lengths, reset, tables), dtype)

    def _take_tokens(
        self, input: Any, hx: Any, lengths: Any, embedding: nn.Embedding | None
    ) -> tuple[Any, list[Tensor]]:
        """What runs in place of tokens: these and their tables, one a direction; or vectors.

        Raises:
            ValueError, RuntimeError, TypeError: As `forward`.
        """
        if self.tokens and embedding is not None:
            raise ValueError("tokens=True stands for one-hot vectors: no embedding can be given")
        data, *rest = input if isinstance(input, PackedSequence) else (input,)
        tokens = _tokens.checked(data, lengths, self.batch_first, packed=bool(rest))
        if embedding is None:
            x, tables = tokens.unsqueeze(-1), self._first_blocks()
        else:
            x, tables = self._take_embedding(tokens, hx, embedding)
        return PackedSequence(x, *rest) if rest else x, tables

    def _take_embedding(
        self, tokens: Tensor, hx: Any, embedding: nn.Embedding
    ) -> tuple[Tensor, list[Tensor]]:
        """As `_take_tokens`. A table has W_ih x + b_ih of all tokens, or of those that occur."""
        _tokens.check_embedding(embedding, self.input_size)
        found = None
        # ONNX has no tables, and torch.export may leave open how many tokens there are.
        if not (torch.compiler.is_exporting() or backend.is_tracing()):
            found = _tokens.occurring(tokens, embedding)
        if found is None or found[0].dtype is not torch.float32:
            return _tokens.look_up(tokens, embedding), []
        vectors, places = found
        self._refuse_gradients(vectors, hx)
        return places.unsqueeze(-1), self._tables_of(vectors)

    def _first_blocks(self) -> list[Tensor]:
        """The blocks of the first layer's W_ih, one for each direction."""
        per_layer = self._options().tensors_per_layer
        return self._blocks()[: self._options().directions * per_layer : per_layer]

    def _tables_of(self, vectors: Tensor) -> list[Tensor]:
        """The tables of tokens with these vectors (V, I), one for each direction, as blocks."""
        self._make_readable()
        return [
            torch.ops.rnnfast.frozen_table(self._cell_name, vectors, block, self.hidden_size)
            for block in self._first_blocks()
        ]

    def _blocks_for(self, embedding: nn.Embedding | None) -> list[Tensor]:
        """All blocks, with those of tables for tokens of an embedding, or for one-hot tokens."""
        self._make_readable()
        return self._with_tables([] if embedding is None else self._tables_of(embedding.weight))

    def _with_tables(self, tables: list[Tensor]) -> list[Tensor]:
        """All blocks, with tables in place of the first layer's W_ih."""
        blocks, per_layer = self._blocks(), self._options().tensors_per_layer
        for direction, table in enumerate(tables):
            blocks[direction * per_layer] = table
        return blocks

    def _forward(self, input: Any, hx: Any, lengths: Any, reset: Any, tables: list[Tensor]) -> Any:
        """`forward` after gradients and autocast. The input is tokens if there are ``tables``."""
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, tables)
        if not isinstance(input, Tensor):
            self._refuse(input, hx, "input is no tensor")
        cell, states, single = self._cell, states_of(self._cell, hx), input.dim() == 2
        self._make_readable()
        extras = Extras()
        if input.dim() == 3:
            if not (lengths is None and reset is None):
                extras = checks.check_extras(input, lengths, reset, False, self.batch_first)
            blocks = self._with_tables(tables)
            result = self._run_short(input, hx, extras.lengths, extras.reset, blocks)
            if result is not None:
                return result
        x, time = input, 1 if self.batch_first else 0
        if single:
            checks.refuse_freed(input=x, hidden=states)
            x, states = x.unsqueeze(1 - time), unsqueeze_states(states, 1)
        options = self._options(self.batch_first)
        problem = checks.sequence_problem(
            cell, x, states, self._stand_ins(), options, tokens=bool(tables)
        )
        self._refuse_problem(input, hx, problem, tables)
        if single and reset is not None:
            reset = checks.as_reset(reset, x).unsqueeze(1 - time)
            extras = checks.check_extras(x, None, reset, False, self.batch_first)
        y, finals = self._run(x.transpose(0, 1) if time else x, states, extras, tables)
        y = y.transpose(0, 1) if time else y
        if single:
            y, finals = y.squeeze(1 - time), tuple(final.squeeze(1) for final in finals)
        return y, finals if cell.states > 1 else finals[0]

    def _refuse_problem(
        self, input: Any, hx: Any, problem: str | None, tables: list[Tensor]
    ) -> None:
        if problem and tables:  # torch.nn has no words for tokens
            raise RuntimeError(problem)
        if problem:
            self._refuse(input, hx, problem)

    def _sizes(self) -> dict[str, Any]:
        sizes = {"input_size": self.input_size, "hidden_size": self.hidden_size}
        more = {"num_layers": self.num_layers, "proj_size": self.proj_size, "bias": int(self.bias)}
        return {"module": "layers", "cell": self._cell_name, **sizes, **more}

    def flatten_parameters(self) -> None:
        """Does nothing. Models call it, since torch.nn's layers have it."""

    def _forward_packed(self, input: PackedSequence, hx: Any, tables: list[Tensor]) -> Any:
        data, batch_sizes, order, inverse = input
        if problem := checks.packed_problem(input):
            raise RuntimeError(problem)
        cell, states, batch = self._cell, states_of(self._cell, hx), int(batch_sizes[0])
        problem = checks.sequence_problem(
            cell, data, states, self._stand_ins(), self._options(), batch, bool(tables)
        )
        self._refuse_problem(input, hx, problem, tables)
        if order is not None and states is not None:
            states = tuple(state.index_select(1, order) for state in states)
        lengths = (batch_sizes.unsqueeze(1) > torch.arange(batch, device="cpu")).sum(0)
        self._make_readable()
        y, finals = self._run(data, states, Extras(lengths), tables)
        if inverse is not None:
            finals = tuple(final.index_select(1, inverse) for final in finals)
        output = PackedSequence(y, batch_sizes, order, inverse)
        return output, finals if cell.states > 1 else finals[0]

    def _run_short(
        self,
        x: Any,
        hx: Any,
        lengths: Tensor | None,
        reset: Tensor | None,
        blocks: list[Tensor],
    ) -> Any:
        """The results of a plain call, from C++ alone; None if anything about it is unusual."""
        extension = backend.short_path("fused")
        if extension is None:
            return None
        return extension.run_layers(
            backend.CELL_KINDS[self._cell_name],
            x,
            hx,
            blocks,
            self.num_layers,
            False,  # the biases are in the blocks
            self.proj_size,
            0.0,
            self.batch_first,
            self.bidirectional,
            False,
            lengths,
            reset,
        )

    def _run(
        self, x: Tensor, states: Any, extras: Extras, tables: list[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Runs all layers. x is (T, B, I), or packed (N, I) with lengths; I is 1 for tokens."""
        options, blocks = self._options(), self._with_tables(tables)
        if states is None:
            batch = x.shape[1] if extras.lengths is None else extras.lengths.shape[0]
            sizes = sequences.state_sizes(self._cell, self._stand_ins(), options)
            rows = options.num_layers * options.directions
            zeros = partial(torch.zeros, dtype=torch.float32, device=x.device)
            states = tuple(zeros(rows, batch, size) for size in sizes)
        y, finals, _ = sequences.stack(_layer, self._cell, x, states, blocks, options, extras)
        return y, finals

    @property
    def _cell(self) -> Cell:
        return CELL_OF_MODE[self.mode]

    def _options(self, batch_first: bool = False) -> Options:
        return Options(
            num_layers=self.num_layers,
            has_biases=False,  # they are in the blocks
            bidirectional=self.bidirectional,
            batch_first=batch_first,
            proj_size=self.proj_size,
        )

    def _twin(self) -> nn.Module:
        nonlinearity = {"nonlinearity": self.mode[4:].lower()} if self.mode[:3] == "RNN" else {}
        projection = {"proj_size": self.proj_size} if self.mode == "LSTM" else {}
        return self.torch_class(
            self.input_size,
            self.hidden_size,
            self.num_layers,
            bias=self.bias,
            batch_first=self.batch_first,
            bidirectional=self.bidirectional,
            device="meta",
            **nonlinearity,
            **projection,
        )


class FrozenCell(Frozen):
    """A frozen cell, which `freeze` makes of RNNCell, LSTMCell and GRUCell.

    A call takes the arguments of torch.nn's cell and returns the same. Inputs and states are as for
    `FrozenLayers`.
    """

    def __init__(
        self,
        source: nn.RNNCellBase,
        torch_class: type[nn.Module],
        weights: str,
        given: Mapping[str, Weights] | None = None,
    ) -> None:
        nonlinearity = getattr(source, "nonlinearity", None)
        others = {nn.LSTMCell: "lstm", nn.GRUCell: "gru"}
        cell = CELLS[others[torch_class]] if torch_class in others else ELMAN[str(nonlinearity)]
        rows = cell.gates * source.hidden_size
        bias = source.bias_ih is not None
        super().__init__(
            source,
            [
                _matrix("ih", "", (rows, source.input_size), cell.gates, bias),
                _matrix("hh", "", (rows, source.hidden_size), cell.gates, bias),
            ],
            weights,
            given,
        )
        self.torch_class = torch_class
        self._cell_name = cell.name
        self.nonlinearity, self.bias = nonlinearity, bias
        self.input_size, self.hidden_size = source.input_size, source.hidden_size

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Computes the next state.

        Raises:
            RuntimeError: Shapes, dtypes or devices do not fit, in torch.nn's words, or an argument
                needs a gradient.
        """
        result = self._run_short(input, hx)
        if result is not None:
            return result
        self._refuse_gradients(input, hx)
        if autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            with torch.autocast("cpu", enabled=False):
                return _converted(self(*(_converted(v, torch.float32) for v in (input, hx))), dtype)
        if not isinstance(input, Tensor):
            self._refuse(input, hx, "input is no tensor")
        self._make_readable()
        result = self._run_short(input, hx)
        if result is not None:
            return result
        cell = CELLS[self._cell_name]
        x, states, single = input, states_of(cell, hx), input.dim() == 1
        if single:
            checks.refuse_freed(input=x, hidden=states)
            x, states = x.unsqueeze(0), unsqueeze_states(states, 0)
        w_ih, w_hh = self._stand_ins()
        if problem := checks.step_problem(cell, x, states, (w_ih, w_hh, None, None)):
            self._refuse(input, hx, problem)
        if states is None:
            states = (x.new_zeros(x.shape[0], self.hidden_size),) * cell.states
        w_ih, w_hh = self._blocks()
        inputs = LayerInputs(x.unsqueeze(0), states, w_ih, w_hh, None, None, False)
        finals = _layer(cell, inputs).states
        if single:
            finals = tuple(final.squeeze(0) for final in finals)
        return finals if cell.states > 1 else finals[0]

    def _sizes(self) -> dict[str, Any]:
        sizes = {"input_size": self.input_size, "hidden_size": self.hidden_size}
        more = {"num_layers": 1, "proj_size": 0, "bias": int(self.bias)}
        return {"module": "cell", "cell": self._cell_name, **sizes, **more}

    def _run_short(self, x: Any, hx: Any) -> Any:
        extension = backend.short_path("fused")
        if extension is None:
            return None
        kind = backend.CELL_KINDS[self._cell_name]
        return extension.run_step(kind, x, hx, self._blocks(), False)

    def _twin(self) -> nn.Module:
        nonlinearity = {"nonlinearity": self.nonlinearity} if self.nonlinearity else {}
        return self.torch_class(
            self.input_size, self.hidden_size, bias=self.bias, device="meta", **nonlinearity
        )


def _matrices_of_layers(
    cell: Cell,
    sizes: tuple[int, int, int],
    layers: int,
    bias: bool,
    bidirectional: bool,
    tokens: bool,
) -> list[Matrix]:
    """The matrices of a stack of layers with the sizes I, H and P, in torch.nn's order."""
    inputs, hidden, h_size = sizes
    rows = cell.gates * hidden
    found = []
    for k in range(layers):
        columns = inputs if k == 0 else h_size * (2 if bidirectional else 1)
        for direction in ("", "_reverse")[: 1 + bidirectional]:
            end = f"_l{k}{direction}"
            first = _matrix("ih", end, (rows, columns), cell.gates, bias)
            found.append(first._replace(is_table=tokens and k == 0))
            found.append(_matrix("hh", end, (rows, h_size), cell.gates, bias))
            if h_size != hidden:
                found.append(_matrix("hr", end, (h_size, hidden), 1, False))
    return found


def _matrix(kind: str, end: str, shape: tuple[int, int], gates: int, bias: bool) -> Matrix:
    """The matrix that torch.nn calls ``weight_<kind><end>``."""
    name = f"{kind}{end}"
    return Matrix(
        f"packed_{name}", f"weight_{name}", f"bias_{name}" if bias else None, shape, gates
    )


def _layer(cell: Cell, inputs: LayerInputs) -> LayerOutputs:
    """`rnnfast.reference.layer` with blocks of frozen weights, which hold the biases."""
    if backend.is_tracing():
        onnx.refuse_unknown("rnnfast::frozen_layer")
    x, states, w_ih, w_hh, _, _, reverse, lengths, reset, w_hr, _ = inputs
    c0 = states[1] if cell.states > 1 else None
    y, *finals = torch.ops.rnnfast.frozen_layer(
        cell.name, x, states[0], c0, w_ih, w_hh, w_hr, reverse, lengths, reset
    )
    return LayerOutputs(y, tuple(finals[: cell.states]), None)


def _converted(value: Any, dtype: torch.dtype) -> Any:
    """Tensors, tuples of them and packed sequences in ``dtype``; anything else as it is."""
    if isinstance(value, PackedSequence):
        return value._replace(data=_converted(value.data, dtype))
    if isinstance(value, (tuple, list)):
        return tuple(_converted(one, dtype) for one in value)
    if isinstance(value, Tensor) and sequences.is_castable(value):
        return value.to(dtype)
    return value
