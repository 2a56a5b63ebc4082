"""The stateless interface: recurrent layers and cells as functions of all their tensors.

The formulas, and what each argument means, are those of the modules `rnnfast.RNN`, `rnnfast.LSTM`
and `rnnfast.GRU` and of their cells. A function takes what a module holds, such as its weights, as
arguments.

Sizes: T time steps, B batch, I input features, H hidden features, G gate blocks of the cell (Elman
1, GRU 3, LSTM 4), L layers, D directions (2 if bidirectional, else 1), V tokens.

Under ``torch.autocast`` floating-point arguments, except float64, are cast to its dtype. The
results have that dtype too, as with the recurrent kernels of cuDNN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from . import checks
from . import tokens as _tokens
from .reference import CELLS, Cell, States
from .sequences import Options, StepWeights, run_sequence, run_step, state_sizes

ELMAN = {"tanh": CELLS["elman_tanh"], "relu": CELLS["elman_relu"]}
_Pair = tuple[Tensor, Tensor]


def rnn(
    input: Tensor,
    hx: Tensor | None,
    flat_weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    has_biases: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    recompute: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    tokens: bool = False,
    embedding: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs Elman layers over a batch of sequences.

    Args:
        input: (T, B, I), or (B, T, I) with ``batch_first``. With ``tokens`` or ``embedding``:
            integers (T, B), or (B, T).
        hx: The initial state (L*D, B, H). None stands for zeros.
        flat_weights: For each layer and each of its directions: W_ih (G*H, I), from the second
            layer on (G*H, D*H), then W_hh (G*H, H) and, with ``has_biases``, b_ih (G*H) and b_hh
            (G*H). They are the parameters of a module in their order,
            ``list(module.parameters())``.
        nonlinearity: "tanh" or "relu".
        num_layers: L.
        has_biases: Whether ``flat_weights`` holds biases.
        dropout: The probability of zeroing an output of any layer but the last, in training.
        training: Whether dropout applies.
        bidirectional: Whether each layer also runs from the end of the sequences to their start.
        batch_first: Whether B comes first in ``input`` and the output. States keep their shape.
        recompute: Whether to save no gates for the backward, which computes them again. It takes
            less memory and more time. It only has an effect on the fused kernels on the CPU.
        lengths: How many steps each sequence has: integers (B) from 0 to T, in any order, on any
            device. Outputs beyond the end of a sequence are zeros, and its final state is the one
            after its last step. None: all have T steps.
        reset: Booleans (T, B), or (B, T) with ``batch_first``. Where ``reset[t]`` is true, the
            state is set to zeros before step t, and no gradient passes. With ``bidirectional``,
            nothing passes from step t back to t - 1 either. None: no resets.
        tokens: Whether ``input`` holds integers from 0 to I - 1, each of which stands for a one-hot
            vector. The vectors are not written out.
        embedding: A matrix (V, I), or None. If given, ``input`` holds integers from 0 to V - 1,
            which stand for its rows. The result is that of
            ``torch.nn.functional.embedding(input, embedding)`` as input, gradients included, but
            W_ih is multiplied with each row once, however often it occurs.
        backend: None, or the backend to force; see `rnnfast.backend`.

    Returns:
        ``(output, h_n)``: the outputs of the last layer (T, B, D*H), or (B, T, D*H) with
        ``batch_first``, and the final state (L*D, B, H).

    Raises:
        ValueError: ``nonlinearity`` or ``backend`` is unknown, a length is out of range, or both
            ``tokens`` and ``embedding`` are given.
        TypeError: ``lengths`` or tokens are no integers, or ``reset`` holds no booleans.
        IndexError: A token is out of range.
        RuntimeError: Shapes, dtypes or devices do not fit, or a forced backend cannot run.

    Example:
        >>> layer = rnnfast.RNN(10, 20)
        >>> x = torch.randn(5, 3, 10)
        >>> output, h_n = rnnfast.functional.rnn(x, None, list(layer.parameters()))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]))
    """
    options = Options(
        num_layers, has_biases, dropout, training, bidirectional, batch_first, recompute
    )
    cell, states = elman(nonlinearity), None if hx is None else (hx,)
    output, (h_n,), _ = _checked_sequence(
        cell, input, states, flat_weights, options, backend, lengths, reset, tokens, embedding
    )
    return output, h_n


