"""Data-parallel training in the processes that torchrun started."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Processes(NamedTuple):
    """One of several processes that train the same model; by default there is only one.

    All processes must call `data_parallel`, `sum`, `highest`, `gather` and `wait` together.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """This process' rows of a batch (B, ...); there may be none if B is less than `size`."""
        return batch.tensor_split(self.size)[self.rank]

    def data_parallel(self, model: nn.Module) -> nn.Module:
        """Wrap a model in DistributedDataParallel if there are several processes.

        A backward pass through the result averages the gradients over the processes. The wrapper
        keeps the process group alive, so it must be freed before `join` ends.
        """
        return model if self.size == 1 else DistributedDataParallel(model)

    def sum(self, *values: float) -> list[float]:
        """Sum each value over the processes; all processes get the same result."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def highest(self, *values: float) -> list[float]:
        """The maximum of each value over the processes."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def gather(self, item: object) -> list[Any]:
        """The items of all processes, in the order of their ranks."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.size > 1:
            dist.barrier()

    def _reduce(self, values: tuple[float, ...], operation: Any) -> list[float]:
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, operation)
        return tensor.tolist()


def is_first_process() -> bool:
    """Whether this process has rank 0; this works outside of `join`, too."""
    return not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"


@contextmanager
def join(device: torch.device) -> Iterator[Processes]:
    """Join the process group of torchrun; without torchrun, yield a single process.

    The process group is destroyed at the end if it was created here.

    Args:
        device: the device to run on. If it is "cuda", each process takes the CUDA device of its
            local rank.

    Yields:
        This process.

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
    except BaseException as error:
        # The traceback of an error in the wrapper's forward would keep the wrapper alive.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        if started_here:
            # A wrapper that is freed later frees the group's threads with it, which deadlocks: the
            # destructor waits for them with the GIL held, and they wait for the GIL. The first
            # wrapper of a process is part of a reference cycle, so it needs a collection.
            gc.collect()
            dist.destroy_process_group()
