"""Models from sequence to vector, from sequence to sequence, and from vector to sequence.

They are also known as many to one, many to many, and one to many. One to one is a sequence of one
step: a `SequenceTagger` and a `SequenceClassifier` on (B, 1, I) compute the same output.
`rnnfast.models.layers` explains the lengths and the return values.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rnnfast import functional
from rnnfast.models.layers import (
    CellName,
    Device,
    Lengths,
    RecurrentModel,
    as_lengths,
    check_batch,
    check_sizes,
    check_state,
    hidden_of,
    zero_beyond,
)
from rnnfast.models.results import State, pair
from rnnfast.modules import RNN


class SequenceClassifier(RecurrentModel):
    """Many to one: one output for a whole sequence, computed from its last step.

    h_1, ..., h_T = layers(x_1, ..., x_T)
    y = W h_T + b

    ``rnn`` holds the layers, ``fc`` holds W (O, H) and b. T is the length of each single sequence;
    padding has no influence. The arguments are those of `RecurrentModel`.
    """

    def forward(
        self, input: Tensor, hidden: State | None = None, *, lengths: Lengths = None
    ) -> tuple[Tensor, State]:
        """Run the model on sequences.

        Args:
            input: (B, T, I).
            hidden: the initial state (L, B, H), or a pair of them for LSTM; zeros if None.
            lengths: integers (B) from 0 to T, the length of each sequence; T if None. The output
                of an empty sequence is computed from the initial state.

        Returns:
            y (B, O), and the state after the last step, shaped like ``hidden``.

        Raises:
            ValueError: the input has another number of dimensions, or a length is out of range.
            RuntimeError: shapes, dtypes or devices do not match.
            TypeError: ``lengths`` are not integers.
        """
        check_batch(self, input)
        _, state = self.rnn(input, hidden, lengths=lengths)
        return pair(self.fc(self.dropout(hidden_of(state)[-1])), state)


class SequenceTagger(RecurrentModel):
    """Many to many: an output for every step, computed from the sequence up to this step.

    h_1, ..., h_T = layers(x_1, ..., x_T)
    y_t = W h_t + b

    ``rnn`` holds the layers, ``fc`` holds W (O, H) and b. If a tag depends on later steps, too, use
    `BidirectionalRNN`. The arguments are those of `RecurrentModel`.
    """

    def forward(
        self, input: Tensor, hidden: State | None = None, *, lengths: Lengths = None
    ) -> tuple[Tensor, State]:
        """Run the model on sequences.

        Args:
            input: (B, T, I).
            hidden: the initial state (L, B, H), or a pair of them for LSTM; zeros if None.
            lengths: integers (B) from 0 to T, the length of each sequence; T if None.

        Returns:
            y (B, T, O), with zeros after the end of a sequence; and the state after the last step
            of each sequence, shaped like ``hidden``.

        Raises:
            ValueError: the input has another number of dimensions, or a length is out of range.
            RuntimeError: shapes, dtypes or devices do not match.
            TypeError: ``lengths`` are not integers.
        """
        check_batch(self, input)
        h, state = self.rnn(input, hidden, lengths=lengths)
        return pair(zero_beyond(self.fc(self.dropout(h)), lengths), state)


class SequenceGenerator(RecurrentModel):
    """One to many: generates a sequence from a vector; each output is part of the next input.

    h_t = cell([z, y_{t-1}], h_{t-1})
    y_t = W h_t + b

    The vector z is an input of every step, as in the decoder of Cho et al., arXiv:1406.1078. The
    output before the first step is computed from the initial state, y_0 = W h_0 + b. The state
    alone is therefore enough to continue a sequence.

    y_{t-1} is linear in h_{t-1}, so its contribution to the gates can be moved into the recurrent
    weights. If W_z and W_y are the columns of the cell's W_ih for z and for y, then

    W_ih [z, y_{t-1}] + W_hh h_{t-1} = W_z z + W_y b + (W_hh + W_y W) h_{t-1}.

    A layer with these weights generates the whole sequence in one call. This does not work for a
    GRU, whose reset gate scales the contribution of h_{t-1} but not that of the input; a GRU runs
    step by step. There is only one layer, because y comes from the last layer and goes into the
    first.

    Args:
        input_size: I, the number of features of z.
        hidden_size: H, the number of features of the state.
        output_size: O, the number of features of an output. ``rnn`` has I+O input features.
        cell, device, dtype, backend: as in `RecurrentModel`.

    Raises:
        ValueError: a size is not positive, or there is no such cell or backend.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        *,
        cell: CellName = "lstm",
        device: Device = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        check_sizes(input_size=input_size, output_size=output_size)
        super().__init__(
            input_size + output_size,
            hidden_size,
            output_size,
            cell=cell,
            device=device,
            dtype=dtype,
            backend=backend,
        )

    @property
    def input_size(self) -> int:
        """I, the number of features of z."""
        return self.rnn.input_size - self.fc.out_features

    def forward(
        self, input: Tensor, steps: int, hidden: State | None = None, *, lengths: Lengths = None
    ) -> tuple[Tensor, State]:
        """Generate sequences.

        Args:
            input: z (B, I).
            steps: T, the number of outputs to generate.
            hidden: h_0 (1, B, H), or a pair (h_0, c_0) for LSTM; zeros if None.
            lengths: integers (B) from 0 to T, the length of each sequence; T if None.

        Returns:
            y (B, T, O), with zeros after the end of a sequence; and the state after the last step
            of each sequence, shaped like ``hidden``, from which a further call continues.

        Raises:
            ValueError: the input has another number of dimensions, ``steps`` is not positive, or a
                length is out of range.
            RuntimeError: shapes, dtypes or devices do not match.
            TypeError: ``lengths`` are not integers.
        """
        if input.dim() != 2:
            raise ValueError(
                f"SequenceGenerator: expected input of shape (batch, features), "
                f"got {tuple(input.shape)}"
            )
        if input.shape[1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, "
                f"got {input.shape[1]}"
            )
        check_sizes(steps=steps)
        z = input.unsqueeze(1).expand(-1, steps, -1)
        lengths = as_lengths(z, lengths)
        run = self._step_by_step if self.rnn.mode == "GRU" else self._folded
        output, state = run(z, self.init_hidden(len(z)) if hidden is None else hidden, lengths)
        return pair(zero_beyond(output, lengths), state)

    def _folded(self, z: Tensor, state: Any, lengths: Tensor | None) -> tuple[Tensor, State]:
        """`forward` in one call of a layer, given z (B, T, I)."""
        w_ih, w_hh, b_ih, b_hh = self.rnn.all_weights[0]
        w_z, w_y = w_ih.split([self.input_size, self.fc.out_features], 1)
        weights = [w_z, w_hh + w_y @ self.fc.weight, b_ih, b_hh + w_y @ self.fc.bias]
        run: Any = functional.lstm
        if isinstance(self.rnn, RNN):
            run = partial(functional.rnn, nonlinearity=self.rnn.nonlinearity)
        h, state = run(
            z, state, weights, batch_first=True, lengths=lengths, backend=self.rnn.backend
        )
        return self.fc(h), state

    def _step_by_step(self, z: Tensor, state: Any, lengths: Tensor | None) -> tuple[Tensor, State]:
        """`forward` for a GRU, given z (B, T, I)."""
        check_state("hidden", state, (1, len(z), self.rnn.hidden_size))
        y = self.fc(state[0]).unsqueeze(1)
        outputs = []
        for t in range(z.shape[1]):
            x = torch.cat([z[:, t : t + 1], y], 2)
            h, following = self.rnn(x, state)
            if lengths is not None:
                goes_on = (lengths > t).to(h.device).unsqueeze(1)
                following = torch.where(goes_on, following, state)
            state = following
            y = self.fc(h)
            outputs.append(y)
        return torch.cat(outputs, 1), state
