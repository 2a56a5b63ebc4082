"""Elman networks with one layer, with several layers, and in both directions."""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from rnnfast.models.layers import (
    CellName,
    Device,
    Lengths,
    RecurrentModel,
    check_batch,
    hidden_of,
    last_step,
    zero_beyond,
)
from rnnfast.models.results import State, pair
from rnnfast.models.sequence import SequenceClassifier, SequenceTagger

Reading = Literal["ends", "last_step", "every_step"]


class RNNModel(SequenceClassifier):
    """Elman layers with a linear output from the last step: a `SequenceClassifier`.

    h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh) in each layer, where x is the h of the layer
    below; y = W h_T + b with the h of the last layer.

    ``rnn`` holds the layers, ``fc`` holds W (O, H) and b. The input is (B, T, I), the output
    y (B, O), the state (L, B, H). The arguments are those of `RecurrentModel`; the default cell is
    "rnn_tanh". The arguments after ``output_size`` are keyword-only, because other libraries have
    ``num_layers`` before it.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        *,
        num_layers: int = 1,
        cell: CellName = "rnn_tanh",
        dropout: float = 0.0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            output_size,
            num_layers,
            cell=cell,
            dropout=dropout,
            device=device,
            dtype=dtype,
            backend=backend,
        )


class MultiLayerRNN(SequenceTagger):
    """Stacked Elman layers with a linear output at every step: a `SequenceTagger`.

    h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh) in each layer, where x is the h of the layer
    below; y_t = W h_t + b with the h of the last layer.

    ``rnn`` holds the layers, ``fc`` holds W (O, H) and b. The input is (B, T, I), the output
    y (B, T, O), the state (L, B, H). The arguments are those of `RecurrentModel`; the defaults are
    two layers and "rnn_tanh". The arguments after ``output_size`` are keyword-only, because other
    libraries have ``num_layers`` before it.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        *,
        num_layers: int = 2,
        cell: CellName = "rnn_tanh",
        dropout: float = 0.0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            output_size,
            num_layers,
            cell=cell,
            dropout=dropout,
            device=device,
            dtype=dtype,
            backend=backend,
        )


class BidirectionalRNN(RecurrentModel):
    """Bidirectional Elman layers with a linear output.

    f_t = tanh(W_ih x_t + b_ih + W_hh f_{t-1} + b_hh), with t from 1 to T
    g_t = tanh(V_ih x_t + c_ih + V_hh g_{t+1} + c_hh), with t from T to 1

    See Schuster, Paliwal, "Bidirectional recurrent neural networks", IEEE Transactions on Signal
    Processing 45(11), 1997. The argument ``reading`` chooses the states that the output reads:

    - "ends", for one decision on the whole sequence: y = W [f_T, g_1] + b. Both states have read
      the whole sequence. The forward direction ends at step T, the backward direction at step 1.
    - "last_step", the common ``output[:, -1]``: y = W [f_T, g_T] + b. The backward direction starts
      at step T, so g_T has read x_T only. This reading is included for comparisons.
    - "every_step", for tagging: y_t = W [f_t, g_t] + b. f_t has read all steps up to t, and g_t all
      steps from t on.

    ``rnn`` holds the layers, ``fc`` holds W (O, 2H) and b.

    Args:
        input_size: I, the number of features of an input.
        hidden_size: H, the number of features of the state in one direction.
        output_size: O, the number of features of an output.
        num_layers: L; each layer reads both directions of the layer below.
        reading: "ends", "last_step" or "every_step".
        cell, dropout, device, dtype, backend: as in `RecurrentModel`.

    Raises:
        ValueError: a size is not positive, the dropout is not a probability, or there is no such
            reading, cell or backend.
    """

    bidirectional: ClassVar[bool] = True
    reading: Reading = "ends"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        num_layers: int = 1,
        *,
        reading: Reading = "ends",
        cell: CellName = "rnn_tanh",
        dropout: float = 0.0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        if reading not in get_args(Reading):
            raise ValueError(
                f"reading should be one of {', '.join(get_args(Reading))}, got {reading!r}"
            )
        super().__init__(
            input_size,
            hidden_size,
            output_size,
            num_layers,
            cell=cell,
            dropout=dropout,
            device=device,
            dtype=dtype,
            backend=backend,
        )
        self.reading = reading

    def forward(
        self, input: Tensor, hidden: State | None = None, *, lengths: Lengths = None
    ) -> tuple[Tensor, State]:
        """Run the model on sequences.

        Args:
            input: (B, T, I).
            hidden: the initial state of each layer and direction (2L, B, H), or a pair of them for
                LSTM; zeros if None.
            lengths: integers (B) from 0 to T, the length of each sequence; T if None. The backward
                direction starts at the last step of each sequence. For an empty sequence, "ends"
                reads the initial state and "last_step" reads zeros.

        Returns:
            y (B, O), or with ``reading="every_step"`` y (B, T, O) with zeros after the end of a
            sequence; and the final state of each layer and direction, shaped like ``hidden``. The
            state cannot be used to continue the sequence, because the backward directions end at
            its first step.

        Raises:
            ValueError: the input has another number of dimensions, or a length is out of range.
            RuntimeError: shapes, dtypes or devices do not match.
            TypeError: ``lengths`` are not integers.
        """
        check_batch(self, input)
        h, state = self.rnn(input, hidden, lengths=lengths)
        if self.reading == "every_step":
            return pair(zero_beyond(self.fc(self.dropout(h)), lengths), state)
        if self.reading == "ends":
            forward, backward = hidden_of(state)[-2:]
            read = torch.cat([forward, backward], 1)
        else:
            read = last_step(h, lengths)
        return pair(self.fc(self.dropout(read)), state)
