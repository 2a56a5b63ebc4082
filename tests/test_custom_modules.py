"""Layer and LayerCell as modules: what is saved and copied, other processes, and refusals."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import custom_worker
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from custom_layers import CELLS, Written, as_tuple, inputs_of, loop
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

import rnnfast
import rnnfast.explain
from rnnfast.generation import Sampling, continue_tokens

DOUBLE = torch.float64
X = torch.linspace(-1, 1, 24, dtype=DOUBLE).view(4, 3, 2)
cells = pytest.mark.parametrize("name", ["slstm", "peephole", "ligru"])


def layer_of(name: str, **options: Any) -> rnnfast.Layer:
    return CELLS[name].layer(2, 5, dtype=DOUBLE, **options)


def step_of(name: str, **options: Any) -> rnnfast.LayerCell:
    return CELLS[name].step(2, 5, dtype=DOUBLE, **options)


def same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@cells
def test_copies_compute_the_same(name: str) -> None:
    for module, x in ((layer_of(name, num_layers=2), X), (step_of(name), X[0])):
        expected, file = module(x), io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        for one in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
            assert one.cell == module.cell
            same(one(x), expected)
        other = type(module)(
            module.cell, 2, 5, dtype=DOUBLE, **({"num_layers": 2} if x is X else {})
        )
        other.load_state_dict(module.state_dict())
        same(other(x), expected)


def test_names_of_weights() -> None:
    layer = layer_of("slstm", bidirectional=True, bias=False)
    names = ["weight_ih_l0", "weight_hh_l0", "p_l0"]
    assert list(layer.state_dict()) == [*names, *(f"{name}_reverse" for name in names)]
    assert list(step_of("slstm").state_dict()) == [
        "weight_ih",
        "weight_hh",
        "bias_ih",
        "bias_hh",
        "p",
    ]
    assert layer.weight_ih_l0.shape == (20, 2)
    assert layer.p_l0.shape == (5,)


def test_initial_values() -> None:
    def step(x, h, state, parameters):
        return torch.tanh(x[0] + h[0] + parameters.given * parameters.drawn)

    cell = rnnfast.cell(gates=1, parameters={"given": 2, "drawn": None})(step)
    for module in (rnnfast.Layer(cell, 2, 25, num_layers=2), rnnfast.LayerCell(cell, 2, 25)):
        for _ in range(2):
            for key, weight in module.named_parameters():
                values = weight.detach()
                if "given" in key:
                    assert (values == 2).all()
                else:
                    assert 0.1 < values.abs().max() <= 0.2
                    assert values.unique().numel() == values.numel()
                with torch.no_grad():
                    weight.fill_(7)
            module.reset_parameters()


def test_repr() -> None:
    assert repr(layer_of("slstm", num_layers=2)) == (
        "Layer(scaled_slstm, 2, 5, num_layers=2, backend='fused')"
    )
    assert repr(step_of("slstm")) == "LayerCell(scaled_slstm, 2, 5, backend='fused')"
    assert repr(CELLS["slstm"].cell) == (
        "<rnnfast.cell scaled_slstm: gates=4, state=('h', 'c', 'n', 'm'), parameters=('p',)>"
    )


@cells
@pytest.mark.parametrize("backend", ["fused", "reference", "auto"])
def test_single_steps_are_layers_of_one_step(name: str, backend: str) -> None:
    step = step_of(name, backend=backend)
    layer = layer_of(name)
    layer.load_state_dict({f"{key}_l0": value for key, value in step.state_dict().items()})
    x, hx = inputs_of(CELLS[name], 1, 3, 2, 5)
    states = tuple(state[0] for state in as_tuple(hx))

    def form(states: tuple[Tensor, ...]) -> Any:
        return states if len(states) > 1 else states[0]

    expected = tuple(state[0] for state in as_tuple(layer(x, hx)[1]))
    torch.testing.assert_close(as_tuple(step(x[0], form(states))), expected)
    one = form(tuple(state[1] for state in states))
    found = as_tuple(step(x[0, 1], one))
    torch.testing.assert_close(found, tuple(state[1] for state in expected))
    zeros = tuple(state[0] for state in as_tuple(layer(x)[1]))
    torch.testing.assert_close(as_tuple(step(x[0])), zeros)


@cells
def test_the_reference_computes_the_same(name: str) -> None:
    layer = layer_of(name, num_layers=2, bidirectional=True)
    plain = layer_of(name, num_layers=2, bidirectional=True, backend="reference")
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(plain(X), layer(X))
    torch.testing.assert_close(plain.to("meta")(X.to("meta"))[0].shape, layer(X)[0].shape)


def test_conversions() -> None:
    layer = rnnfast.Layer(CELLS["slstm"].cell, 2, 5)
    assert layer.double()(X)[0].dtype is DOUBLE
    on_meta = layer.to("meta")
    assert on_meta(X.to("meta"))[0].shape == (4, 3, 5)
    on_meta.to_empty(device="cpu").reset_parameters()
    assert on_meta(X)[0].isfinite().all()


def test_functional_call_and_parametrizations() -> None:
    layer = layer_of("slstm")
    changed = {name: weight + 0.5 for name, weight in layer.named_parameters()}
    other = copy.deepcopy(layer)
    other.load_state_dict(changed)
    same(functional_call(layer, changed, (X,)), other(X))
    expected = layer(X)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    parametrizations.weight_norm(layer, "p_l0", dim=None)
    torch.testing.assert_close(layer(X), expected)
    layer(X)[0].sum().backward()
    assert all(weight.grad is not None for weight in layer.parameters())


def test_cells_that_are_defined_again() -> None:
    def define(factor: float) -> rnnfast.Layer:
        def again(x, h, state):
            return factor * state.h + torch.tanh(x[0] + h[0])

        return Written(again, 1).layer(2, 5, dtype=DOUBLE)

    first, second, other = define(0.5), define(0.5), define(0.25)
    assert first.cell == second.cell != other.cell
    for layer, factor in ((first, 0.5), (second, 0.5), (other, 0.25)):
        h = torch.zeros(3, 5, dtype=DOUBLE)
        for x in X:
            of_x = F.linear(x, layer.weight_ih_l0, layer.bias_ih_l0)
            h = factor * h + torch.tanh(of_x + F.linear(h, layer.weight_hh_l0, layer.bias_hh_l0))
        torch.testing.assert_close(layer(X)[0][-1], h)


def test_cells_of_the_same_steps_have_names_of_their_own() -> None:
    def one(x, h, state):
        return torch.tanh(x[0] + h[0])

    def two(x, h, state):
        return torch.tanh(x[0] + h[0])

    layers = [Written(step, 1).layer(2, 5, dtype=DOUBLE) for step in (one, two)]
    assert layers[0].cell != layers[1].cell
    layers[1].load_state_dict(layers[0].state_dict())
    same(layers[0](X), layers[1](X))


def test_other_processes_need_no_function(tmp_path: Path) -> None:
    file, saved = tmp_path / "modules.pt", []
    for name in ("slstm", "peephole"):
        for module, x in ((layer_of(name, backend=None), X), (step_of(name, backend=None), X[0])):
            saved.append((module, x, module(x)))
    torch.save(saved, file)
    worker = Path(custom_worker.__file__)
    done = subprocess.run([sys.executable, worker, file], capture_output=True, text=True)
    assert done.stdout == "kernels\n", done.stderr


def test_without_the_extension() -> None:
    script = """
