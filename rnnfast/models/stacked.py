"""Elman layers put together: one, several, and in both directions."""

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
    """Elman layers, and a linear output from the last step: a `SequenceClassifier`.

    h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), in each layer, x being the h below
    y = W h_T + b, from the last layer

    ``rnn`` are the layers, ``fc`` has W (O, H) and b. Takes an input (B, T, I) and returns y (B, O)
    and the state (L, B, H). The arguments are those of `RecurrentModel`, with another default cell.
    All after ``output_size`` are given by name: others have ``num_layers`` before it.
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
    """Elman layers on top of each other, and a linear output at every step: a `SequenceTagger`.

    h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), in each layer, x being the h below
    y_t = W h_t + b, from the last layer

    ``rnn`` are the layers, ``fc`` has W (O, H) and b. Takes an input (B, T, I) and returns y
    (B, T, O) and the state (L, B, H). The arguments are those of `RecurrentModel`, with other
    defaults. All after ``output_size`` are given by name: others have ``num_layers`` before it.
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
    """Elman layers that read a sequence from both ends, and a linear output.

    f_t = tanh(W_ih x_t + b_ih + W_hh f_{t-1} + b_hh), with t from 1 to T
    g_t = tanh(V_ih x_t + c_ih + V_hh g_{t+1} + c_hh), with t from T to 1

    Schuster, Paliwal, "Bidirectional recurrent neural networks", IEEE Transactions on Signal
    Processing 45(11), 1997. Which of these the output reads is told by ``reading``:

    - "ends", for one decision on the whole sequence: y = W [f_T, g_1] + b. Both have read all of
      it: the forward direction is done at the last step, the backward one at the first.
    - "last_step", often met as ``output[:, -1]``: y = W [f_T, g_T] + b. The backward direction
      begins at the last step and has read no more than x_T there, so that only the forward one
      knows of the rest. It is here to compare with.
    - "every_step", for tagging: y_t = W [f_t, g_t] + b. At each step one direction knows all that
      comes before and the other all that follows.

    ``rnn`` are the layers, ``fc`` has W (O, 2H) and b.

    Args:
        input_size: I, the number of features of an input.
        hidden_size: H, the number of features of the state in one direction.
        output_size: O, the number of features of an output.
        num_layers: L; each layer reads both directions of the one below.
        reading: "ends", "last_step" or "every_step".
        cell, dropout, device, dtype, backend: as in `RecurrentModel`.

    Raises:
        ValueError: a size is not positive, the dropout is no probability, or there is no such
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
        """Reads sequences.

        Args:
            input: (B, T, I).
            hidden: the state in which each layer and direction begins (2L, B, H), for LSTM a pair
                of such; zeros if None.
            lengths: integers (B) from 0 to T, or None: how many steps each sequence has. The
                backward direction begins at the last of them. Of an empty sequence, "ends" reads
                the state it begins in and "last_step" zeros.

        Returns:
            y (B, O), or (B, T, O) and zeros beyond a sequence's end with ``reading="every_step"``;
            and the state in which each layer and direction ends, shaped like ``hidden``. It is not
            one to go on from: the backward directions have been at the first step.

        Raises:
            ValueError: the input has another rank, or a length is out of range.
            RuntimeError: shapes, dtypes or devices do not fit.
            TypeError: ``lengths`` are no integers.
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
