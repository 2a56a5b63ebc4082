"""Elman's simple recurrent network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rnnfast.models.layers import (
    Device,
    Lengths,
    as_batch,
    check_sizes,
    check_state,
    zero_beyond,
)
from rnnfast.models.results import pair
from rnnfast.modules import RNN


class ElmanRNN(nn.Module):
    """An Elman network: the hidden state feeds back, and each step has a linear output.

    h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
    y_t = W_ho h_t + b_o

    See Elman, "Finding structure in time", Cognitive Science 14, 1990. Elman's units are logistic;
    here the hidden units are tanh and the output is linear. ``rnn`` holds W_ih (H, I), W_hh (H, H)
    and their biases; ``fc`` holds W_ho (O, H) and b_o. In `JordanRNN` the output feeds back
    instead.

    Args:
        input_size: I, the number of features of an input.
        hidden_size: H, the number of features of the state.
        output_size: O, the number of features of an output.
        device, dtype: the device and dtype of the parameters.
        backend: the backend of the layer, see `rnnfast.backend`.

    Raises:
        ValueError: a size is not positive, or there is no such backend.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes(input_size=input_size, hidden_size=hidden_size, output_size=output_size)
        self.rnn = RNN(
            input_size, hidden_size, batch_first=True, device=device, dtype=dtype, backend=backend
        )
        self.fc = nn.Linear(hidden_size, output_size, device=device, dtype=dtype)

    def forward(
        self, input: Tensor, hidden: Tensor | None = None, *, lengths: Lengths = None
    ) -> tuple[Tensor, Tensor]:
        """Run one step or a whole sequence.

        Args:
            input: one step (B, I), or sequences (B, T, I).
            hidden: h_0 (B, H); zeros if None.
            lengths: integers (B) from 0 to T, the length of each sequence; T if None.

        Returns:
            y (B, O) or (B, T, O), with zeros after the end of a sequence; and h (B, H) after the
            last step of each sequence.

        Raises:
            ValueError: the input has another number of dimensions, or a length is out of range.
            RuntimeError: shapes, dtypes or devices do not match.
            TypeError: ``lengths`` are not integers.
        """
        x = as_batch(self, input, self.input_size)
        hidden = self.init_hidden(len(x)) if hidden is None else hidden
        check_state("hidden", hidden, (len(x), self.hidden_size))
        h, final = self.rnn(x, hidden.unsqueeze(0), lengths=lengths)
        output = zero_beyond(self.fc(h), lengths)
        return pair(output if input.dim() == 3 else output.squeeze(1), final.squeeze(0))

    @property
    def input_size(self) -> int:
        """I, the number of features of an input."""
        return self.rnn.input_size

    @property
    def hidden_size(self) -> int:
        """H, the number of features of the state."""
        return self.rnn.hidden_size

    @property
    def output_size(self) -> int:
        """O, the number of features of an output."""
        return self.fc.out_features

    def init_hidden(self, batch_size: int = 1) -> Tensor:
        """The state before the first step: zeros (B, H)."""
        return self.fc.weight.new_zeros(batch_size, self.hidden_size)