import sys
sys.modules["rnnfast._C"] = None
sys.path.insert(0, "tests")
import torch
from custom_layers import CELLS, as_tuple, double, found, inputs_of, loop
import rnnfast
for name in ("slstm", "peephole"):
    layer = CELLS[name].layer(2, 5, dtype=torch.float64, backend=None, num_layers=2)
    x, hx = inputs_of(CELLS[name], 4, 3, 2, 5, rows=2)
    torch.testing.assert_close(layer(x, hx), loop(CELLS[name], layer, x, hx))
    CELLS[name].step(2, 5, dtype=torch.float64, backend=None)(x[0])
try:
    CELLS["slstm"].layer(2, 5, dtype=torch.float64)(x)
except RuntimeError as error:
    assert "backend 'fused' cannot run" in str(error), error
else:
    raise AssertionError
print("good")
"""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root)
    assert done.stdout == "good\n", done.stderr


def test_spawned_processes() -> None:
    context = torch.multiprocessing.get_context("spawn")
    layer, results = layer_of("slstm"), context.SimpleQueue()
    process = context.Process(target=custom_worker.run, args=(layer, X, results))
    process.start()
    same(torch.from_numpy(results.get()), layer(X)[0].detach())
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("kind", ["DDP", "DataParallel"])
def test_parallel_training(kind: str, tmp_path: Path) -> None:
    layer = layer_of("slstm")
    expected = torch.autograd.grad(layer(X)[0].sum(), list(layer.parameters()))
    if kind == "DataParallel":
        nn.DataParallel(layer)(X)[0].sum().backward()
    else:
        dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            DistributedDataParallel(layer)(X)[0].sum().backward()
        finally:
            dist.destroy_process_group()
    same([weight.grad for weight in layer.parameters()], list(expected))


def test_generation() -> None:
    written = CELLS["slstm"]
    layer = written.layer(7, 5, dtype=DOUBLE, tokens=True)
    head = nn.Linear(5, 7, dtype=DOUBLE)
    prompt = torch.tensor([1, 2, 3])
    with torch.no_grad():
        greedy = Sampling.of(greedy=True)
        (tokens,) = continue_tokens(layer, head, None, [prompt], greedy, None, [6])
        for token in tokens[0]:
            x = F.one_hot(prompt.unsqueeze(1), 7).double()
            output, _ = loop(written, layer, x, [torch.zeros(1, 1, 5, dtype=DOUBLE)] * 4)
            assert token == head(output[-1]).argmax()
            prompt = torch.cat([prompt, token.view(1)])


def test_models_keep_layers_when_they_are_accelerated() -> None:
    model = nn.Sequential(layer_of("slstm"))
    expected = model(X)
    assert "rnnfast's already" in str(rnnfast.accelerate(model))
    assert type(model[0]) is rnnfast.Layer
    rnnfast.restore(model)
    same(model(X), expected)
