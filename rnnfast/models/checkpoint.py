"""Saves and loads a CharLSTM as one safetensors file (needs the extra cli).

The file holds the weights, the sizes and the vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from rnnfast.models.atomic import write_atomically
from rnnfast.models.char_lstm import CharLSTM, CharLSTMConfig
from rnnfast.text import Vocabulary

FILE_NAME = "model.safetensors"
_KEY = "rnnfast.CharLSTM"
_LARGEST = 2**31  # limit for every number in a config


class CheckpointError(ValueError):
    """The file is damaged, or does not hold the expected model."""


def save(model: CharLSTM, path: str | Path) -> None:
    """Write a model to a safetensors file, with its sizes and vocabulary in the file's metadata.

    Tied weights are written once. An existing file is replaced only when the new one is complete.

    Raises:
        OSError: the file cannot be written.
    """
    vocabulary = model.vocabulary.state() if model.vocabulary else None
    description = {"config": model.config._asdict(), "vocabulary": vocabulary}
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    write_atomically(Path(path), serialise(weights, {_KEY: json.dumps(description)}))


def load(path: str | Path, device: torch.device | str | None = None, **options: Any) -> CharLSTM:
    """Read a model that `save` wrote. The weights keep the dtype of the file.

    Args:
        path: the file, or a folder with a file named `model.safetensors`.
        device: the device of the model; the CPU if None.
        options: further keyword arguments of `CharLSTM`: `backend`, `lstm`.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, or does not hold a CharLSTM.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.absolute()} does not exist; expected a file {FILE_NAME} of rnnfast train, or "
            f"the folder that has it"
        )
    tensors, metadata = read(path)
    if _KEY not in metadata:
        raise CheckpointError(f"{path} holds no model of rnnfast train: it does not name {_KEY}")
    try:
        description = parse(metadata[_KEY], CharLSTMConfig)
        check_tensors(tensors, description["config"])
        vocabulary = description["vocabulary"]
        model = CharLSTM(
            **description["config"],
            vocabulary=None if vocabulary is None else Vocabulary.from_state(vocabulary),
            device="meta",  # the weights come from the file, so they are not initialised here
            **options,
        )
        model.load_state_dict(_parameters(model, tensors), assign=True)
    except (ArithmeticError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise CheckpointError(f"{path} does not hold a whole CharLSTM: {reason}") from error
    return model.to(device)


def _parameters(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn tensors into parameters; tied parameters appear under all of their names."""
    parameters: dict[str, Tensor] = {name: nn.Parameter(value) for name, value in tensors.items()}
    names: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(parameter, name)
        if first in parameters:
            parameters[name] = parameters[first]
    return parameters


def parse(text: str, config_type: type) -> dict[str, Any]:
    """Parse the description of a model, and check the types of the values in its `config`.

    Args:
        text: a JSON object.
        config_type: a NamedTuple whose fields are integers, floats and booleans. A field may be
            missing in the JSON.

    Raises:
        RecursionError, ValueError: the text is not such a description.
    """
    description = json.loads(text)
    config = description.get("config") if isinstance(description, dict) else None
    if not isinstance(config, dict):
        raise ValueError(f"expected a config of names and values, got {text!r:.60}")
    for name, expected in get_type_hints(config_type).items():
        value = config.get(name, expected())
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        fits = number if expected is float else type(value) is expected
        if not fits or not abs(value) <= _LARGEST:  # this form refuses NaN, too
            raise ValueError(f"expected {name} to be {expected.__name__}, got {value!r:.60}")
    return description


def check_tensors(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Check the tensors of a file against the config before the model is constructed.

    Constructing a model with a wrong number of layers could take very long.

    Raises:
        ValueError: the tensors have several dtypes, or another number of layers than the config.
    """
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1:
        raise ValueError(f"its weights are of several dtypes, {', '.join(map(str, dtypes))}")
    names = [name.rpartition(".")[2] for name in tensors]
    layers = len({name for name in names if name.startswith("weight_ih_l")})
    if layers != config.get("num_layers", layers):
        raise ValueError(f"it has {layers} layers, but {config['num_layers']} are announced")


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file.

    Raises:
        CheckpointError: the file is not a safetensors file, or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            # Clones, because the original tensors are unaligned views of the memory-mapped file.
            names = file.keys()
            tensors = {name: file.get_tensor(name).clone() for name in names}
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not an intact safetensors file: {error}") from error
