"""What the tests of frozen modules share: cases, oracles, and how near results must be.

The oracle of a frozen module is torch.nn's in float64 with the weights as they were rounded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnfast
from rnnfast import backend
from rnnfast.frozen import TYPES

KINDS: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (nn.LSTM, {}),
    (nn.GRU, {}),
    (nn.RNN, {}),
    (nn.RNN, {"nonlinearity": "relu"}),
    (nn.LSTM, {"proj_size": 5}),
    (nn.GRU, {"bias": False}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 3, "batch_first": True}),
]
SIZES = [(4, 3, 9, 20), (7, 1, 1, 6), (3, 20, 33, 70), (1, 2, 64, 16), (5, 40, 2, 129)]
"""(T, B, I, H): below, at and beyond whole vectors, tiles and pairs."""


class Sizes(NamedTuple):
    """Of V tokens that are read as one-hot vectors, or as vectors of I elements."""

    V: int
    T: int
    B: int
    I: int
    H: int


TOKENS = Sizes(23, 9, 4, 6, 21)
every_type = pytest.mark.parametrize("weights", TYPES)


def row_steps() -> int:
    """The largest integer to which int8 products round inputs and states.

    That is one of 8 bits where the instruction set in use has VNNI, else one of 13 bits.
    """
    assert backend.EXTENSION is not None
    name = backend.EXTENSION.get_cpu_capability()
    return 4095 if name in ("portable", "avx2", "avx512") else 127


def bound_of(weights: str) -> float:
    """The largest error relative to an oracle that does not round states, of values of size 1."""
    return 4 / row_steps() if weights == "int8" else 2e-6


def double_of(module: nn.Module, frozen: nn.Module) -> nn.Module:
    """torch.nn's module in float64 with the rounded weights of a frozen one."""
    rounded = {name: each.dense() for name, each in frozen.unpacked().items()}
    result = copy.deepcopy(module)
    result.load_state_dict({**module.state_dict(), **rounded})
    return result.double()


def tensors_of(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return [tensor for part in results for tensor in tensors_of(part)]


def assert_near(results: Any, expected: Any, bound: float) -> None:
    for one, other in zip(tensors_of(results), tensors_of(expected), strict=True):
        assert one.shape == other.shape
        assert one.dtype is torch.float32
        torch.testing.assert_close(one.double(), other.double(), rtol=bound, atol=bound)


def states_for(module: nn.Module, batch: int) -> Any:
    rows = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(rows, batch, module.proj_size or module.hidden_size)
    return (h, torch.randn(rows, batch, module.hidden_size)) if module.mode == "LSTM" else h


def calls_of(options: dict[str, Any]) -> list[Callable[[nn.Module], Any]]:
    """Calls of LSTM(9, 20) with sequences of unequal length, resets, and single sequences."""
    time_first = not options.get("batch_first")
    x = torch.randn(6, 4, 9) if time_first else torch.randn(4, 6, 9)
    lengths = torch.tensor([6, 2, 0, 4])
    reset = torch.rand(x.shape[:2]) < 0.3
    packed = pack_padded_sequence(
        torch.randn(6, 4, 9), torch.tensor([3, 6, 1, 2]), enforce_sorted=False
    )
    return [
        lambda module: module(x, lengths=lengths),
        lambda module: module(x, reset=reset),
        lambda module: module(x, lengths=lengths, reset=reset),
        lambda module: module(x[0]),
        lambda module: module(x[0], reset=reset[0]),
        lambda module: [pad_packed_sequence(module(packed)[0])[0], module(packed)[1]],
        lambda module: module(x[:, :0] if time_first else x[:0]),
        lambda module: module(x.transpose(0, 2).contiguous().transpose(0, 2)),
    ]


def reader(kind: type[Any], hidden: int = TOKENS.H, count: int = TOKENS.V, **options: Any) -> Any:
    """A layer that reads one-hot tokens."""
    return kind(count, hidden, tokens=True, **options).requires_grad_(False)


def embedded(kind: type[Any], count: int = TOKENS.V, **options: Any) -> tuple[Any, nn.Embedding]:
    """A layer that reads vectors, and an embedding."""
    table = nn.Embedding(count, TOKENS.I, padding_idx=2).requires_grad_(False)
    return kind(TOKENS.I, TOKENS.H, **options).requires_grad_(False), table


def drawn(module: Any, count: int = TOKENS.V, steps: int = TOKENS.T) -> Tensor:
    return torch.randint(count, (TOKENS.B, steps) if module.batch_first else (steps, TOKENS.B))


class Model(nn.Module):
    """With recurrent layers at several places, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.layers = nn.ModuleList([rnnfast.LSTM(8, 16), nn.GRU(16, 16)])
        self.again = self.layers[1]
        self.cell = nn.GRUCell(16, 16)
        self.dropout = nn.Dropout(0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        y, _ = self.layers[0](self.embedding(tokens))
        y, _ = self.layers[1](y)
        y, _ = self.again(y)
        self.layers[0].flatten_parameters()
        return self.dropout(self.cell(y[-1]))
