"""Saves the state of a training to one file, and restores it."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from rnnfast.models.atomic import write_atomically
from rnnfast.models.checkpoint import CheckpointError
from rnnfast.models.training import Run

FILE_NAME = "training.pt"
_FORMAT = "rnnfast.Run, version 2"

Setting = str | int | float | bool | None
Settings = dict[str, Setting]
"""The settings that the result of a training depends on, by the names that the user knows."""

CHANGEABLE = (
    *("--text", "--epochs", "--max-seconds", "--eval-every", "--patience"),
    *("--device", "--backend"),
)
"""The settings that may change when a training is resumed."""


def save(run: Run, settings: Settings, path: Path) -> None:
    """Write the state of a run to a file, which is on the disk when this returns.

    All processes must call this together. The first one writes the file, and all must see the same
    file system.

    Raises:
        OSError: the file cannot be written.
    """
    state = {"format": _FORMAT, "settings": settings, "run": run.state_dict()}
    if run.processes.is_first:
        content = io.BytesIO()
        torch.save(state, content)
        write_atomically(path, content.getvalue())
    run.processes.wait()


def load(path: Path) -> tuple[Settings, dict[str, Any]]:
    """Read the settings of a run, and its state for `restore`.

    Loading runs no code from the file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, or is not the state of a training.
    """
    state = _read(path)
    return state["settings"], state["run"]


def merge(saved: Settings, given: Settings, path: Path) -> Settings:
    """Combine the saved settings of a run with those that the user gives when resuming it.

    Args:
        saved: all settings of the run so far.
        given: the settings that the user gives now.
        path: the file of the saved settings, for error messages.

    Raises:
        CheckpointError: a given setting differs from the saved one and is not in `CHANGEABLE`.
    """
    differences = [
        f"{name} was {saved.get(name)}, is {value}"
        for name, value in given.items()
        if name not in CHANGEABLE and saved.get(name) != value
    ]
    if differences:
        raise CheckpointError(
            f"{path} is of a training with other settings: {'; '.join(differences)}. Leave out "
            f"what differs to go on with it, or begin anew with --overwrite"
        )
    return {**saved, **given}


def restore(run: Run, state: dict[str, Any]) -> None:
    """Restore the saved state into a new run.

    Raises:
        CheckpointError: parts of the state are missing or do not fit the run.
    """
    try:
        run.load_state_dict(state)
    except (
        *(ArithmeticError, AttributeError, LookupError),
        *(RuntimeError, TypeError, ValueError),
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise CheckpointError(f"{FILE_NAME} does not hold a whole training: {reason}") from error


def _read(path: Path) -> dict[str, Any]:
    """The content of the file, checked to be intact and the state of a training."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: there is no training to resume")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not check the checksums
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{path} is damaged: the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} is not an intact training state: {reason}") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is not a training state ({_FORMAT})")
    settings, run = state.get("settings"), state.get("run")
    if not (isinstance(settings, dict) and isinstance(run, dict) and type(run.get("steps")) is int):
        raise CheckpointError(f"{path} does not hold a whole training")
    return state