def gru(
    input: Tensor,
    hx: Tensor | None,
    flat_weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    has_biases: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    recompute: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    tokens: bool = False,
    embedding: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs layers of gated recurrent units over a batch of sequences.

    Arguments, results and errors are those of `rnn`, without ``nonlinearity``. G is 3.

    Example:
        >>> layer = rnnfast.GRU(10, 20)
        >>> x = torch.randn(5, 3, 10)
        >>> output, h_n = rnnfast.functional.gru(x, None, list(layer.parameters()))
        >>> torch.equal(output, layer(x)[0])
        True
    """
    options = Options(
        num_layers, has_biases, dropout, training, bidirectional, batch_first, recompute
    )
    states = None if hx is None else (hx,)
    output, (h_n,), _ = _checked_sequence(
        CELLS["gru"],
        input,
        states,
        flat_weights,
        options,
        backend,
        lengths,
        reset,
        tokens,
        embedding,
    )
    return output, h_n


@overload
def lstm(
    input: Tensor,
    hx: _Pair | None,
    flat_weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    has_biases: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    recompute: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    return_cells: Literal[False] = False,
    proj_size: int = 0,
    tokens: bool = False,
    embedding: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, _Pair]: ...
@overload
def lstm(
    input: Tensor,
    hx: _Pair | None,
    flat_weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    has_biases: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    recompute: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    return_cells: Literal[True],
    proj_size: int = 0,
    tokens: bool = False,
    embedding: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, _Pair, Tensor]: ...
@overload
def lstm(
    input: Tensor,
    hx: _Pair | None,
    flat_weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    has_biases: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    recompute: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    return_cells: bool,
    proj_size: int = 0,
    tokens: bool = False,
    embedding: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, _Pair] | tuple[Tensor, _Pair, Tensor]: ...
def lstm(
    input: Tensor,
    hx: _Pair | None,
    flat_weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    has_biases: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    recompute: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    return_cells: bool = False,
    proj_size: int = 0,
    tokens: bool = False,
    embedding: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, _Pair] | tuple[Tensor, _Pair, Tensor]:
    """Runs long short-term memory layers over a batch of sequences.

    Arguments, results and errors are those of `rnn`, without ``nonlinearity`` and with these
    differences. G is 4. ``hx`` is the pair of initial states (h_0, c_0), each (L*D, B, H). With
    ``return_cells`` the cell state c of every step is returned as well. With ``proj_size`` P the
    hidden state is projected to P features: W_hh is (G*H, P), W_ih is (G*H, D*P) from the second
    layer on, h_0 is (L*D, B, P), and W_hr (P, H) follows the other tensors of each layer and
    direction in ``flat_weights``. 0 stands for no projection.

    Returns:
        ``(output, (h_n, c_n))``, or ``(output, (h_n, c_n), cells)`` with ``return_cells``. The
        output is (T, B, D*H), h_n and c_n are (L*D, B, H). With ``proj_size``, P takes the place of
        H in the output and in h_n. ``cells`` (T, B, D*H) holds the c of every step of the last
        layer. With ``batch_first`` the output and ``cells`` begin with (B, T).

    Example:
        >>> layer = rnnfast.LSTM(10, 20)
        >>> x = torch.randn(5, 3, 10)
        >>> output, (h_n, c_n), cells = rnnfast.functional.lstm(
        ...     x, None, list(layer.parameters()), return_cells=True
        ... )
        >>> torch.equal(cells[-1], c_n[0])
        True
    """
    options = Options(
        num_layers, has_biases, dropout, training, bidirectional, batch_first, recompute, proj_size
    )
    output, (h_n, c_n), cells = _checked_sequence(
        CELLS["lstm"],
        input,
        hx,
        flat_weights,
        options,
        backend,
        lengths,
        reset,
        tokens,
        embedding,
        return_cells,
    )
    return (output, (h_n, c_n)) if cells is None else (output, (h_n, c_n), cells)


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    backend: str | None = None,
) -> Tensor:
    """Computes one step of an Elman cell.

    Args:
        input: (B, I).
        hx: The state (B, H). None stands for zeros.
        w_ih: W_ih (G*H, I).
        w_hh: W_hh (G*H, H).
        b_ih: (G*H), or None.
        b_hh: (G*H), or None. Both biases are given, or neither.
        nonlinearity: "tanh" or "relu".
        backend: None, or the backend to force; see `rnnfast.backend`.

    Returns:
        The next state (B, H).

    Raises:
        ValueError: ``nonlinearity`` or ``backend`` is unknown.
        RuntimeError: Shapes, dtypes or devices do not fit, or a forced backend cannot run.

    Example:
        >>> cell = rnnfast.RNNCell(10, 20)
        >>> x, h = torch.randn(3, 10), torch.zeros(3, 20)
        >>> rnnfast.functional.rnn_cell(x, h, *cell.parameters()).shape
        torch.Size([3, 20])
    """
    states = None if hx is None else (hx,)
    weights = (w_ih, w_hh, b_ih, b_hh)
    return _checked_step(elman(nonlinearity), input, states, weights, backend)[0]


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Computes one step of a gated recurrent unit.

    Arguments, result and errors are those of `rnn_cell`, without ``nonlinearity``. G is 3.

    Example:
        >>> cell = rnnfast.GRUCell(10, 20)
        >>> x, h = torch.randn(3, 10), torch.zeros(3, 20)
        >>> rnnfast.functional.gru_cell(x, h, *cell.parameters()).shape
        torch.Size([3, 20])
    """
    states = None if hx is None else (hx,)
    weights = (w_ih, w_hh, b_ih, b_hh)
    return _checked_step(CELLS["gru"], input, states, weights, backend)[0]


def lstm_cell(
    input: Tensor,
    hx: _Pair | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes one step of an LSTM cell.

    Arguments and errors are those of `rnn_cell`, without ``nonlinearity``. G is 4. The state and
    the result are pairs (h, c), each (B, H).

    Example:
        >>> cell = rnnfast.LSTMCell(10, 20)
        >>> h, c = rnnfast.functional.lstm_cell(torch.randn(3, 10), None, *cell.parameters())
        >>> h.shape, c.shape
        (torch.Size([3, 20]), torch.Size([3, 20]))
    """
    h, c = _checked_step(CELLS["lstm"], input, hx, (w_ih, w_hh, b_ih, b_hh), backend)
    return h, c


def elman(nonlinearity: str) -> Cell:
    """The Elman cell with this nonlinearity; ValueError if there is none."""
    if nonlinearity not in ELMAN:
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    return ELMAN[nonlinearity]


def _checked_sequence(
    cell: Cell,
    x: Tensor,
    states: States | None,
    flat_weights: Sequence[Tensor],
    options: Options,
    requested: str | None,
    lengths: Tensor | Sequence[int] | None,
    reset: Tensor | None,
    tokens: bool,
    embedding: Tensor | None,
    return_cells: bool = False,
) -> tuple[Tensor, States, Tensor | None]:
    expected = options.num_layers * options.directions * options.tensors_per_layer
    if len(flat_weights) != expected or expected < 1:
        raise RuntimeError(f"Expected {expected} tensors in flat_weights, got {len(flat_weights)}")
    for weight in flat_weights:
        if not isinstance(weight, Tensor):
            raise RuntimeError(f"flat_weights should be tensors, got {type(weight).__name__}")
    weights = flat_weights
    if tokens and embedding is not None:
        raise ValueError("tokens=True stands for one-hot vectors: no embedding can be given")
    if tokens or embedding is not None:
        x, weights = _tokens.read(x, weights, options, requested, embedding, lengths)
    has_tables = (tokens or embedding is not None) and x.dtype is torch.int64
    problem = checks.sequence_problem(cell, x, states, weights, options, tokens=has_tables)
    if not problem:
        inputs = flat_weights[0].shape[-1] if has_tables else x.shape[-1]
        hidden = state_sizes(cell, weights, options)[-1]
        problem = checks.stack_problem(cell, flat_weights, options, inputs, hidden)
    if problem:
        raise RuntimeError(problem)
    extras = checks.check_extras(x, lengths, reset, return_cells, options.batch_first)
    return run_sequence(cell, x, states, weights, options, requested, extras)


def _checked_step(
    cell: Cell, x: Tensor, states: States | None, weights: StepWeights, requested: str | None
) -> States:
    problem = checks.step_problem(cell, x, states, weights)
    hidden = weights[1].shape[-1]
    problem = problem or checks.weights_problem(cell, weights, x.shape[-1], hidden, hidden)
    if problem:
        raise RuntimeError(problem)
    return run_step(cell, x, states, weights, requested)
