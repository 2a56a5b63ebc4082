"""The modules that run a user's cell: `Layer` over sequences, `LayerCell` for a single step."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

from .. import checks
from ..bases import CELL_WEIGHTS, Device, Layers, OneStep, check_backend
from ..reference import Cell
from ..sequences import is_cast
from .cells import CustomCell

Shape = tuple[int, ...]
_OF_INPUT = ("weight_ih", "bias_ih")
_SUFFIX = re.compile(r"_l\d+(_reverse)?$")
"""What follows the name of a parameter in a stack of layers."""


class Layer(Layers):
    """Recurrent layers of a cell that `rnnfast.cell` has made.

    A call computes for every step t, with the function of the cell::

        states_t = cell(W_ih x_t + b_ih, W_hh h_(t-1) + b_hh, states_(t-1), parameters)

    Where nothing else is said, arguments, shapes, initial values and errors are those of
    `rnnfast.LSTM`. A cell with several states takes and returns a tuple of them where an LSTM has
    (h, c), in the order of the cell's ``state``.

    Calls on the CPU run the cell's own kernels. They are compiled by the first call with tensors of
    a dtype, in some seconds, and kept on disk in the folder that ``RNNFAST_CELL_CACHE`` names.
    Without a C++ compiler, on other devices, and under forward-mode AD and torch.func, plain
    PyTorch runs.

    Sizes: T time steps, B batch, I input features, H hidden features, G gates, L layers, D
    directions.

    Args:
        cell: What `rnnfast.cell` returns.
        input_size: I. Or None if inputs are gates, W_ih x + b_ih, which come from other modules
            such as a batch normalisation. The first layer then has neither W_ih nor b_ih, and I is
            G*H.
        hidden_size: H.
        num_layers: L. Default: 1.
        bias: Whether there are biases. Default: True.
        batch_first: Whether input and output are (B, T, features). Default: False.
        dropout: The probability with which dropout between layers zeroes elements. Default: 0.
        bidirectional: Whether each layer also runs from the end. Default: False.
        device: The device of the parameters.
        dtype: The dtype of the parameters.
        tokens: Whether inputs are integer tokens, each of which stands for a one-hot vector.
            Default: False.
        recompute: Whether the backward computes again what it would otherwise read from memory.
            It changes nothing for a cell with ``norm="layer"``. Default: False.
        backend: "fused", "reference" or "auto" to force what runs the calls, or None for
            `rnnfast.use_backend` or the default; see `rnnfast.backend`. Default: None.

    Inputs:
        input: (T, B, I), (B, T, I) with ``batch_first``, (T, I) for a single sequence, or a
            PackedSequence; with ``tokens=True`` without the dimension of I.
        hx: The states (L*D, B, H): one tensor, or a tuple with one for each state of the cell.
            Default: None, zeros.
        lengths, reset, embedding: As for `rnnfast.LSTM`. There is no ``return_cells=True``.

    Outputs:
        output: The h of every step, (T, B, D*H) or like the input.
        h_n: The states after the last step, in the form of hx.

    Weights:
        weight_ih_l[k]: W_ih (G*H, I), or (G*H, D*H) for k > 0; ``_reverse`` follows in the names of
            the reverse direction.
        weight_hh_l[k]: W_hh (G*H, H). Like bias_hh it is missing with ``recurrent=False``.
        bias_ih_l[k], bias_hh_l[k]: b_ih and b_hh (G*H).
        [parameter]_l[k]: Each learnable vector of the cell (H), by its name.
        norm_weight_l[k], norm_bias_l[k]: Of a cell with ``norm="layer"`` (G*H).

    All are drawn from the uniform distribution between -1/sqrt(H) and 1/sqrt(H), except parameters
    for which the cell gives a value, norm_weight, which is 1, and norm_bias, which is 0.

    Raises:
        TypeError: ``cell`` is not what `rnnfast.cell` returns.
        ValueError: A size or option is out of range.
        RuntimeError: Of a call: shapes, dtypes or devices do not fit, or a forced backend cannot
            run.

    Example:
        >>> @rnnfast.cell(gates=4, state=("h", "c"), parameters=("p_i", "p_f", "p_o"))
        ... def peephole_lstm(x, h, state, p):  # Gers, Schraudolph and Schmidhuber, JMLR 3, 2002
        ...     i = torch.sigmoid(x[0] + h[0] + p.p_i * state.c)
        ...     f = torch.sigmoid(x[1] + h[1] + p.p_f * state.c)
        ...     c = f * state.c + i * torch.tanh(x[2] + h[2])
        ...     o = torch.sigmoid(x[3] + h[3] + p.p_o * c)
        ...     return o * torch.tanh(c), c
        >>> layer = rnnfast.Layer(peephole_lstm, 10, 20, num_layers=2)
        >>> output, (h_n, c_n) = layer(torch.randn(5, 3, 10))
        >>> c_n.shape
        torch.Size([2, 3, 20])
    """

    def __init__(
        self,
        cell: CustomCell,
        input_size: int | None,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        tokens: bool = False,
        recompute: bool = False,
        backend: str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # torch.nn's layers know their own kinds of cells alone
        _check_cell(cell)
        for name, size in (
            ("input_size", 1 if input_size is None else input_size),
            ("hidden_size", hidden_size),
            ("num_layers", num_layers),
        ):
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")
            if size < (0 if name == "input_size" else 1):
                raise ValueError(f"{name} must be greater than zero")
        if isinstance(dropout, bool) or not 0 <= dropout <= 1:
            raise ValueError(
                "dropout should be a number in range [0, 1] representing the probability of an "
                "element being zeroed"
            )
        if input_size is None and (tokens or bidirectional):
            option = "tokens=True" if tokens else "bidirectional=True"
            raise ValueError(f"input_size=None cannot be combined with {option}")
        self.cell = cell
        self._plain_states = _plain_states(cell)
        self.mode = "CUSTOM"
        self.takes_gates = input_size is None
        self.input_size = cell.gates * hidden_size if input_size is None else input_size
        self.hidden_size, self.num_layers = hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.proj_size = bidirectional, 0
        # Gates are a table for the kernels, and the steps its rows' numbers: tokens.
        self.tokens = tokens or self.takes_gates
        self.recompute = recompute
        self.backend = check_backend(backend)
        _ = cell.row  # registers it with torch

        directions = 2 if bidirectional else 1
        self._all_weights = []
        self._own_names: list[list[str]] = []  # the same without the suffixes
        for layer in range(num_layers):
            for suffix in (f"_l{layer}", f"_l{layer}_reverse")[:directions]:
                columns = self.input_size if layer == 0 else directions * hidden_size
                shapes = _shapes(cell, columns, hidden_size, bias)
                if layer == 0 and self.takes_gates:
                    shapes = {name: shapes[name] for name in shapes if name not in _OF_INPUT}
                for name, shape in shapes.items():
                    tensor = torch.empty(shape, device=device, dtype=dtype)
                    self.register_parameter(name + suffix, nn.Parameter(tensor))
                self._all_weights.append([name + suffix for name in shapes])
                self._own_names.append(list(shapes))
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self._init_flat_weights()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all weights anew."""
        for name, weight in self.named_parameters(recurse=False):
            _fill(self.cell, _SUFFIX.sub("", name), weight, self.hidden_size)

    def flatten_parameters(self) -> None:
        """Does nothing: it is for cuDNN, which knows no such cells."""

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
        return_cells: bool = False,
        embedding: nn.Embedding | None = None,
    ) -> Any:
        """Runs the layers over a batch of sequences, or over a single one.

        The arguments and results are those under "Inputs" and "Outputs" in the class.
        """
        if return_cells:
            raise ValueError("return_cells is only supported for LSTM, not for cells of users")
        # calls of other functions would be noticed in a single step of a small layer
        if self._plain_states or isinstance(input, fx.Proxy):
            if self._plain_states == 2 and not (type(hx) is tuple and len(hx) == 2):
                _joined_states(self.cell, hx)  # checks them
            return Layers.forward(self, input, hx, lengths, reset, return_cells, embedding)
        states = _joined_states(self.cell, hx)
        output, finals = super().forward(input, states, lengths, reset, return_cells, embedding)
        return output, _separate_states(self.cell, finals)

    @property
    def _cell(self) -> Cell:
        return self.cell.row

    def _read(self, names: list[str]) -> list[Tensor]:
        tensors = super()._read(names)
        plain = self.cell.recurrent and not self._cell.parameters
        return tensors if plain or self.takes_gates else self._completed(tensors)

    def _completed(self, tensors: list[Tensor], gates: Tensor | None = None) -> list[Tensor]:
        """The parameters of all layers as the operators take them."""
        result: list[Tensor] = []
        for names in self._own_names:
            own = dict(zip(names, tensors, strict=False))
            tensors = tensors[len(names) :]
            result += _of_layer(self.cell, own, self.hidden_size, self.bias, gates)
            gates = None
        return result

    def _take_tokens(
        self, input: Any, weights: list[Tensor], lengths: Any, embedding: nn.Embedding | None
    ) -> tuple[Any, list[Tensor], bool]:
        if not self.takes_gates:
            return super()._take_tokens(input, weights, lengths, embedding)
        if embedding is not None:
            raise ValueError("the input is gates: no embedding can be given")
        data, *rest = input if isinstance(input, PackedSequence) else (input,)
        if not isinstance(data, Tensor):
            self._forward_in_torch(data, None, "")
        if data.dim() == 0 or data.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to gates * hidden_size. Expected {self.input_size}, "
                f"got {list(data.shape)}"
            )
        table = data.reshape(-1, self.input_size)
        rows = torch.arange(len(table), device=data.device).view(*data.shape[:-1], 1)
        return (
            PackedSequence(rows, *rest) if rest else rows,
            self._completed(weights, table),
            True,
        )

    def _forward_in_torch(self, input: Any, hx: Any, reason: str) -> NoReturn:
        raise TypeError(f"input should be a Tensor or a PackedSequence, got {type(input).__name__}")

    def _refuse(self, input: Any, hx: Any, problem: str) -> NoReturn:
        raise RuntimeError(problem)

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError("torch.jit.script cannot compile rnnfast.Layer: use torch.compile")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _ = self.cell.row  # registers it with torch

    def extra_repr(self) -> str:
        """The arguments that ``repr`` shows."""
        own = super().extra_repr()
        own = own.replace(str(self.input_size), "None", 1) if self.takes_gates else own
        return f"{self.cell.name}, {own}"


