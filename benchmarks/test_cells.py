"""Times single steps of the cell modules of rnnfast and torch.nn (`pytest benchmarks`)."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .peers import Builder, build_rnnfast, build_torch
from .steps import SINGLE_STEPS, Case, make_problem

SIZES = [Case(1, 1, 64, 64), Case(1, 1, 512, 512), Case(1, 32, 256, 256)]


@pytest.mark.parametrize("build", [build_rnnfast, build_torch], ids=["rnnfast", "torch"])
@pytest.mark.parametrize("mode", ["inference", "training"], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("case", SIZES, ids=str)
@pytest.mark.parametrize("cell", SINGLE_STEPS)
def test_cell(
    benchmark: BenchmarkFixture, cell: str, case: Case, mode: str, build: Builder
) -> None:
    benchmark.group = f"{cell} {case} {mode}"
    problem = make_problem(cell, case, "cpu", torch.float32, mode)
    with torch.inference_mode(mode == "inference"):
        benchmark(build(problem).run)
