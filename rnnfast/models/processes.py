"""Several processes that train one model together, started by torchrun."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Processes(NamedTuple):
    """This process among its equals; by default it is alone.

    Every method that talks to the others must be called by all of them.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """The rows of a batch (B, ...) that are this process'; B may be less than `size`."""
        return batch.tensor_split(self.size)[self.rank]

    def average_gradients(self, model: nn.Module) -> None:
        """Replace the gradients of a model by their means over the processes.

        This is DistributedDataParallel with one bucket. That class would keep the process group
        alive for as long as a trainer, and the gloo of torch 2.13 can hang when it is freed that
        way.
        """
        if self.size == 1:
            return
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        means = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(means)
        means /= self.size
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, mean in zip(gradients, means.split(sizes), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def sum(self, *values: float) -> list[float]:
        """The sums of numbers over the processes, the same in all of them."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def highest(self, *values: float) -> list[float]:
        """The highest of numbers over the processes."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def gather(self, item: object) -> list[Any]:
        """The items of all processes, in the order of their ranks."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def _reduce(self, values: tuple[float, ...], operation: Any) -> list[float]:
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, operation)
        return tensor.tolist()


def is_first_process() -> bool:
    """Whether this is the process that speaks for all, before or after they join."""
    return not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"


@contextmanager
def join(device: torch.device) -> Iterator[Processes]:
    """Be one of the processes that torchrun started, or alone if it did not.

    Args:
        device: what to run on; of CUDA devices each process takes the one of its local rank.

    Raises:
        ValueError: there are fewer CUDA devices than processes.
    """
    if not dist.is_torchelastic_launched():
        yield Processes(device=device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise ValueError(
                f"process {device.index} has no CUDA device of its own: there are "
                f"{torch.cuda.device_count()}; start no more processes than that"
            )
        torch.cuda.set_device(device)
    started_here = not dist.is_initialized()
    if started_here:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device)
    finally:
        if started_here:
            dist.destroy_process_group()
