"""The stateless interface: recurrent layers and cells as functions of all their tensors.

Sizes: T time, B batch, I input, H hidden, G gate blocks of the cell (Elman 1, GRU 3, LSTM 4),
L layers, D directions (2 if bidirectional, else 1).

Under ``torch.autocast`` floating-point arguments, except float64, are cast to its dtype and the
results stay in it, as with the recurrent kernels of cuDNN.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import checks
from .reference import CELLS, Cell, States
from .sequences import Options, StepWeights, run_sequence, run_step, state_sizes

ELMAN = {"tanh": CELLS["elman_tanh"], "relu": CELLS["elman_relu"]}


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Elman layers, h' = nonlinearity(W_ih x + b_ih + W_hh h + b_hh), over a batch of sequences.

    Args:
        input: (T, B, I), or (B, T, I) with ``batch_first``.
        hx: The initial state (L*D, B, H); None is zeros.
        flat_weights: For each layer, for each direction: w_ih (G*H, I, or D*H from the second layer
            on), w_hh (G*H, H) and, with ``has_biases``, b_ih and b_hh (G*H).
        nonlinearity: "tanh" or "relu".
        num_layers: L.
        has_biases: Whether ``flat_weights`` holds biases.
        dropout: Probability of zeroing an output of any layer but the last, while ``training``.
        training: Whether dropout applies.
        bidirectional: Whether each layer also runs from the end to the start.
        batch_first: Whether B comes first in ``input`` and ``output``; the states are unaffected.
        recompute: Save no gates for the backward, which computes them again from the states: less
            memory for more time. The fused kernels on the CPU do; elsewhere it changes nothing.
        lengths: Integers (B) from 0 to T, or None: how many steps each sequence has, in any order
            and on any device. Outputs beyond are zeros, and the final state is that after the last
            step.
        reset: Booleans (T, B), or (B, T) with ``batch_first``, or None: where ``reset[t]`` is true,
            the state is zeros before step t and no gradient passes; with ``bidirectional`` nothing
            passes from step t back to t - 1 either.
        backend: None, or the backend to force; see `rnnfast.backend`.

    Returns:
        output (T, B, D*H), or (B, T, D*H) with ``batch_first``, and the final state (L*D, B, H).

    Raises:
        ValueError: Unknown ``nonlinearity`` or ``backend``, or a length out of range.
        RuntimeError: Shapes, dtypes or devices do not fit, or a forced backend cannot run.
    """
    options = Options(
        num_layers, has_biases, dropout, training, bidirectional, batch_first, recompute
    )
    cell, states = elman(nonlinearity), None if hx is None else (hx,)
    output, (h_n,), _ = _checked_sequence(
        cell, input, states, flat_weights, options, backend, lengths, reset
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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated recurrent units over a batch of sequences; arguments and results as in `rnn`."""
    options = Options(
        num_layers, has_biases, dropout, training, bidirectional, batch_first, recompute
    )
    states = None if hx is None else (hx,)
    output, (h_n,), _ = _checked_sequence(
        CELLS["gru"], input, states, flat_weights, options, backend, lengths, reset
    )
    return output, h_n


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
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
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]] | tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Long short-term memory over a batch of sequences.

    Arguments and results are as in `rnn`, except that the state is the pair (h, c), and that with
    ``return_cells`` there is a third result, shaped like the output: the c of every step of the
    last layer. With ``proj_size`` P, not 0, h is projected to that size: for each layer and
    direction, ``flat_weights`` has one tensor more, w_hr (P, H), its w_hh is (G*H, P), and P stands
    for H in the shapes of the output and of h, though not of c.
    """
    options = Options(
        num_layers, has_biases, dropout, training, bidirectional, batch_first, recompute, proj_size
    )
    output, (h_n, c_n), cells = _checked_sequence(
        CELLS["lstm"], input, hx, flat_weights, options, backend, lengths, reset, return_cells
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
    """One step of an Elman cell.

    Args:
        input: (B, I).
        hx: The state (B, H); None is zeros.
        w_ih: (G*H, I).
        w_hh: (G*H, H).
        b_ih: (G*H), or None.
        b_hh: (G*H), or None; both biases or neither.
        nonlinearity: "tanh" or "relu".
        backend: None, or the backend to force; see `rnnfast.backend`.

    Returns:
        The next state (B, H).

    Raises:
        ValueError: Unknown ``nonlinearity`` or ``backend``.
        RuntimeError: Shapes, dtypes or devices do not fit, or a forced backend cannot run.
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
    """One step of a gated recurrent unit; arguments and result as in `rnn_cell`."""
    states = None if hx is None else (hx,)
    weights = (w_ih, w_hh, b_ih, b_hh)
    return _checked_step(CELLS["gru"], input, states, weights, backend)[0]


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM cell; arguments and result as in `rnn_cell`, with the state (h, c)."""
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
    weights: Sequence[Tensor],
    options: Options,
    requested: str | None,
    lengths: Tensor | Sequence[int] | None,
    reset: Tensor | None,
    return_cells: bool = False,
) -> tuple[Tensor, States, Tensor | None]:
    expected = options.num_layers * options.directions * options.tensors_per_layer
    if len(weights) != expected or expected < 1:
        raise RuntimeError(f"Expected {expected} tensors in flat_weights, got {len(weights)}")
    for weight in weights:
        if not isinstance(weight, Tensor):
            raise RuntimeError(f"flat_weights should be tensors, got {type(weight).__name__}")
    problem = checks.sequence_problem(cell, x, states, weights, options)
    if not problem:
        hidden = state_sizes(cell, weights, options)[-1]
        problem = checks.stack_problem(cell, weights, options, x.shape[-1], hidden)
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
