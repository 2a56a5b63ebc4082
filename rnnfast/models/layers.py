"""The common base of the recurrent models: layers, checks, and sequences of unequal length.

All models are batch-first: an input is (B, T, I). All models return ``(output, state)``, see
`rnnfast.models.results`, and accept such a state as the initial one; None means zeros. The
single-layer textbook networks (`SimpleRNN`, `ElmanRNN`, `JordanRNN`) have a state (B, features).
The other models have the state of torch.nn's layers: (L*D, B, H), or a pair (h, c) of such tensors
for LSTM.

To pad sequences of unequal length, use ``torch.nn.utils.rnn.pad_sequence(sequences,
batch_first=True)`` and pass ``lengths=[len(each) for each in sequences]`` to the model.

Sizes: B batch, T time, I input, H hidden, O output, L layers, D directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from rnnfast.bases import Layers
from rnnfast.checks import check_extras
from rnnfast.models.results import State
from rnnfast.modules import GRU, LSTM, RNN

CellName = Literal["lstm", "gru", "rnn_tanh", "rnn_relu"]
Lengths = Tensor | Sequence[int] | None
Device = torch.device | str | None


class RecurrentModel(nn.Module):
    """Recurrent layers of one cell type, ``rnn``, followed by a linear layer, ``fc``.

    Args:
        input_size: I, the number of features of an input.
        hidden_size: H, the number of features of a state.
        output_size: O, the number of features of an output.
        num_layers: L, the number of stacked layers.
        cell: "lstm", "gru", "rnn_tanh" or "rnn_relu"; the formulas are those of `rnnfast.LSTM`,
            `rnnfast.GRU` and `rnnfast.RNN`.
        dropout: the probability of dropout, in training only, on the input of ``fc`` and, with more
            than one layer, between the layers.
        device, dtype: the device and dtype of the parameters.
        backend: the backend of the layers, see `rnnfast.backend`.

    Raises:
        ValueError: a size is not positive, the dropout is not a probability, or there is no such
            cell or backend.
    """

    bidirectional: ClassVar[bool] = False
    """Whether each layer also reads the sequence from its end to its start."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        num_layers: int = 1,
        *,
        cell: CellName = "lstm",
        dropout: float = 0.0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes(input_size=input_size, hidden_size=hidden_size, output_size=output_size)
        if cell not in get_args(CellName):
            raise ValueError(f"cell should be one of {', '.join(get_args(CellName))}, got {cell!r}")
        options: dict[str, Any] = {
            "num_layers": num_layers,
            "batch_first": True,
            "dropout": dropout if num_layers > 1 else 0.0,
            "bidirectional": self.bidirectional,
            "device": device,
            "dtype": dtype,
            "backend": backend,
        }
        self.rnn: Layers  # the type of the state depends on the cell
        if cell == "lstm":
            self.rnn = LSTM(input_size, hidden_size, **options)
        elif cell == "gru":
            self.rnn = GRU(input_size, hidden_size, **options)
        else:
            nonlinearity = cell.removeprefix("rnn_")
            self.rnn = RNN(input_size, hidden_size, nonlinearity=nonlinearity, **options)
        self.dropout = nn.Dropout(dropout)
        features = (2 if self.bidirectional else 1) * hidden_size
        self.fc = nn.Linear(features, output_size, device=device, dtype=dtype)

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

    @property
    def num_layers(self) -> int:
        """L, the number of layers."""
        return self.rnn.num_layers

    def init_hidden(self, batch_size: int = 1) -> State:
        """The state before the first step: zeros (L*D, B, H), or a pair of them for LSTM."""
        rows = self.num_layers * (2 if self.bidirectional else 1)
        zeros = self.fc.weight.new_zeros(rows, batch_size, self.hidden_size)
        return (zeros, zeros.clone()) if self.rnn.mode == "LSTM" else zeros


def hidden_of(state: State) -> Tensor:
    """The h (L*D, B, H) of a state."""
    return state[0] if isinstance(state, tuple) else state


def as_lengths(input: Tensor, lengths: Lengths) -> Tensor | None:
    """Check the lengths for an input (B, T, features); return them as int64 (B) on the CPU.

    Raises:
        TypeError, RuntimeError, ValueError: the same errors as those of the layers.
    """
    return check_extras(input, lengths, None, False, batch_first=True).lengths


def zero_beyond(tensor: Tensor, lengths: Lengths) -> Tensor:
    """Zero the steps from ``lengths[b]`` on in each sequence b of a batch (B, T, features)."""
    if lengths is None:
        return tensor
    lengths = torch.as_tensor(lengths, device=tensor.device).unsqueeze(1)
    beyond = torch.arange(tensor.shape[1], device=tensor.device) >= lengths
    return tensor.masked_fill(beyond.unsqueeze(2), 0)


def last_step(tensor: Tensor, lengths: Lengths) -> Tensor:
    """The last valid step (B, features) of each sequence of a batch (B, T, features).

    For an empty sequence this is step T - 1, which `zero_beyond` has set to zeros.
    """
    if lengths is None:
        return tensor[:, -1]
    last = torch.as_tensor(lengths, device=tensor.device).long() - 1
    return tensor[torch.arange(len(tensor), device=tensor.device), last]


def check_sizes(**sizes: int) -> None:
    """Raise ValueError unless all sizes are positive."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be greater than zero, got {size}")


def check_batch(model: nn.Module, input: Tensor) -> None:
    """Raise ValueError unless the input is (B, T, I); the layers would also accept (T, I)."""
    if input.dim() != 3:
        raise ValueError(
            f"{type(model).__name__}: expected input of shape (batch, time, features), "
            f"got {tuple(input.shape)}"
        )


def as_batch(model: nn.Module, input: Tensor, input_size: int) -> Tensor:
    """Check an input (B, T, I) or a single step (B, I), and return it as (B, T, I).

    Raises:
        ValueError: the input has another number of dimensions.
        RuntimeError: T is 0, or I is not ``input_size``.
    """
    if input.dim() not in (2, 3):
        raise ValueError(
            f"{type(model).__name__}: expected input of shape (batch, features) or "
            f"(batch, time, features), got {tuple(input.shape)}"
        )
    if input.shape[-1] != input_size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {input_size}, "
            f"got {input.shape[-1]}"
        )
    if input.dim() == 2:
        return input.unsqueeze(1)
    if input.shape[1] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    return input


def check_state(name: str, state: Tensor, shape: tuple[int, ...]) -> None:
    """Raise RuntimeError unless a state is a tensor of this shape."""
    if not isinstance(state, Tensor) or state.shape != shape:
        found = list(state.shape) if isinstance(state, Tensor) else type(state).__name__
        raise RuntimeError(
            f"Expected {name} size {shape}, got {found}; init_hidden({shape[-2]}) makes a state of "
            f"zeros for a batch of {shape[-2]}. An input sequence is (batch, time, features)"
        )
