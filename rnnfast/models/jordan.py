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
    """The former output, not the hidden state, is what a step sees of the past.

    h_t = tanh(W_ih x_t + W_oh y_{t-1} + b_h)
    y_t = W_ho h_t + b_o

    Jordan, "Attractor dynamics and parallelism in a connectionist sequential machine", Proceedings
    of the Cognitive Science Society, 1986, without the decay of his state units. ``i2h`` has W_ih
    (H, I) and b_h, ``o2h`` has W_oh (H, O), ``h2o`` has W_ho (O, H) and b_o. Compare `ElmanRNN`, in
    which the hidden state feeds back.

    As the output is linear, it can be put into the formula of h: from the second step on

    h_t = tanh(W_ih x_t + b_h + W h_{t-1} + b), W = W_oh W_ho (H, H), b = W_oh b_o,

    which is an Elman layer and runs as one: a step multiplies by the H*H weights of W in place of
    the 2*H*O of W_ho and W_oh. The first step is taken by itself, for the output before it is given
    and need not be that of any hidden state.

    Args:
        input_size: I, the number of features of an input.
        hidden_size: H, the number of features of the hidden units.
        output_size: O, the number of features of an output, and so of the state.
        device, dtype: of the parameters.
        backend: what runs the recurrence, see `rnnfast.backend`.

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
        """Runs one step or a whole sequence.

        Args:
            input: one step (B, I), or a sequence (B, T, I).
            previous_output: y_0 (B, O), the output before the first step; zeros if None.
            lengths: integers (B) from 0 to T, or None: how many steps each sequence has.

        Returns:
            y (B, O) or (B, T, O), zeros beyond a sequence's end; and the y (B, O) of its last step,
            with which a further call goes on.

        Raises:
            ValueError: the input has another rank, or a length is out of range.
            RuntimeError: shapes, dtypes or devices do not fit.
            TypeError: ``lengths`` are no integers.
        """
        x = as_batch(self, input, self.input_size)
        previous = self.init_hidden(len(x)) if previous_output is None else previous_output
        check_state("previous_output", previous, (len(x), self.output_size))
        lengths = as_lengths(x, lengths)

        x = zero_beyond(x, lengths)  # a NaN in the first step of an empty sequence would reach i2h
        h = torch.tanh(self.i2h(x[:, :1]) + self.o2h(previous).unsqueeze(1))
        if x.shape[1] > 1:
            w_hh, b_hh = self.o2h.weight @ self.h2o.weight, self.o2h(self.h2o.bias)
            following, _ = functional.rnn(
                x[:, 1:],
                h.transpose(0, 1),
                [self.i2h.weight, w_hh, self.i2h.bias, b_hh],
                batch_first=True,
                # at least 1, for not every backend takes 0; what is too much is dropped below
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
