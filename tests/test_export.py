"""Exported and compiled ahead of time, with sizes left open: the numbers stay those of the module.

The reference unrolls over time, so that only the fused operators leave T open.
"""

import io
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.export import Dim

import rnnfast
from rnnfast.backend import EXTENSION

EXPECT_FUSED = EXTENSION is not None or os.environ.get("RNNFAST_EXPECT_EXTENSION") != "0"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
pytestmark = pytest.mark.skipif(not EXPECT_FUSED, reason="the extension is not expected")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")

TIME, BATCH = Dim("time"), Dim("batch")
SIZES = [(6, 3), (1, 1), (13, 5)]
"""T and B; models are exported with the first."""
LAYERS = {
    "elman_tanh": lambda: rnnfast.RNN(2, 3, bias=False),
    "elman_relu": lambda: rnnfast.RNN(2, 3, nonlinearity="relu"),
    "gru": lambda: rnnfast.GRU(2, 3, bias=False, num_layers=2),
    "lstm": lambda: rnnfast.LSTM(2, 3, bidirectional=True),
}
ONE_STEP = {
    "elman_tanh": lambda: rnnfast.RNNCell(2, 3),
    "elman_relu": lambda: rnnfast.RNNCell(2, 3, nonlinearity="relu"),
    "gru": lambda: rnnfast.GRUCell(2, 3, bias=False),
    "lstm": lambda: rnnfast.LSTMCell(2, 3),
}


def reloaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.parametrize("cell", LAYERS)
@torch.no_grad()
def test_saved_layers_with_any_time_and_batch(cell):
    torch.manual_seed(0)
    module = LAYERS[cell]()
    program = torch.export.export(
        module, (torch.randn(*SIZES[0], 2),), dynamic_shapes=({0: TIME, 1: BATCH},)
    )
    loaded = reloaded(program).module()
    for T, B in SIZES:
        x = torch.randn(T, B, 2)
        torch.testing.assert_close(loaded(x), module(x))


@pytest.mark.parametrize("cell", ONE_STEP)
@torch.no_grad()
def test_saved_single_cells_with_any_batch(cell):
    torch.manual_seed(0)
    module = ONE_STEP[cell]()
    program = torch.export.export(module, (torch.randn(4, 2),), dynamic_shapes=({0: BATCH},))
    loaded = reloaded(program).module()
    for B in (4, 1, 9):
        x = torch.randn(B, 2)
        torch.testing.assert_close(loaded(x), module(x))


class Mixture(nn.Module):
    """All that the operators may differ in: one state or two, biases or none, both directions."""

    def __init__(self):
        super().__init__()
        self.gru = rnnfast.GRU(2, 3, bias=False)
        self.lstm = rnnfast.LSTM(3, 4, bidirectional=True)

    def forward(self, x):
        y, h = self.gru(x.tanh())
        return *self.lstm(y.sin()), h


RUN_PACKAGE = """
import sys
import torch, rnnfast
runner = torch._inductor.aoti_load_package(sys.argv[1])
torch.save([runner(x) for x in torch.load(sys.argv[2])], sys.argv[3])
"""


@needs_compiler
@torch.no_grad()
def test_compiled_ahead_of_time_for_another_process(tmp_path):
    torch.manual_seed(0)
    module, inputs = Mixture(), [torch.randn(T, B, 2) for T, B in SIZES]
    program = torch.export.export(module, (inputs[0],), dynamic_shapes=({0: TIME, 1: BATCH},))
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "module.pt2")
    )
    torch.save(inputs, tmp_path / "inputs")
    files = [package, tmp_path / "inputs", tmp_path / "results"]
    subprocess.run([sys.executable, "-c", RUN_PACKAGE, *files], check=True)
    expected = [module(x) for x in inputs]
    torch.testing.assert_close(torch.load(tmp_path / "results"), expected)


@needs_compiler
def test_training_compiled_by_inductor():
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = Mixture()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for T, B in SIZES[::2]:
        x = torch.randn(T, B, 2, requires_grad=True)
        inputs = [x, *module.parameters()]
        results = [call(x)[0] for call in (compiled, module)]
        torch.testing.assert_close(*results)
        gradients = [torch.autograd.grad(result.pow(2).sum(), inputs) for result in results]
        torch.testing.assert_close(*gradients)
    torch._dynamo.reset()
