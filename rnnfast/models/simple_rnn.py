"""The recurrent network of PyTorch's tutorials, which reads the concatenated input and state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rnnfast import functional
from rnnfast.backend import check_name
from rnnfast.models.layers import (
    Device,
    Lengths,
    as_batch,
    as_lengths,
    check_sizes,
    check_state,
    zero_beyond,
)
from rnnfast.models.results import pair


class SimpleRNN(nn.Module):
    """Classifies every step from the concatenation of the input and the previous state.

    h_t = tanh(W_h [x_t, h_{t-1}] + b_h)
    o_t = log_softmax(W_o [x_t, h_{t-1}] + b_o)

    [x, h] is a concatenation: W_h, ``i2h.weight``, is (H, I+H), and W_o, ``i2o.weight``, is
    (O, I+H). The output depends on the previous state, not on the new one. The network of PyTorch's
    first tutorial on RNNs does the same, without the tanh, and its state_dict can be loaded here.
    The columns of W_h for x and for h are the W_ih and W_hh of an Elman layer, which runs a whole
    sequence in one call.

    Args:
        input_size: I, the number of features of an input.
        hidden_size: H, the number of features of the state.
        output_size: O, the number of classes.
        device, dtype: the device and dtype of the parameters.
        backend: the backend of the recurrence, see `rnnfast.backend`.

    Raises:
        ValueError: a size is not positive, or there is no such backend.
    """

    backend: str | None = None

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
        self.backend = None if backend is None else check_name(backend, "backend")
        both = input_size + hidden_size
        self.i2h = nn.Linear(both, hidden_size, device=device, dtype=dtype)
        self.i2o = nn.Linear(both, output_size, device=device, dtype=dtype)

    def forward(
        self, input: Tensor, hidden: Tensor | None = None, *, lengths: Lengths = None
    ) -> tuple[Tensor, Tensor]:
        """Run one step or a whole sequence.

        Args:
            input: one step (B, I), or sequences (B, T, I).
            hidden: h_0 (B, H); zeros if None.
            lengths: integers (B) from 0 to T, the length of each sequence; T if None.

        Returns:
            The log-probabilities of the classes, (B, O) or (B, T, O), with zeros after the end of a
            sequence; and h (B, H) after the last step of each sequence.

        Raises:
            ValueError: the input has another number of dimensions, or a length is out of range.
            RuntimeError: shapes, dtypes or devices do not match.
            TypeError: ``lengths`` are not integers.
        """
        x = as_batch(self, input, self.input_size)
        hidden = self.init_hidden(len(x)) if hidden is None else hidden
        check_state("hidden", hidden, (len(x), self.hidden_size))
        lengths = as_lengths(x, lengths)
        x = zero_beyond(x, lengths)  # i2o must not read a NaN in the padding

        w_ih, w_hh = self.i2h.weight.split([self.input_size, self.hidden_size], 1)
        weights = [w_ih, w_hh, self.i2h.bias, torch.zeros_like(self.i2h.bias)]
        h, final = functional.rnn(
            x, hidden.unsqueeze(0), weights, batch_first=True, lengths=lengths, backend=self.backend
        )
        former = torch.cat([hidden.unsqueeze(1), h[:, :-1]], 1)
        output = self.i2o(torch.cat([x, former], 2)).log_softmax(2)
        output = zero_beyond(output, lengths)
        return pair(output if input.dim() == 3 else output.squeeze(1), final.squeeze(0))

    @property
    def input_size(self) -> int:
        """I, the number of features of an input."""
        return self.i2h.in_features - self.i2h.out_features

    @property
    def hidden_size(self) -> int:
        """H, the number of features of the state."""
        return self.i2h.out_features

    @property
    def output_size(self) -> int:
        """O, the number of classes."""
        return self.i2o.out_features

    def init_hidden(self, batch_size: int = 1) -> Tensor:
        """The state before the first step: zeros (B, H)."""
        return self.i2h.weight.new_zeros(batch_size, self.hidden_size)
