"""What only a GPU can show: streams and graph capture. The values are in test_kernels.py."""

from __future__ import annotations

import pytest
import torch
from cases import Case, cast, run_backward, run_forward, sample_grads, sample_inputs

import rnnfast
from rnnfast.reference import CELLS

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def prepare(cell: str, device: str = "cuda") -> tuple[Case, list, list]:
    case = Case(cell, 20, 8, 24, 40)
    inputs = cast(sample_inputs(case, torch.float32), torch.float32, device)
    return case, inputs, cast(sample_grads(case, torch.float32), torch.float32, device)


def run(case: Case, inputs: list, grads: list) -> list[torch.Tensor]:
    forward = run_forward(case, inputs, save=True)
    return [*forward, *run_backward(case, inputs, grads, forward)]


@pytest.mark.parametrize("cell", CELLS)
def test_graph_capture(cell: str) -> None:
    """Forward and backward captured once and replayed on new input give what a plain call gives."""
    case, inputs, grads = prepare(cell)
    run(case, inputs, grads)  # creates the cuBLAS handle, which may not happen while capturing
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
    """Work queues behind what the current stream holds, not on the default stream."""
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


def test_tf32_follows_cudnns_setting() -> None:
    case, inputs, grads = prepare("lstm")
    before = torch.backends.cudnn.rnn.fp32_precision
    results = {}
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cudnn.rnn.fp32_precision = precision
            results[precision] = run(case, inputs, grads)[0]
    finally:
        torch.backends.cudnn.rnn.fp32_precision = before
    difference = (results["tf32"] - results["ieee"]).abs().max().item()
    assert 1e-7 < difference < 1e-2


def test_module_trains_on_the_gpu() -> None:
    torch.manual_seed(0)
    ours = rnnfast.LSTM(24, 40, num_layers=2, bidirectional=True, device="cuda", backend="fused")
    theirs = torch.nn.LSTM(24, 40, num_layers=2, bidirectional=True, device="cuda")
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(15, 4, 24, device="cuda")
    for module in (ours, theirs):
        module(x)[0].square().sum().backward()
    for mine, torchs in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, torchs.grad, rtol=2e-2, atol=2e-3)
