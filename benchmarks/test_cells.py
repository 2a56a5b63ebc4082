"""Times single steps of the cell modules of rnnfast and torch.nn (`pytest benchmarks`)."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

import rnnfast

BATCH_AND_HIDDEN = [(1, 64), (1, 512), (32, 256)]


@pytest.mark.parametrize("library", [rnnfast, nn], ids=["rnnfast", "torch"])
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize(("B", "H"), BATCH_AND_HIDDEN)
@pytest.mark.parametrize("cell", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cell(
    benchmark: BenchmarkFixture, cell: str, B: int, H: int, mode: str, library: object
) -> None:
    benchmark.group = f"{cell} {B},{H},{H} {mode}"
    torch.manual_seed(0)
    forced = {"backend": "fused"} if library is rnnfast else {}
    step = getattr(library, cell)(H, H, **forced)
    x, h, grad_h = torch.randn(3, B, H)
    state = (h, torch.randn(B, H)) if cell == "LSTMCell" else h

    def forward() -> torch.Tensor:
        new_state = step(x, state)
        return new_state[0] if cell == "LSTMCell" else new_state

    def forward_backward() -> None:
        step.zero_grad(set_to_none=True)
        forward().backward(grad_h)

    with torch.inference_mode(mode == "forward"):
        benchmark(forward if mode == "forward" else forward_backward)
