"""Drop-in RNNCell, LSTMCell and GRUCell; see `rnnfast.modules`."""

from __future__ import annotations

import torch
from torch import nn

from . import functional
from .bases import Device, StepOneState, StepTwoStates, check_backend
from .reference import CELLS, Cell


class RNNCell(StepOneState):
    """One step of an Elman cell; a drop-in replacement of torch.nn.RNNCell.

    A call computes::

        h' = tanh(W_ih x + b_ih + W_hh h + b_hh)

    x is the input, h the hidden state and h' the next one. With ``nonlinearity="relu"``, max(0, .)
    takes the place of tanh. These are the formulas of torch.nn.RNNCell: Elman, "Finding structure
    in time", Cognitive Science 14, 1990; for relu Le, Jaitly and Hinton, arXiv:1504.00941.

    The constructor, the parameters with their initial values, the ``state_dict``, the results and
    the errors are those of torch.nn.RNNCell. The argument ``backend`` is an addition.

    Sizes: B batch, I input features, H hidden features.

    Args:
        input_size: I, the number of features of an input.
        hidden_size: H, the number of features of the state.
        bias: Whether the cell has the biases b_ih and b_hh. Default: True.
        nonlinearity: "tanh" or "relu". Default: "tanh".
        device: The device of the parameters.
        dtype: The dtype of the parameters.
        backend: "fused", "aten", "reference" or "auto" to force what runs the calls, or None for
            `rnnfast.use_backend` or the default; see `rnnfast.backend`. Default: None.

    Inputs:
        input: (B, I), or (I) for a single input.
        hx: The state h (B, H), or (H). Default: None, zeros.

    Outputs:
        h': The next state, shaped like h.

    Weights:
        weight_ih: W_ih (H, I).
        weight_hh: W_hh (H, H).
        bias_ih, bias_hh: b_ih and b_hh (H).

    All are drawn from the uniform distribution between -1/sqrt(H) and 1/sqrt(H).

    Raises:
        ValueError: ``backend`` is unknown. Of a call: shapes do not fit, in torch.nn's words.
        RuntimeError: Of a call: shapes, dtypes or devices do not fit, in torch.nn's words, or a
            forced backend cannot run.

    Example:
        >>> cell = rnnfast.RNNCell(10, 20)
        >>> x = torch.randn(5, 3, 10)  # 5 steps of 3 sequences
        >>> h = None
        >>> for x_t in x:
        ...     h = cell(x_t, h)
        >>> h.shape
        torch.Size([3, 20])
    """

    torch_class = nn.RNNCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity
        self.backend = check_backend(backend)

    @property
    def _cell(self) -> Cell | None:
        return functional.ELMAN.get(self.nonlinearity)


