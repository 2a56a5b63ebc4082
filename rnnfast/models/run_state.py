"""The state of an interrupted training, in one file of torch.save."""

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
"""What decides the result of a training, by the name that the user knows it by."""

CHANGEABLE = (
    *("--text", "--epochs", "--max-seconds", "--eval-every", "--patience"),
    *("--device", "--backend"),
)
"""Settings that may be others when a training goes on."""


def save(run: Run, settings: Settings, path: Path) -> None:
    """Write the state of a run, which is on the disk when this returns.

    Of several processes all must call this, and the first writes; all must see the same files.

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

    The file is data: no code from it is run.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, or holds something else.
    """
    state = _read(path)
    return state["settings"], state["run"]


def merge(saved: Settings, given: Settings, path: Path) -> Settings:
    """The settings that a run goes on with: the saved ones, and those given that may change.

    Args:
        saved: the settings of the run so far.
        given: some of them, as they are asked for now.
        path: where the saved ones come from.

    Raises:
        CheckpointError: a setting that must not change is another one.
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
    """Let a new run go on from the state of a saved one.

    Raises:
        CheckpointError: parts of the state are missing or do not fit.
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
    """The content of the file, once it is known to be intact and a training's."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: there is no training to resume")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
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