class LayerCell(OneStep):
    """One step of a cell that `rnnfast.cell` has made.

    Sizes: B batch, I input features, H hidden features, G gates.

    Args:
        cell: What `rnnfast.cell` returns.
        input_size: I.
        hidden_size: H.
        bias: Whether there are biases. Default: True.
        device: The device of the parameters.
        dtype: The dtype of the parameters.
        backend: As for `Layer`.

    Inputs:
        input: (B, I), or (I) for a single input.
        hx: The states (B, H), or (H): one tensor, or a tuple with one for each state of the cell.
            Default: None, zeros.

    Outputs:
        The next states, in the form of hx.

    Weights:
        weight_ih: W_ih (G*H, I).
        weight_hh: W_hh (G*H, H). Like bias_hh it is missing with ``recurrent=False``.
        bias_ih, bias_hh: b_ih and b_hh (G*H).
        [parameter]: Each learnable vector of the cell (H), by its name.
        norm_weight, norm_bias: Of a cell with ``norm="layer"`` (G*H).

    They are drawn as those of `Layer` are.

    Raises:
        TypeError: ``cell`` is not what `rnnfast.cell` returns.
        RuntimeError: Of a call: shapes, dtypes or devices do not fit, or a forced backend cannot
            run.

    Example:
        >>> @rnnfast.cell(gates=1)
        ... def leaky(x, h, state):
        ...     return 0.9 * state.h + 0.1 * torch.tanh(x[0] + h[0])
        >>> step = rnnfast.LayerCell(leaky, 10, 20)
        >>> h = step(torch.randn(3, 10))
        >>> step(torch.randn(3, 10), h).shape
        torch.Size([3, 20])
    """

    def __init__(
        self,
        cell: CustomCell,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        _check_cell(cell)
        super().__init__(input_size, hidden_size, bias, cell.gates, device=device, dtype=dtype)
        self.cell = cell
        self._plain_states = _plain_states(cell)
        self.backend = check_backend(backend)
        _ = cell.row  # registers it with torch
        shapes = _shapes(cell, input_size, hidden_size, bias)
        for name in CELL_WEIGHTS:
            if name not in shapes:
                self.register_parameter(name, None)
        self._others = [name for name in shapes if name not in CELL_WEIGHTS]
        for name in self._others:
            tensor = torch.empty(shapes[name], device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(tensor))
            _fill(cell, name, tensor, hidden_size)

    def reset_parameters(self) -> None:
        """Draws all weights anew."""
        for name, weight in self.named_parameters(recurse=False):
            # the first call comes before there is a cell, and has weights alone
            _fill(None if name in CELL_WEIGHTS else self.cell, name, weight, self.hidden_size)

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Computes the next states.

        The arguments and results are those under "Inputs" and "Outputs" in the class.
        """
        # calls of other functions would be noticed in a single step of a small layer
        if self._plain_states or isinstance(input, fx.Proxy):
            if self._plain_states == 2 and not (type(hx) is tuple and len(hx) == 2):
                _joined_states(self.cell, hx)  # checks them
            return OneStep.forward(self, input, hx)
        return _separate_states(self.cell, super().forward(input, _joined_states(self.cell, hx)))

    @property
    def _cell(self) -> Cell:
        return self.cell.row

    def _read(self, names: list[str]) -> list[Tensor]:
        tensors = OneStep._read(self, names)
        if self.cell.recurrent:
            return tensors
        own = {n: t for n, t in zip(names, tensors, strict=True) if t is not None}
        result = _of_layer(self.cell, own, self.hidden_size, self.bias)
        missing: list[Any] = [] if self.bias else [None, None]
        return [*result, *missing]

    def _read_parameters(self) -> Tensor:
        return _joined_parameters(super()._read(self._others), self.hidden_size)

    def _forward_in_torch(self, input: Any, hx: Any, reason: str) -> NoReturn:
        if isinstance(input, Tensor):
            raise RuntimeError(reason)
        raise TypeError(f"input should be a Tensor, got {type(input).__name__}")

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError("torch.jit.script cannot compile rnnfast.LayerCell: use torch.compile")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _ = self.cell.row  # registers it with torch

    def extra_repr(self) -> str:
        """The arguments that ``repr`` shows."""
        return f"{self.cell.name}, {super().extra_repr()}"


def _check_cell(cell: object) -> None:
    if not isinstance(cell, CustomCell):
        raise TypeError(f"cell should be what rnnfast.cell returns, got {type(cell).__name__}")


_OF_NORM = {"norm_weight": 1.0, "norm_bias": 0.0}
"""The parameters of a normalisation and their initial values."""


def _shapes(cell: CustomCell, columns: int, hidden_size: int, bias: bool) -> dict[str, Shape]:
    """The parameters of a layer: their names and shapes."""
    rows = cell.gates * hidden_size
    shapes: dict[str, Shape] = {"weight_ih": (rows, columns)}
    if cell.recurrent:
        shapes["weight_hh"] = (rows, hidden_size)
    if bias:
        shapes["bias_ih"] = (rows,)
    if bias and cell.recurrent:
        shapes["bias_hh"] = (rows,)
    shapes |= dict.fromkeys(cell.parameter_names, (hidden_size,))
    if cell.norm_eps is not None:
        shapes |= dict.fromkeys(_OF_NORM, (rows,))
    return shapes


def _of_layer(
    cell: CustomCell,
    own: dict[str, Tensor],
    hidden_size: int,
    bias: bool,
    gates: Tensor | None = None,
) -> list[Tensor]:
    """The tensors of a layer as the operators take them: w_ih, w_hh[, b_ih, b_hh][, parameters].

    ``gates`` (N, G*H) takes the place of W_ih where inputs are gates: a table with a row for each
    step.
    """
    w_ih, rows = own["weight_ih"] if gates is None else gates, cell.gates * hidden_size
    result = [w_ih, own["weight_hh"] if cell.recurrent else w_ih.new_empty(rows, 0)]
    for name in ("bias_ih", "bias_hh") if bias else ():
        result.append(own[name] if name in own else w_ih.new_zeros(rows))
    others = [tensor for name, tensor in own.items() if name not in CELL_WEIGHTS]
    return [*result, _joined_parameters(others, hidden_size)] if others else result


def _joined_parameters(tensors: list[Tensor], hidden_size: int) -> Tensor:
    """All of these as rows of a tensor (N, H), as the operators take them."""
    checks.refuse_freed(parameter=tensors)  # joining would read what is not there
    return torch.cat(tensors).view(-1, hidden_size)


def _fill(cell: CustomCell | None, name: str, tensor: Tensor, hidden_size: int) -> None:
    """Sets the initial values of a weight or a learnable vector of a cell."""
    value = {**_OF_NORM, **dict(cell.parameters)}.get(name) if cell else None
    bound = 1 / math.sqrt(hidden_size) if hidden_size > 0 else 0
    with torch.no_grad():
        tensor.uniform_(-bound, bound) if value is None else tensor.fill_(value)


def _plain_states(cell: CustomCell) -> int:
    """How many states a cell has, if the operators take and return them as they are; else 0."""
    return len(cell.state) if len(cell.state) <= 2 else 0


def _joined_states(cell: CustomCell, hx: Any) -> Any:
    """The states as the operators take them: those beside h side by side in one tensor.

    Raises:
        RuntimeError: There is another number of states, or their shapes, types or devices differ.
    """
    count = len(cell.state)
    if hx is None or count == 1:
        return hx
    if not isinstance(hx, (tuple, list)) or len(hx) != count:
        names = ", ".join(cell.state)
        raise RuntimeError(f"{cell.name} expects {count} hidden states ({names})")
    if count == 2:
        return hx
    for name, tensor in zip(cell.state, hx, strict=True):
        if not isinstance(tensor, Tensor):
            raise RuntimeError(f"Expected {name} to be a tensor, got {type(tensor).__name__}")
        if tensor.shape != hx[0].shape:
            raise RuntimeError(
                f"Expected {name} size {tuple(hx[0].shape)}, got {list(tensor.shape)}"
            )
        if tensor.device != hx[0].device:
            raise RuntimeError(f"Expected {name} on {hx[0].device}, got {tensor.device}")
        # joining would convert it
        if tensor.dtype is not hx[0].dtype and not (is_cast(tensor) and is_cast(hx[0])):
            raise RuntimeError(f"Expected {name} of {hx[0].dtype}, got {tensor.dtype}")
    checks.refuse_freed(hidden=hx)  # joining would read what is not there
    return hx[0], torch.cat(tuple(hx[1:]), dim=-1)


def _separate_states(cell: CustomCell, finals: Any) -> Any:
    """The inverse of `_joined_states`."""
    count = len(cell.state)
    return finals if count <= 2 else (finals[0], *finals[1].chunk(count - 1, dim=-1))
