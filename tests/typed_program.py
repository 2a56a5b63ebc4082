"""A user's program, for type checkers: `test_types.py` has mypy check it. It also runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from typing_extensions import assert_type

import rnnfast
from rnnfast import functional

Pair = tuple[Tensor, Tensor]


class Tagger(nn.Module):
    """A model as users write them."""

    def __init__(self, vocabulary: int, size: int, tags: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size)
        self.lstm = rnnfast.LSTM(size, size, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * size, tags)

    def forward(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        output, (h_n, c_n) = self.lstm(tokens, embedding=self.embedding, lengths=lengths)
        assert_type(output, Tensor)
        assert_type(h_n, Tensor)
        assert_type(c_n, Tensor)
        return torch.log_softmax(self.head(output), -1)


def layers(x: Tensor, packed: PackedSequence, either: bool) -> None:
    rnn, gru, lstm = rnnfast.RNN(3, 4), rnnfast.GRU(3, 4), rnnfast.LSTM(3, 4)
    h = torch.zeros(1, 2, 4)
    reset = torch.zeros(5, 2, dtype=torch.bool)
    assert_type(rnn(x), tuple[Tensor, Tensor])
    assert_type(rnn(packed, h), tuple[PackedSequence, Tensor])
    assert_type(gru(x, h, lengths=torch.tensor([5, 2])), tuple[Tensor, Tensor])
    assert_type(gru(packed), tuple[PackedSequence, Tensor])
    assert_type(gru.forward(x, reset=reset), tuple[Tensor, Tensor])
    assert_type(lstm(x), tuple[Tensor, Pair])
    assert_type(lstm(x, (h, h), return_cells=False), tuple[Tensor, Pair])
    assert_type(lstm(x, return_cells=True), tuple[Tensor, Pair, Tensor])
    assert_type(lstm(x, return_cells=either), tuple[Tensor, Pair] | tuple[Tensor, Pair, Tensor])
    assert_type(lstm(packed), tuple[PackedSequence, Pair])
    assert_type(lstm(packed, return_cells=True), tuple[PackedSequence, Pair, PackedSequence])
    assert_type(lstm.forward(x, (h, h)), tuple[Tensor, Pair])
    assert_type(lstm.weight_ih_l0, Tensor | nn.Module)  # as torch.nn.LSTM's


def cells(x: Tensor) -> None:
    h = assert_type(rnnfast.RNNCell(3, 4)(x), Tensor)
    h = assert_type(rnnfast.GRUCell(3, 4)(x, h), Tensor)
    state = assert_type(rnnfast.LSTMCell(3, 4)(x), Pair)
    state = assert_type(rnnfast.LSTMCell(3, 4).forward(x, state), Pair)


def functions(x: Tensor, either: bool) -> None:
    weights = [weight.detach() for weight in rnnfast.LSTM(3, 4).parameters()]
    lstm = functional.lstm
    assert_type(lstm(x, None, weights), tuple[Tensor, Pair])
    assert_type(lstm(x, None, weights, return_cells=True), tuple[Tensor, Pair, Tensor])
    assert_type(
        lstm(x, None, weights, return_cells=either),
        tuple[Tensor, Pair] | tuple[Tensor, Pair, Tensor],
    )
    weights = [weight.detach() for weight in rnnfast.GRU(3, 4).parameters()]
    assert_type(functional.gru(x, None, weights), tuple[Tensor, Tensor])
    weights = [weight.detach() for weight in rnnfast.RNN(3, 4).parameters()]
    assert_type(functional.rnn(x, None, weights), tuple[Tensor, Tensor])
    w_ih, w_hh, b_ih, b_hh = (weight.detach() for weight in rnnfast.LSTMCell(3, 4).parameters())
    assert_type(functional.lstm_cell(x[0], None, w_ih, w_hh, b_ih, b_hh), Pair)


@rnnfast.use_backend("reference")
def doubled(x: Tensor) -> Tensor:
    return 2 * x


def tools(model: nn.Module, x: Tensor) -> None:
    assert_type(doubled(x), Tensor)
    assert_type(rnnfast.accelerate(model, backend="fused").replaced, dict[str, str])
    rnnfast.restore(model)
    with rnnfast.patch(), rnnfast.use_backend("aten"):
        pass
    assert_type(rnnfast.doctor(), str)
    assert_type(rnnfast.release_memory(), int)


if __name__ == "__main__":
    sequences = torch.randn(5, 2, 3)
    layers(sequences, pack_padded_sequence(sequences, [5, 2]), True)
    cells(sequences[0])
    functions(sequences, False)
    tools(nn.Sequential(nn.LSTM(3, 4)), sequences)
    print(Tagger(7, 3, 2)(torch.randint(7, (2, 5)), [5, 3]).shape)
