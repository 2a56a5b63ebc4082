"""What the recurrent models share: the choice of layers, checks, and the ends of sequences.

The models here are batch-first: an input is (B, T, I). All of them return ``(output, state)``, the
bidirectional one too (see `rnnfast.models.results`), and take such a state to start from; None is
zeros. The state of the single-layer textbook networks (`SimpleRNN`, `ElmanRNN`, `JordanRNN`) is
what one step hands to the next, (B, features). That of the others is torch.nn's, (L*D, B, H), and
for LSTM the pair (h, c) of such.

Sequences of unequal length are padded by ``torch.nn.utils.rnn.pad_sequence(sequences,
batch_first=True)``; ``lengths=[len(each) for each in sequences]`` tells the models where they end.

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
    """Layers of one kind of cell, ``rnn``, and a linear layer that reads them, ``fc``.

    Args:
        input_size: I, the number of features of an input.
        hidden_size: H, the number of features of a state.
        output_size: O, the number of features of an output.
        num_layers: L; each layer reads the outputs of the one below.
        cell: "lstm", "gru", "rnn_tanh" or "rnn_relu"; the formulas are those of `rnnfast.LSTM`,
            `rnnfast.GRU` and `rnnfast.RNN`.
        dropout: the probability of zeroing an element of what goes into ``fc`` and, with more than
            one layer, of what passes between the layers; in training only.
        device, dtype: of the parameters.
        backend: what runs the layers, see `rnnfast.backend`.

    Raises:
        ValueError: a size is not positive, the dropout is no probability, or there is no such cell
            or backend.
    """

    bidirectional: ClassVar[bool] = False
    """Whether each layer also runs from the end of the sequence to the start."""

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
        """The state before the first step: zeros (L*D, B, H), for LSTM a pair of such."""
        rows = self.num_layers * (2 if self.bidirectional else 1)
        zeros = self.fc.weight.new_zeros(rows, batch_size, self.hidden_size)
        return (zeros, zeros.clone()) if self.rnn.mode == "LSTM" else zeros


def hidden_of(state: State) -> Tensor:
    """The h (L*D, B, H) of a state."""
    return state[0] if isinstance(state, tuple) else state


def as_lengths(input: Tensor, lengths: Lengths) -> Tensor | None:
    """The lengths for an input (B, T, features), if any, as int64 (B) on the CPU.

    Raises:
        TypeError, RuntimeError, ValueError: as the layers, for they check them so.
    """
    return check_extras(input, lengths, None, False, batch_first=True).lengths


def zero_beyond(tensor: Tensor, lengths: Lengths) -> Tensor:
    """A batch (B, T, features) with zeros from step ``lengths[b]`` of each sequence b on."""
    if lengths is None:
        return tensor
    lengths = torch.as_tensor(lengths, device=tensor.device).unsqueeze(1)
    beyond = torch.arange(tensor.shape[1], device=tensor.device) >= lengths
    return tensor.masked_fill(beyond.unsqueeze(2), 0)


def last_step(tensor: Tensor, lengths: Lengths) -> Tensor:
    """The last step (B, features) that each sequence of a batch (B, T, features) has.

    Of an empty sequence it is the last of the batch, which `zero_beyond` has made zeros.
    """
    if lengths is None:
        return tensor[:, -1]
    last = torch.as_tensor(lengths, device=tensor.device).long() - 1
    return tensor[torch.arange(len(tensor), device=tensor.device), last]


def check_sizes(**sizes: int) -> None:
    """Raises ValueError unless all sizes are positive."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be greater than zero, got {size}")


def check_batch(model: nn.Module, input: Tensor) -> None:
    """Raises ValueError unless the input is (B, T, I): the layers would take (T, I) as well."""
    if input.dim() != 3:
        raise ValueError(
            f"{type(model).__name__}: expected input of shape (batch, time, features), "
            f"got {tuple(input.shape)}"
        )


def as_batch(model: nn.Module, input: Tensor, input_size: int) -> Tensor:
    """An input (B, T, I), or one step of it (B, I), as (B, T, I) in which T is at least 1.

    Raises:
        ValueError: it has another rank.
        RuntimeError: there is no step, or the features are not ``input_size``.
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
    """Raises RuntimeError unless a state is a tensor of this shape."""
    if not isinstance(state, Tensor) or state.shape != shape:
        found = list(state.shape) if isinstance(state, Tensor) else type(state).__name__
        raise RuntimeError(
            f"Expected {name} size {shape}, got {found}; init_hidden({shape[-2]}) makes such "
            f"zeros, if the batch is {shape[-2]}: an input sequence is (batch, time, features)"
        )
