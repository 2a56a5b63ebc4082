"""Trains in two processes and writes the results, for test_training."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

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


def train_in_float64(processes: Processes) -> tuple[list[Any], dict[str, Tensor]]:
    """Returns records and final weights of a run with an odd number of validation streams."""
    torch.manual_seed(0)
    vocabulary = CharVocabulary(TEXT)
    model = CharLSTM(len(vocabulary), 8, 2, dtype=torch.float64, vocabulary=vocabulary)
    tokens = vocabulary.encode(TEXT)
    run = Run(model, tokens[:-40], OPTIONS, tokens[-40:], processes)
    return list(run), model.state_dict()


def train(text: Path, out: Path, *more: object) -> int | str | None:
    """Returns the exit code of the command line."""
    arguments = ["train", "--text", text, "--out", out, *SMALL, *more]
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


@contextmanager
def signal_at(step: int, number: int) -> Iterator[None]:
    """Sends this process a signal during a training step."""
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


def work(text: Path, folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    with join(torch.device("cpu")) as processes:
        outcome = {"float64": train_in_float64(processes)}
    outcome["whole"] = train(text, folder / "whole")
    if processes.is_first:
        outcome["stopped"] = train(text, folder / "parts")
    else:
        with signal_at(INTERRUPTED_AT, signal.SIGTERM):
            outcome["stopped"] = train(text, folder / "parts")
    outcome["steps"] = len((folder / "parts" / "log.csv").read_text().splitlines()) - 1
    outcome["resumed"] = train(text, folder / "parts", "--resume")
    outcome["uneven"] = train(text, folder / "odd", "--batch-size", 3)
    outcome["diverged"] = train(text, folder / "far", "--lr", 1e30)
    torch.save(outcome, folder / f"{processes.rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    work(Path(sys.argv[1]), Path(sys.argv[2]))
