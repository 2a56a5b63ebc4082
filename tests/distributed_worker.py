"""Trains in two processes in several ways and writes the results, for test_distributed."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from datetime import timedelta
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import rnnfast
from rnnfast import backend

STEPS, TIME, BATCH = 4, 6, 4
OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.05),
}
PATHS = ["aten", "reference"]
if backend.EXTENSION is not None:
    PATHS += ["short path", "operators"]


class Model(nn.Module):
    """A model whose weights two processes shard evenly (20 rows, LSTM) or not (15 rows, GRU)."""

    def __init__(self, namespace: ModuleType, **options: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        factory: dict[str, Any] = {"dtype": torch.float64, **options}
        self.lstm = namespace.LSTM(3, 5, num_layers=2, bidirectional=True, **factory)
        self.gru = namespace.GRU(10, 5, **factory)
        self.linear = nn.Linear(5, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.gru(self.lstm(x)[0])[0])


def shard_layers(model: Model) -> nn.Module:
    for layer in (model.lstm, model.gru):
        fully_shard(layer)
    return fully_shard(model)


STRATEGIES: dict[str, Callable[[Model], nn.Module]] = {
    "DDP": DistributedDataParallel,
    "FSDP2 of the root": fully_shard,
    "FSDP2 of the layers": shard_layers,
}


def train(model: nn.Module, optimiser: str, samples: slice) -> dict[str, Tensor]:
    """Returns the parameters after some steps on these samples of every batch."""
    update = OPTIMISERS[optimiser](model.parameters())
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(TIME, BATCH, 3, dtype=torch.float64, generator=generator)[:, samples]
        update.zero_grad()
        nn.functional.mse_loss(model(x), x[..., :2].cumsum(0).tanh()).backward()
        update.step()
    return {
        name.removeprefix("module."): value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in model.named_parameters()
    }


def main(file: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, size = dist.get_rank(), BATCH // dist.get_world_size()
    samples = slice(rank * size, (rank + 1) * size)
    taken: list[bool] = []

    def run_layers(*arguments: Any) -> Any:
        result = backend.EXTENSION.run_layers(*arguments)
        taken.append(result is not None)
        return result

    outcomes = {}
    for path in PATHS:
        extension = SimpleNamespace(run_layers=run_layers) if path == "short path" else None
        backend.short_path = lambda requested, extension=extension: extension
        name = path if path in backend.NAMES else "fused"
        for strategy, wrap in STRATEGIES.items():
            for optimiser in OPTIMISERS:
                taken.clear()
                parameters = train(wrap(Model(rnnfast, backend=name)), optimiser, samples)
                outcomes[path, strategy, optimiser] = parameters, list(taken)
    if rank == 0:
        torch.save(outcomes, file)
    # A model in a reference cycle keeps the process group alive. If the group's threads outlive the
    # interpreter, they end the process with SIGABRT (1 of 25 runs).
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
