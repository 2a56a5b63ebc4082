"""Trains in several processes and writes what came of it, for test_training."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from rnnfast.cli import main
from rnnfast.models import CharLSTM
from rnnfast.models.processes import Processes, join
from rnnfast.models.trainer import Trainer
from rnnfast.models.training import Run, TrainingOptions
from rnnfast.text import CharVocabulary

TEXT = "the cat sat on the mat; " * 30
OPTIONS = TrainingOptions(
    **{"seq_length": 12, "batch_size": 6, "epochs": 2, "max_seconds": float("inf")},
    **{"learning_rate": 0.02, "clip": 0.5, "schedule": "plateau", "eval_every": 4},
)
SMALL = [
    *("--hidden", 8, "--embedding", 4, "--layers", 2, "--batch-size", 4, "--seq-length", 16),
    *("--checkpoint-every", 3, "--sample-length", 5, "--max-seconds", "inf", "--eval-every", 4),
    *("--epochs", 6),
]
INTERRUPTED_AT = 7


def train_in_float64(processes: Processes) -> tuple[list[Any], dict[str, Tensor], list[int]]:
    """Train with an odd number of validation streams.

    Returns the records, the final weights, and the numbers of DistributedDataParallel objects
    during and after the training.
    """
    torch.manual_seed(0)
    vocabulary = CharVocabulary(TEXT)
    model = CharLSTM(len(vocabulary), 8, 2, dtype=torch.float64, vocabulary=vocabulary)
    tokens = vocabulary.encode(TEXT)
    run = Run(model, tokens[:-40], OPTIONS, tokens[-40:], processes)
    gc.collect()
    gc.disable()  # a collection would hide reference cycles
    records, wrappers = [], []
    for record in run:
        records.append(record)
        if len(records) == 1:
            wrappers.append(count_wrappers())
    wrappers.append(count_wrappers())
    gc.enable()
    return records, model.state_dict(), wrappers


def count_wrappers() -> int:
    return sum(type(item) is DistributedDataParallel for item in gc.get_objects())


def wrappers_after_error() -> int:
    """The number of DistributedDataParallel objects while an error of the model is handled."""
    vocabulary = CharVocabulary(TEXT)
    model = CharLSTM(len(vocabulary), 8, vocabulary=vocabulary)
    tokens = vocabulary.encode(TEXT)

    def fail(*arguments: object) -> None:
        raise MemoryError

    gc.disable()
    try:
        with join(torch.device("cpu")) as processes:
            run = Run(model, tokens[:-40], OPTIONS, tokens[-40:], processes)
            next(iter(run))
            model.head.register_forward_hook(fail)
            list(run)
    except MemoryError:
        return count_wrappers()
    finally:
        gc.enable()
    raise AssertionError("the model did not fail")


def train(text: Path, out: Path, *more: object) -> int | str | None:
    """Returns the exit code of the command line."""
    arguments = ["train", "--text", text, "--out", out, *SMALL, *more]
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


@contextmanager
def signal_at(step: int, number: int) -> Iterator[None]:
    """Send a signal to this process during a training step."""
    original = Trainer.step
    steps = 0

    def counted(self: Trainer, inputs: Tensor, targets: Tensor) -> Any:
        nonlocal steps
        steps += 1
        if steps == step:
            os.kill(os.getpid(), number)
        return original(self, inputs, targets)

    Trainer.step = counted
    try:
        yield
    finally:
        Trainer.step = original


def stop_and_resume(text: Path, folder: Path, rank: int, *more: object) -> dict[str, Any]:
    """Exit codes of a whole training, and of one that is stopped in all processes but the first."""
    outcome: dict[str, Any] = {"whole": train(text, folder / "whole", *more)}
    with signal_at(INTERRUPTED_AT, signal.SIGTERM) if rank else nullcontext():
        outcome["stopped"] = train(text, folder / "parts", *more)
    outcome["steps"] = len((folder / "parts" / "log.csv").read_text().splitlines()) - 1
    outcome["resumed"] = train(text, folder / "parts", "--resume", *more)
    return outcome


def work(text: Path, folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, size = dist.get_rank(), dist.get_world_size()
    if size > 2:
        outcome = stop_and_resume(text, folder, rank, "--batch-size", 3 * size)
    else:
        outcome = stop_and_resume(text, folder, rank)
        with join(torch.device("cpu")) as processes:
            outcome["float64"] = train_in_float64(processes)
        outcome["wrappers after error"] = wrappers_after_error()
        outcome["uneven"] = train(text, folder / "odd", "--batch-size", 3)
        outcome["diverged"] = train(text, folder / "far", "--lr", 1e30)
    torch.save(outcome, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    work(Path(sys.argv[1]), Path(sys.argv[2]))
