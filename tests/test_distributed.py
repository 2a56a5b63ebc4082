"""Two processes that train on halves of each batch get the parameters of one torch.nn process.

FSDP2 gathers sharded weights, so while a layer runs they are whole, plain tensors.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from distributed_worker import OPTIMISERS, PATHS, STEPS, STRATEGIES, Model, train
from torch import Tensor, nn

import rnnfast

WORKER = Path(__file__).with_name("distributed_worker.py")
Outcomes = dict[tuple[str, str, str], tuple[dict[str, Tensor], list[bool]]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What the worker wrote: parameters, and what happened to each try of the short path."""
    file = tmp_path_factory.mktemp("distributed") / "outcomes.pt"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", WORKER, file],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return torch.load(file)


@cache
def in_one_process(optimiser: str) -> dict[str, Tensor]:
    return train(Model(nn), optimiser, slice(None))


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("path", PATHS)
def test_two_processes_train_as_one(
    path: str, strategy: str, optimiser: str, outcomes: Outcomes
) -> None:
    parameters, taken = outcomes[path, strategy, optimiser]
    torch.testing.assert_close(parameters, in_one_process(optimiser), rtol=0, atol=1e-12)
    assert taken == [True] * (2 * STEPS if path == "short path" else 0)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_data_parallel_on_the_cpu(optimiser: str) -> None:
    parameters = train(nn.DataParallel(Model(rnnfast)), optimiser, slice(None))
    torch.testing.assert_close(parameters, in_one_process(optimiser), rtol=0, atol=1e-12)
