"""Modules that were pickled by an older version, with fewer attributes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnnfast
from rnnfast import models
from rnnfast.models import CharLSTMConfig, Seq2SeqConfig

X, TOKENS = torch.randn(2, 5, 3), torch.tensor([[1, 2, 0], [3, 4, 4]])

MODULES: dict[type[nn.Module], tuple[Callable[[], nn.Module], set[str], tuple[Any, ...]]] = {
    rnnfast.RNN: (lambda: rnnfast.RNN(3, 4), {"nonlinearity"}, (X,)),
    rnnfast.LSTM: (lambda: rnnfast.LSTM(3, 4), set(), (X,)),
    rnnfast.GRU: (lambda: rnnfast.GRU(3, 4), set(), (X,)),
    rnnfast.RNNCell: (lambda: rnnfast.RNNCell(3, 4), {"nonlinearity"}, (X[0],)),
    rnnfast.LSTMCell: (lambda: rnnfast.LSTMCell(3, 4), set(), (X[0],)),
    rnnfast.GRUCell: (lambda: rnnfast.GRUCell(3, 4), set(), (X[0],)),
    models.SimpleRNN: (lambda: models.SimpleRNN(3, 4, 2), {"input_size", "hidden_size"}, (X,)),
    models.ElmanRNN: (lambda: models.ElmanRNN(3, 4, 2), set(), (X,)),
    models.JordanRNN: (lambda: models.JordanRNN(3, 4, 2), {"input_size", "output_size"}, (X,)),
    models.RNNModel: (lambda: models.RNNModel(3, 4, 2), set(), (X,)),
    models.MultiLayerRNN: (lambda: models.MultiLayerRNN(3, 4, 2), set(), (X,)),
    models.BidirectionalRNN: (lambda: models.BidirectionalRNN(3, 4, 2), set(), (X,)),
    models.SequenceClassifier: (lambda: models.SequenceClassifier(3, 4, 2), set(), (X,)),
    models.SequenceTagger: (lambda: models.SequenceTagger(3, 4, 2), set(), (X,)),
    models.SequenceGenerator: (
        lambda: models.SequenceGenerator(3, 4, 2),
        {"input_size"},
        (X[:, 0], 3),
    ),
    models.CharLSTM: (lambda: models.CharLSTM(5, 4), {"config"}, (TOKENS,)),
    models.Seq2SeqLSTM: (lambda: models.Seq2SeqLSTM(5, 5, 4), {"config"}, (TOKENS, TOKENS)),
}
"""For each class: its constructor, the attributes that every version has pickled, and arguments.

Attributes that were added later do not belong here. They have a default in their class.
"""


def test_no_class_is_forgotten() -> None:
    found = [*vars(rnnfast).values(), *vars(models).values()]
    assert {k for k in found if inspect.isclass(k) and issubclass(k, nn.Module)} == MODULES.keys()


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for part in result for t in flat(part)]


@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_what_is_missing_is_the_default(kind: type[nn.Module]) -> None:
    make, always, args = MODULES[kind]
    module = make()
    base = getattr(kind, "torch_class", None)
    known = vars(base(3, 4) if base else nn.Module()).keys() | always
    state = module.__getstate__() if hasattr(module, "__getstate__") else vars(module)
    dropped = state.keys() - known
    old = kind.__new__(kind)
    old.__setstate__({name: value for name, value in state.items() if name in known})
    assert {name: getattr(old, name) for name in dropped} == {n: state[n] for n in dropped}
    assert repr(old) == repr(module)
    torch.testing.assert_close(flat(old(*args)), flat(module(*args)), rtol=0, atol=0)


def test_configurations_grow_at_the_end() -> None:
    """A named tuple is pickled as its values; fields that an older version lacked have defaults."""
    assert CharLSTMConfig(5, 4, 2, 4, 0.0).tied_weights is False
    values = (5, 5, 4, 1, 4, 0.0, False, 0, 1, 2)
    assert Seq2SeqConfig(*values)[: len(values)] == values
