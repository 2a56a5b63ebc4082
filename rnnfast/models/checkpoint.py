"""A CharLSTM in one safetensors file: weights, sizes and vocabulary (needs `rnnfast[cli]`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rnnfast.models.char_lstm import CharLSTM
from rnnfast.text import CharVocabulary

FILE_NAME = "model.safetensors"
_KEY = "rnnfast.CharLSTM"


class CheckpointError(ValueError):
    """A file that is not a CharLSTM, or only a part of one."""


def save(model: CharLSTM, path: str | Path) -> None:
    """Write a model to a safetensors file, its sizes and vocabulary in the file's metadata.

    Raises:
        OSError: the file cannot be written.
    """
    characters = model.vocabulary.characters if model.vocabulary else None
    description = {"config": model.config._asdict(), "characters": characters}
    try:
        save_file(model.state_dict(), path, {_KEY: json.dumps(description)})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def load(path: str | Path, device: torch.device | str | None = None, **options: Any) -> CharLSTM:
    """Read a model that `save` wrote, in the dtype it was written in.

    Args:
        path: the file, or the folder in which it is named `model.safetensors`.
        device: where the model goes; the CPU if None.
        options: other keywords of `CharLSTM`: `backend`, `lstm`.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, or holds something else.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; rnnfast train writes such a file")
    tensors, metadata = _read(path)
    if _KEY not in metadata:
        raise CheckpointError(f"{path} was not written by rnnfast: it does not name {_KEY}")
    try:
        description = json.loads(metadata[_KEY])
        characters = description["characters"]
        model = CharLSTM(
            **description["config"],
            vocabulary=None if characters is None else CharVocabulary(characters),
            device="meta",  # the weights come from the file: neither allocate nor draw them
            **options,
        )
        model.load_state_dict(tensors, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{path} does not hold a whole CharLSTM: {reason}") from error
    return model.to(device)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            # Copies, for the tensors as read lie unaligned in a mapping of the file itself.
            names = file.keys()
            tensors = {name: file.get_tensor(name).clone() for name in names}
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not an intact safetensors file: {error}") from error
