"""Modules are exported and compiled ahead of time with dynamic sizes, and give the same results.

Only the fused operators allow a dynamic T, since the reference unrolls over time.
"""

import copy
import io
import os
import shutil
import subprocess
import sys

import pytest
import torch
from test_modules import tensors
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
"""Pairs of T and B; models are exported with the first."""
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


def loss_of(module, x):
    return sum(result.sin().sum() for result in tensors(module(x)))


class TestTraining:
    """Exported programs are differentiated and trained as the modules are."""

    @pytest.mark.parametrize("grad", [True, False], ids=["exported with grad", "without"])
    @pytest.mark.parametrize("name", [*LAYERS, "projection", "mixture", "extras", "dropout"])
    def test_saved_layers(self, name, grad):
        torch.manual_seed(0)
        module = (LAYERS | MORE)[name]().train()
        with torch.set_grad_enabled(grad):
            program = torch.export.export(
                module, (torch.randn(*SIZES[0], 2),), dynamic_shapes=({0: TIME, 1: BATCH},)
            )
        self.check_training(reloaded(program).module(), module, [(T, B, 2) for T, B in SIZES])

    @pytest.mark.parametrize("cell", ONE_STEP)
    def test_saved_single_cells(self, cell):
        torch.manual_seed(0)
        module = ONE_STEP[cell]()
        program = torch.export.export(module, (torch.randn(4, 2),), dynamic_shapes=({0: BATCH},))
        self.check_training(reloaded(program).module(), module, [(4, 2), (1, 2), (9, 2)])

    def check_training(self, trained, module, shapes):
        module = copy.deepcopy(module)
        assert [*dict(trained.named_parameters())] == [*dict(module.named_parameters())]
        optimizers = [torch.optim.Adam(one.parameters(), lr=0.1) for one in (trained, module)]
        for shape in shapes:
            x = torch.randn(shape)
            for one, optimizer in zip((trained, module), optimizers, strict=True):
                optimizer.zero_grad()
                torch.manual_seed(1)  # of dropout
                loss_of(one, x).backward()
                optimizer.step()
            assert any(p.grad.count_nonzero() > 0 for p in trained.parameters())
            for theirs, ours in zip(trained.parameters(), module.parameters(), strict=True):
                torch.testing.assert_close(theirs.grad, ours.grad)
                torch.testing.assert_close(theirs, ours)
        x, gradients = torch.randn(shapes[0], requires_grad=True), []
        for one in (trained, module):
            torch.manual_seed(1)
            gradients.append(torch.autograd.grad(loss_of(one, x), x))
        torch.testing.assert_close(*gradients)

    def test_programs_save_nothing_for_inference(self):
        """The operator of a program keeps gates only in calls that autograd records."""
        program = torch.export.export(rnnfast.LSTM(2, 3), (torch.randn(6, 3, 2),))
        calls = [n for n in program.graph.nodes if n.target is torch.ops.rnnfast.lstm.default]
        assert [call.args[8] for call in calls] == [False]


class Mixture(nn.Module):
    """Layers of all kinds: one state or two, with and without biases, both directions."""

    def __init__(self):
        super().__init__()
        self.gru = rnnfast.GRU(2, 3, bias=False)
        self.lstm = rnnfast.LSTM(3, 4, bidirectional=True)

    def forward(self, x):
        y, h = self.gru(x.tanh())
        return *self.lstm(y.sin()), h


class Extras(nn.Module):
    """Lengths and resets that depend on the input."""

    def __init__(self):
        super().__init__()
        self.lstm = rnnfast.LSTM(2, 3)

    def forward(self, x):
        lengths = (x[..., 0] > -2).sum(0)
        y, state, cells = self.lstm(x, lengths=lengths, reset=x[..., 1] > 1, return_cells=True)
        return y, cells, *state


MORE = {
    "projection": lambda: rnnfast.LSTM(2, 3, proj_size=2, batch_first=True),
    "mixture": Mixture,
    "extras": Extras,
    "dropout": lambda: rnnfast.GRU(2, 3, num_layers=2, dropout=0.5),
}
TRACED = {
    "elman_tanh": lambda: rnnfast.RNN(2, 3, bias=False, recompute=True),
    "elman_relu": lambda: rnnfast.RNN(2, 3, nonlinearity="relu", num_layers=2, dropout=0.0),
    "gru": lambda: rnnfast.GRU(2, 3, batch_first=True, bidirectional=True),
    "lstm": lambda: rnnfast.LSTM(2, 3, num_layers=2, bidirectional=True),
    "projection": lambda: rnnfast.LSTM(2, 3, proj_size=2),
    **{f"{name}_cell": make for name, make in ONE_STEP.items()},
}


