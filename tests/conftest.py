"""Fixtures: targets to run on (see targets.py), memory, threads and compiled cells."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from targets import TARGETS, running_on

from rnnfast import backend

# Compiled cells of users are kept in build/, where all processes and later runs find them.
os.environ.setdefault(
    "RNNFAST_CELL_CACHE", str(Path(__file__).resolve().parent.parent / "build/tests/cells")
)


@pytest.fixture(autouse=True)
def state_of_torch() -> Iterator[None]:
    """Starts each test from the same random numbers, and puts back what a failed export changed."""
    torch.manual_seed(0)
    yield
    torch.set_autocast_cache_enabled(True)  # off after an error in torch.onnx.export(dynamo=False)


@pytest.fixture
def ieee() -> Iterator[None]:
    """Computes float32 products on CUDA in float32; torch's default for layers is TF32."""
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.rnn.fp32_precision = before


@pytest.fixture(
    params=[
        pytest.param(name, marks=[pytest.mark.cuda] if name == "cuda" else []) for name in TARGETS
    ]
)
def device(request: pytest.FixtureRequest, ieee: None) -> Iterator[str]:
    """Selects a target's CPU kernels; gives the device for its tensors."""
    with running_on(request.param) as device:
        yield device


@pytest.fixture
def avx512() -> Iterator[None]:
    """Selects AVX-512 kernels, for tests of decisions that depend on the width of vectors."""
    extension = backend.EXTENSION
    if extension is None:
        if os.environ.get("RNNFAST_EXPECT_EXTENSION") == "0":
            pytest.skip("a build without the extension has no plans")
        pytest.fail(f"rnnfast._C did not build or load: {backend.IMPORT_ERROR}")
    if "avx512" not in extension.cpu_capabilities():
        pytest.skip("this machine has no AVX-512")
    before = extension.get_cpu_capability()
    extension.set_cpu_capability("avx512")
    yield
    extension.set_cpu_capability(before)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fills uninitialised memory from torch with NaN, including workspaces and results."""
    torch.use_deterministic_algorithms(True)  # this fills new memory, by torch's defaults
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads, and lets kernels use more threads than there are cores."""
    before = torch.get_num_threads()
    if backend.EXTENSION is not None:
        backend.EXTENSION.assume_cores(64)
    yield
    torch.set_num_threads(before)
    if backend.EXTENSION is not None:
        backend.EXTENSION.assume_cores(0)
