"""Tests that need a GPU: streams, graph capture, TF32. Values are in test_kernels.py."""

from __future__ import annotations

import pytest
import torch
from cases import (
    Case,
    cast,
    error,
    outputs_of,
    run_backward,
    run_forward,
    sample_grads,
    sample_inputs,
    sample_with_oracle,
)

import rnnfast
from rnnfast.reference import CELLS

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("ieee"),
]

# The unit of rounding of TF32, which keeps 10 of a float's 23 bits. If products truncate their
# operands, which is the worst that hardware does, errors of values are up to 1.5 times this unit,
# and those of gradients up to 2 times.
TF32_EPS = 2.0**-10


def prepare(cell: str, device: str = "cuda") -> tuple[Case, list, list]:
    case = Case(cell, 20, 8, 24, 40)
    inputs = cast(sample_inputs(case, torch.float32), torch.float32, device)
    return case, inputs, cast(sample_grads(case, torch.float32), torch.float32, device)


def run(case: Case, inputs: list, grads: list) -> list[torch.Tensor]:
    forward = run_forward(case, inputs, save=True)
    return [*forward, *run_backward(case, inputs, grads, forward)]


@pytest.mark.parametrize("cell", CELLS)
def test_graph_capture(cell: str) -> None:
    """Forward and backward, captured once, give the results of a plain call on new input."""
    case, inputs, grads = prepare(cell)
    run(case, inputs, grads)  # creates the cuBLAS handle, which is not allowed during capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(case, inputs, grads)
    inputs[0].copy_(torch.randn_like(inputs[0]))
    graph.replay()
    replayed = [tensor.clone() for tensor in captured]
    for actual, expected in zip(replayed, run(case, inputs, grads), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("cell", CELLS)
def test_current_stream(cell: str) -> None:
    """Work is queued on the current stream, not on the default stream."""
    case, inputs, grads = prepare(cell)
    expected = run(case, inputs, grads)
    torch.cuda.synchronize()
    late = [None if t is None else torch.full_like(t, float("nan")) for t in inputs]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for to, value in zip(late, inputs, strict=True):
            to.copy_(value)
        actual = run(case, late, grads)
    stream.synchronize()
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("cell", CELLS)
def test_tf32_follows_cudnns_setting(cell: str) -> None:
    """TF32 has its own error bound; results that differ from IEEE show that it is used."""
    case, inputs, grads = prepare(cell)
    exact = run(case, inputs, grads)
    torch.backends.cudnn.rnn.fp32_precision = "tf32"
    forward = run_forward(case, inputs, save=True)
    found = [*outputs_of(case, forward), *run_backward(case, inputs, grads, forward)]
    assert not torch.equal(forward[0], exact[0])
    expected = sample_with_oracle(case, torch.float32)[2]
    values = [*expected.outputs, *expected.grads]
    if cell == "elman_relu":  # a rounding may move a unit across relu's kink, where gradients jump
        found, values = found[:2], values[:2]
    for actual, value in zip(found, values, strict=True):
        assert error(actual, value) < 3 * TF32_EPS


def test_auto_is_torchs_kernels() -> None:
    torch.manual_seed(0)
    ours = rnnfast.LSTM(24, 40, device="cuda")
    theirs = torch.nn.LSTM(24, 40, device="cuda")
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(15, 4, 24, device="cuda")
    assert torch.equal(ours(x)[0], theirs(x)[0])


@pytest.mark.parametrize("mode", ["RNN", "GRU", "LSTM"])
def test_gradients_in_eval_mode(mode: str) -> None:
    """torch.nn's modules have no backward in eval mode on CUDA; here dropout is off."""
    torch.manual_seed(0)
    module = getattr(rnnfast, mode)(24, 40, num_layers=2, dropout=0.5, device="cuda").eval()
    x = torch.randn(15, 4, 24, device="cuda")
    found, expected = (
        torch.autograd.grad(module(x)[0].square().sum(), list(module.parameters()))
        for module.backend in (None, "reference")
    )
    for actual, value in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-3, atol=1e-4)


def test_module_trains_on_the_gpu() -> None:
    torch.manual_seed(0)
    ours = rnnfast.LSTM(24, 40, num_layers=2, bidirectional=True, device="cuda", backend="fused")
    theirs = torch.nn.LSTM(24, 40, num_layers=2, bidirectional=True, device="cuda")
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(15, 4, 24, device="cuda")
    for module in (ours, theirs):
        module(x)[0].square().sum().backward()
    for mine, torchs in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, torchs.grad, rtol=1e-3, atol=1e-4)
