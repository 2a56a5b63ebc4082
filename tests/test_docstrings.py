"""The docstrings of the public interface: their examples run, and they are complete."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import rnnfast
from rnnfast import functional

LAYERS = [rnnfast.RNN, rnnfast.LSTM, rnnfast.GRU]
CELLS = [rnnfast.RNNCell, rnnfast.LSTMCell, rnnfast.GRUCell]
FUNCTIONS = [
    getattr(functional, f"{name}{suffix}")
    for name in ("rnn", "lstm", "gru")
    for suffix in ("", "_cell")
]
TOOLS = [
    rnnfast.accelerate,
    rnnfast.restore,
    rnnfast.patch,
    rnnfast.unpatch,
    rnnfast.use_backend,
    rnnfast.doctor,
    rnnfast.release_memory,
    rnnfast.freeze,
    rnnfast.quantize_error,
    rnnfast.Stream,
    rnnfast.StreamBatch,
    rnnfast.cell,
    rnnfast.Layer,
    rnnfast.LayerCell,
]
PUBLIC = [*LAYERS, *CELLS, *FUNCTIONS, *TOOLS, rnnfast.onnx.export]


def test_none_is_forgotten() -> None:
    found = {getattr(rnnfast, name) for name in rnnfast.__all__}
    found = {each for each in found if not inspect.ismodule(each)}
    found |= {
        each
        for name, each in vars(functional).items()
        if inspect.isfunction(each) and each.__module__ == functional.__name__
        if not name.startswith("_") and name != "elman"
    }
    assert found | {rnnfast.onnx.export} == set(PUBLIC)


@pytest.mark.parametrize("each", PUBLIC, ids=lambda each: each.__qualname__)
def test_examples_run(each: Callable[..., Any], tmp_path: Any, monkeypatch: Any) -> None:
    if each is rnnfast.onnx.export:
        pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"rnnfast": rnnfast, "torch": torch}
    (test,) = doctest.DocTestFinder(recurse=False).find(each, each.__qualname__, globs=names)
    assert test.examples
    report: list[str] = []
    result = doctest.DocTestRunner().run(test, out=report.append)
    assert not result.failed, "".join(report)


@pytest.mark.parametrize("each", LAYERS + CELLS, ids=lambda each: each.__qualname__)
def test_modules_explain_every_argument_and_parameter(each: type[Any]) -> None:
    words = inspect.getdoc(each) or ""
    sections = ["Args", "Inputs", "Outputs", "Weights", "Raises", "Example"]
    starts = [words.index(f"\n{section}:\n") for section in sections]
    assert starts == sorted(starts)
    arguments = words[starts[0] : starts[1]]
    for name in inspect.signature(each).parameters:
        assert f"\n    {name}: " in arguments or name == "kwargs", name
    inputs = words[starts[1] : starts[2]]
    for name in inspect.signature(each.forward).parameters:
        expected = name != "self" and not (name == "return_cells" and each is not rnnfast.LSTM)
        assert (f"\n    {name}: " in inputs) is expected, name
    sizes = {"num_layers": 2, "proj_size": 3} if each is rnnfast.LSTM else {}
    for name, _ in each(5, 4, **sizes).named_parameters():
        assert name.replace("l0", "l[k]").replace("l1", "l[k]") in words, name