def saved_trace(module, *args, **kwargs):
    """Returns what torch.jit.load makes of the trace; torch checks the trace against the module."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, *args, **kwargs), file)
    file.seek(0)
    return torch.jit.load(file)


def results_and_gradients(module, *args, **kwargs):
    results = tensors(module(*args, **kwargs))
    loss = sum(result.sin().sum() for result in results)
    return [*results, *torch.autograd.grad(loss, [*module.parameters()])]


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning"
)
class TestTraces:
    @pytest.mark.parametrize("backend", [None, "reference"])
    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("name", TRACED)
    def test_saved_with_gradients(self, name, training, backend):
        torch.manual_seed(0)
        module = TRACED[name]().train(training)
        module.backend = backend
        one_step = name.endswith("_cell")
        loaded = saved_trace(module, torch.randn((*SIZES[0][1:], 2) if one_step else (6, 3, 2)))
        for T, B in SIZES:
            x = torch.randn((B, 2) if one_step else (T, B, 2))
            expected = results_and_gradients(module, x)
            torch.testing.assert_close(results_and_gradients(loaded, x), expected)
            with torch.no_grad():
                assert not any(result.requires_grad for result in tensors(loaded(x)))
        if not training:
            frozen = torch.jit.freeze(loaded)
            optimized = torch.jit.optimize_for_inference(copy.deepcopy(loaded))
            for call in (frozen, optimized):
                torch.testing.assert_close(call(x), module(x))

    def test_holds_one_operator_a_layer(self):
        graph = str(saved_trace(rnnfast.LSTM(2, 3, bidirectional=True), torch.zeros(6, 3, 2)).graph)
        assert graph.count("rnnfast::layer") == 2
        assert "PythonOp" not in graph

    @pytest.mark.parametrize("backend", [None, "reference"])
    def test_extras_are_inputs(self, backend):
        """Lengths and resets may differ from those of the trace; tokens may have an embedding."""
        torch.manual_seed(0)

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.lstm = rnnfast.LSTM(2, 3, bidirectional=True, backend=backend)
                self.tokens = rnnfast.GRU(7, 3, tokens=True, backend=backend)
                self.embedding = nn.Embedding(7, 2)
                self.embedded = rnnfast.GRU(2, 3, backend=backend)

            def forward(self, x, lengths, reset, tokens):
                y, _, cells = self.lstm(x, lengths=lengths, reset=reset, return_cells=True)
                one_hot, _ = self.tokens(tokens, lengths=lengths)
                embedded, _ = self.embedded(tokens, embedding=self.embedding)
                return y, cells, one_hot, embedded

        def arguments(T, B):
            return (
                torch.randn(T, B, 2),
                torch.randint(1, T + 1, (B,)),
                torch.rand(T, B) < 0.3,
                torch.randint(7, (T, B)),
            )

        model = Model()
        loaded = saved_trace(model, arguments(*SIZES[0]))
        for T, B in [*SIZES, (150, 2)]:
            given = arguments(T, B)
            torch.testing.assert_close(
                results_and_gradients(loaded, *given), results_and_gradients(model, *given)
            )

    def test_refuses_what_the_module_refuses(self):
        loaded = saved_trace(rnnfast.LSTM(2, 3), torch.zeros(6, 3, 2))
        with pytest.raises(RuntimeError, match="expected w_ih"):
            loaded(torch.zeros(6, 3, 4))


class TestRefusals:
    """Errors name their cause."""

    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
    @pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"])
    def test_script(self, kind):
        module = getattr(rnnfast, kind)(2, 3)
        for whole in (module, nn.Sequential(module)):
            with pytest.raises(RuntimeError, match=r"torch\.jit\.trace.*rnnfast\.restore\(model\)"):
                torch.jit.script(whole)
        model = nn.Sequential(getattr(nn, kind)(2, 3))
        rnnfast.accelerate(model)
        rnnfast.restore(model)
        torch.jit.script(model)

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("dynamo", [False, True])
    @pytest.mark.parametrize("kind", ["GRU", "LSTMCell"])
    def test_plain_onnx_export(self, kind, dynamo):
        pytest.importorskip("onnxscript")
        module = getattr(rnnfast, kind)(2, 3).eval()
        x = torch.zeros((3, 2) if kind.endswith("Cell") else (6, 3, 2))
        whole = nn.Sequential(module)
        # a program has been exported before, without warnings
        models = [torch.export.export(whole, (x,))] if dynamo else [module, whole]
        for model in models if kind == "GRU" else [module]:
            with pytest.raises(RuntimeError, match=r"rnnfast\.onnx\.export\(model") as caught:
                torch.onnx.export(model, (x,), io.BytesIO(), dynamo=dynamo)
            assert "rnnfast.restore(model)" in str(caught.value)
        with rnnfast.use_backend("aten"):
            torch.onnx.export(whole, (x,), io.BytesIO(), dynamo=dynamo)


RUN_PACKAGE = """
import sys
import torch, rnnfast
runner = torch._inductor.aoti_load_package(sys.argv[1])
torch.save([runner(x) for x in torch.load(sys.argv[2])], sys.argv[3])
"""


@pytest.mark.full
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
