"""PyTorch's own table of module inputs, applied to rnnfast's modules instead of torch.nn's."""

from __future__ import annotations

import sys
import unittest
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import rnnfast

KINDS = ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"]

kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    """Returns the rows of the table by the name of the module."""
    with pytest.MonkeyPatch.context() as patch:
        # The import would forbid the whole process to set the flags of torch.backends.
        patch.setattr(torch.backends, "disable_global_flags", lambda: None)
        if find_spec("expecttest") is None:  # required by the import, but not by what is used here
            stand_in = SimpleNamespace(TestCase=unittest.TestCase)
            patch.setitem(sys.modules, "expecttest", stand_in)
        rows = import_module("torch.testing._internal.common_modules").module_db
    by_class = {row.module_cls: row for row in rows}
    return {kind: by_class[getattr(nn, kind)] for kind in KINDS}


def inputs(function: Any, row: Any, dtype: torch.dtype, training: bool) -> list[Any]:
    torch.manual_seed(0)
    found = function(row, "cpu", dtype, True, training, with_packed_sequence=True)
    assert found
    return list(found)


def build(namespace: ModuleType, kind: str, sample: Any) -> Any:
    torch.manual_seed(0)
    arguments = sample.constructor_input
    return getattr(namespace, kind)(*arguments.args, **arguments.kwargs)


def construct_and_call(namespace: ModuleType, kind: str, sample: Any) -> None:
    module = build(namespace, kind, sample)
    module(*sample.forward_input.args, **sample.forward_input.kwargs)


def flat(value: Any) -> list[Tensor]:
    """Returns the floating-point tensors in nested tuples and packed sequences, in order."""
    if isinstance(value, PackedSequence):
        value = value.data
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in flat(part)]


@pytest.mark.parametrize("training", [True, False])
@kinds
def test_results_and_gradients(kind: str, training: bool, table: dict[str, Any]) -> None:
    row = table[kind]
    for sample in inputs(row.module_inputs_func, row, torch.float64, training):
        forward, options = sample.forward_input, sample.constructor_input.kwargs
        outcomes = []
        for namespace in (nn, rnnfast):
            module = build(namespace, kind, sample).double().train(training)
            results = flat(module(*forward.args, **forward.kwargs))
            loss = sum((i + 1) * result.sin().sum() for i, result in enumerate(results))
            leaves = [*flat(forward.args), *module.parameters()]
            assert all(leaf.requires_grad for leaf in leaves)
            outcomes.append([*results, *torch.autograd.grad(loss, leaves)])
        actual, expected = outcomes[::-1]
        torch.testing.assert_close(actual, expected, msg=lambda m, o=options: f"{o}: {m}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@kinds
def test_errors(kind: str, dtype: torch.dtype, table: dict[str, Any]) -> None:
    row = table[kind]
    for error in inputs(row.module_error_inputs_func, row, dtype, True):
        caught = []
        for namespace in (nn, rnnfast):
            with pytest.raises(error.error_type, match=error.error_regex) as raised:
                construct_and_call(namespace, kind, error.module_error_input)
            caught.append((raised.type, str(raised.value)))
        assert caught[0] == caught[1]
