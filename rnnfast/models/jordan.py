"""Jordan's network, in which the output feeds back."""

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
    last_step,
    zero_beyond,
)
from rnnfast.models.results import pair


class JordanRNN(nn.Module):
    """A Jordan network: the previous output feeds back, instead of the hidden state.

    h_t = tanh(W_ih x_t + W_oh y_{t-1} + b_h)
    y_t = W_ho h_t + b_o

    See Jordan, "Attractor dynamics and parallelism in a connectionist sequential machine",
    Proceedings of the Cognitive Science Society, 1986. The decay of Jordan's state units is left
    out. ``i2h`` holds W_ih (H, I) and b_h, ``o2h`` holds W_oh (H, O), ``h2o`` holds W_ho (O, H) and
    b_o. In `ElmanRNN` the hidden state feeds back instead.

    The output is linear, so it can be substituted into the formula of h. From the second step on

    h_t = tanh(W_ih x_t + b_h + W h_{t-1} + b), W = W_oh W_ho (H, H), b = W_oh b_o.

    This is an Elman layer, and it runs as one. A step then multiplies by the H*H weights of W
    instead of the 2*H*O weights of W_ho and W_oh. The first step is computed separately, because
    y_0 is an argument and need not belong to any hidden state.

    Args:
        input_size: I, the number of features of an input.
        hidden_size: H, the number of features of the hidden units.
        output_size: O, the number of features of an output, which is also the state.
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
        self.i2h = nn.Linear(input_size, hidden_size, device=device, dtype=dtype)
        self.o2h = nn.Linear(output_size, hidden_size, bias=False, device=device, dtype=dtype)
        self.h2o = nn.Linear(hidden_size, output_size, device=device, dtype=dtype)

    def forward(
        self, input: Tensor, previous_output: Tensor | None = None, *, lengths: Lengths = None
    ) -> tuple[Tensor, Tensor]:
        """Run one step or a whole sequence.

        Args:
            input: one step (B, I), or sequences (B, T, I).
            previous_output: y_0 (B, O), the output before the first step; zeros if None.
            lengths: integers (B) from 0 to T, the length of each sequence; T if None.

        Returns:
            y (B, O) or (B, T, O), with zeros after the end of a sequence; and y (B, O) of the last
            step of each sequence, from which a further call continues.

        Raises:
            ValueError: the input has another number of dimensions, or a length is out of range.
            RuntimeError: shapes, dtypes or devices do not match.
            TypeError: ``lengths`` are not integers.
        """
        x = as_batch(self, input, self.input_size)
        previous = self.init_hidden(len(x)) if previous_output is None else previous_output
        check_state("previous_output", previous, (len(x), self.output_size))
        lengths = as_lengths(x, lengths)

        x = zero_beyond(x, lengths)  # i2h must not read a NaN in the padding of an empty sequence
        h = torch.tanh(self.i2h(x[:, :1]) + self.o2h(previous).unsqueeze(1))
        if x.shape[1] > 1:
            w_hh, b_hh = self.o2h.weight @ self.h2o.weight, self.o2h(self.h2o.bias)
            following, _ = functional.rnn(
                x[:, 1:],
                h.transpose(0, 1),
                [self.i2h.weight, w_hh, self.i2h.bias, b_hh],
                batch_first=True,
                # Some backends refuse lengths of 0; `zero_beyond` removes the extra step.
                lengths=None if lengths is None else (lengths - 1).clamp(min=1),
                backend=self.backend,
            )
            h = torch.cat([h, following], 1)
        output = zero_beyond(self.h2o(h), lengths)

        final = last_step(output, lengths)
        if lengths is not None:
            final = torch.where((lengths > 0).to(final.device).unsqueeze(1), final, previous)
        return pair(output if input.dim() == 3 else output.squeeze(1), final)

    @property
    def input_size(self) -> int:
        """I, the number of features of an input."""
        return self.i2h.in_features

    @property
    def hidden_size(self) -> int:
        """H, the number of features of the hidden units."""
        return self.i2h.out_features

    @property
    def output_size(self) -> int:
        """O, the number of features of an output."""
        return self.h2o.out_features

    def init_hidden(self, batch_size: int = 1) -> Tensor:
        """The output before the first step: zeros (B, O)."""
        return self.h2o.weight.new_zeros(batch_size, self.output_size)
