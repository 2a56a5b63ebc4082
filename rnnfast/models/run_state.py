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
from rnnfast.models.schedule import OPEN_ENDED
from rnnfast.models.training import Run

FILE_NAME = "training.pt"
_FORMAT = "rnnfast.Run, version 1"
_EXTENDABLE = ("--epochs", "--max-seconds")

Settings = dict[str, str | int | float | bool | None]
"""What decides the result of a training, by the name that the user knows it by."""


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


def load(settings: Settings, path: Path) -> dict[str, Any]:
    """Read the state of a run, for `restore`. The file is data: no code from it is run.

    Settings must be the same, except that a run whose schedule does not depend on its end can be
    given more epochs or more seconds.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, holds something else, or belongs to other settings.
    """
    state = _read(path)
    differences = [
        f"{name} was {old}, is {settings.get(name)}"
        for name, old in state["settings"].items()
        if settings.get(name) != old and not _extends(settings, name, old)
    ]
    if differences:
        raise CheckpointError(
            f"{path} is of a training with other settings: {'; '.join(differences)}"
        )
    return state["run"]


def restore(run: Run, state: dict[str, Any]) -> None:
    """Let a new run go on from the state of a saved one.

    Raises:
        CheckpointError: parts of the state are missing or do not fit.
    """
    try:
        run.load_state_dict(state)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{FILE_NAME} does not hold a whole training: {reason}") from error


def _extends(settings: Settings, name: str, old: Any) -> bool:
    """Whether a changed setting only makes the same training longer."""
    new = settings.get(name)
    return (
        settings["--schedule"] in OPEN_ENDED
        and name in _EXTENDABLE
        and isinstance(new, (int, float))
        and new > old
    )


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
    if not all(isinstance(state.get(part), dict) for part in ("settings", "run")):
        raise CheckpointError(f"{path} does not hold a whole training")
    return state