class LSTMCell(StepTwoStates):
    """One step of a long short-term memory (LSTM) cell; a drop-in replacement of torch.nn.LSTMCell.

    A call computes::

        i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)
        f = sigmoid(W_if x + b_if + W_hf h + b_hf)
        g = tanh(W_ig x + b_ig + W_hg h + b_hg)
        o = sigmoid(W_io x + b_io + W_ho h + b_ho)
        c' = f * c + i * g
        h' = o * tanh(c')

    x is the input, h the hidden state, c the cell state, h' and c' the next ones. i, f, g and o are
    the input gate, the forget gate, the candidate and the output gate, and ``*`` multiplies
    elementwise. These are the formulas of torch.nn.LSTMCell: Hochreiter and Schmidhuber, "Long
    short-term memory", Neural Computation 9(8), 1997, with the forget gate of Gers, Schmidhuber and
    Cummins, Neural Computation 12(10), 2000.

    The constructor, the parameters with their initial values, the ``state_dict``, the results and
    the errors are those of torch.nn.LSTMCell. The argument ``backend`` is an addition.

    Sizes: B batch, I input features, H hidden features.

    Args:
        input_size: I, the number of features of an input.
        hidden_size: H, the number of features of the state.
        bias: Whether the cell has the biases b_ih and b_hh. Default: True.
        device: The device of the parameters.
        dtype: The dtype of the parameters.
        backend: "fused", "aten", "reference" or "auto" to force what runs the calls, or None for
            `rnnfast.use_backend` or the default; see `rnnfast.backend`. Default: None.

    Inputs:
        input: (B, I), or (I) for a single input.
        hx: The states (h, c), each (B, H), or (H). Default: None, zeros.

    Outputs:
        (h', c'): The next states, shaped like (h, c).

    Weights:
        weight_ih: W_ih (4*H, I).
        weight_hh: W_hh (4*H, H).
        bias_ih, bias_hh: b_ih and b_hh (4*H).

    All are drawn from the uniform distribution between -1/sqrt(H) and 1/sqrt(H). The rows of the
    weights and biases are those of i, f, g and o, in this order: W_ih holds W_ii, W_if, W_ig and
    W_io, one below the other.

    Raises:
        ValueError: ``backend`` is unknown. Of a call: shapes do not fit, in torch.nn's words.
        RuntimeError: Of a call: shapes, dtypes or devices do not fit, in torch.nn's words, or a
            forced backend cannot run.

    Example:
        >>> cell = rnnfast.LSTMCell(10, 20)
        >>> x = torch.randn(5, 3, 10)  # 5 steps of 3 sequences
        >>> state = None
        >>> for x_t in x:
        ...     h, c = state = cell(x_t, state)
        >>> h.shape, c.shape
        (torch.Size([3, 20]), torch.Size([3, 20]))
    """

    torch_class = nn.LSTMCell
    _cell = CELLS["lstm"]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        gates = CELLS["lstm"].gates
        super().__init__(input_size, hidden_size, bias, gates, device=device, dtype=dtype)
        self.backend = check_backend(backend)


class GRUCell(StepOneState):
    """One step of a gated recurrent unit (GRU); a drop-in replacement of torch.nn.GRUCell.

    A call computes::

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
        z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
        n = tanh(W_in x + b_in + r * (W_hn h + b_hn))
        h' = (1 - z) * n + z * h

    x is the input, h the hidden state and h' the next one. r, z and n are the reset gate, the
    update gate and the candidate state, and ``*`` multiplies elementwise. These are the formulas of
    torch.nn.GRUCell: Cho et al., arXiv:1406.1078, with the reset gate applied after the product
    with W_hn.

    The constructor, the parameters with their initial values, the ``state_dict``, the results and
    the errors are those of torch.nn.GRUCell. The argument ``backend`` is an addition.

    Sizes: B batch, I input features, H hidden features.

    Args:
        input_size: I, the number of features of an input.
        hidden_size: H, the number of features of the state.
        bias: Whether the cell has the biases b_ih and b_hh. Default: True.
        device: The device of the parameters.
        dtype: The dtype of the parameters.
        backend: "fused", "aten", "reference" or "auto" to force what runs the calls, or None for
            `rnnfast.use_backend` or the default; see `rnnfast.backend`. Default: None.

    Inputs:
        input: (B, I), or (I) for a single input.
        hx: The state h (B, H), or (H). Default: None, zeros.

    Outputs:
        h': The next state, shaped like h.

    Weights:
        weight_ih: W_ih (3*H, I).
        weight_hh: W_hh (3*H, H).
        bias_ih, bias_hh: b_ih and b_hh (3*H).

    All are drawn from the uniform distribution between -1/sqrt(H) and 1/sqrt(H). The rows of the
    weights and biases are those of r, z and n, in this order: W_ih holds W_ir, W_iz and W_in, one
    below the other.

    Raises:
        ValueError: ``backend`` is unknown. Of a call: shapes do not fit, in torch.nn's words.
        RuntimeError: Of a call: shapes, dtypes or devices do not fit, in torch.nn's words, or a
            forced backend cannot run.

    Example:
        >>> cell = rnnfast.GRUCell(10, 20)
        >>> x = torch.randn(5, 3, 10)  # 5 steps of 3 sequences
        >>> h = None
        >>> for x_t in x:
        ...     h = cell(x_t, h)
        >>> h.shape
        torch.Size([3, 20])
    """

    torch_class = nn.GRUCell
    _cell = CELLS["gru"]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        gates = CELLS["gru"].gates
        super().__init__(input_size, hidden_size, bias, gates, device=device, dtype=dtype)
        self.backend = check_backend(backend)
