"""Records the gates of layers and cells while a model runs.

======  ===========================================================================
layer   activations
======  ===========================================================================
RNN     hidden
GRU     reset (r), update (z), new (n), hidden
LSTM    input (i), forget (f), cell (g), output (o), cell_state (c), hidden
Layer   every variable of the cell's function, its states beside h, hidden
======  ===========================================================================

The letters are those of the formulas in `rnnfast.reference`; ``hidden`` is h.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from rnnfast import backend
from rnnfast.custom import Layer, LayerCell
from rnnfast.explain.gates import Activations, Cells, Layers, repeat_sequence, repeat_step
from rnnfast.modules import RNN, RNNCell

_FORWARDS = (RNN.forward, RNNCell.forward, Layer.forward, LayerCell.forward)
"""The methods that layers and cells share."""


class GateRecord(Mapping[str, Activations]):
    """The result of `record_gates`: ``record[key][name]`` holds the activations of a layer.

    Layer 1 of the module ``encoder`` has the key "encoder.l1", and its reverse direction
    "encoder.l1_reverse", like the suffixes of parameter names. If the recorded module is itself a
    layer, the key is just "l1". A cell has the key of layer 0.

    Activations are shaped like a layer's output: (T, B, H), (B, T, H) with ``batch_first``, (T, H)
    for a single sequence. Those of a PackedSequence are padded. Steps after the end of a sequence
    are zeros. The activations of several calls are concatenated in time; a cell, which runs one
    step in each call, therefore also has (T, B, H).
    """

    def __init__(self) -> None:
        self._calls: dict[str, list[Activations]] = {}
        self._time: dict[str, int] = {}

    def __getitem__(self, key: str) -> Activations:
        calls, time = self.calls(key), self._time[key]
        try:
            return {name: torch.cat([call[name] for call in calls], time) for name in calls[0]}
        except RuntimeError as error:
            shapes = ", ".join(str(tuple(call["hidden"].shape)) for call in calls)
            raise ValueError(
                f"the calls of {key} cannot be concatenated, their shapes are {shapes}; "
                f"calls({key!r}) returns them one by one"
            ) from error

    def __contains__(self, key: object) -> bool:
        return key in self._calls

    def __iter__(self) -> Iterator[str]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)

    def calls(self, key: str) -> list[Activations]:
        """The activations of each single call, in order.

        Raises:
            KeyError: No layer of this name was called.
        """
        if key not in self._calls:
            called = ", ".join(self._calls) or "none"
            raise KeyError(f"no layer {key!r} was called; those that were: {called}")
        return self._calls[key]

    def _append(self, key: str, activations: Activations, time: int) -> None:
        self._calls.setdefault(key, []).append(activations)
        self._time[key] = time


@contextmanager
def record_gates(module: nn.Module) -> Iterator[GateRecord]:
    """Record the gates of every layer and cell of rnnfast in a module.

    >>> with rnnfast.explain.record_gates(model) as record:
    ...     model(x)
    >>> record["encoder.l0"]["forget"]

    The results and gradients of the module do not change. After each call, the layer runs again
    without gradients. The fused kernels return the gates that they save for the backward; where
    they cannot run, the formulas in plain PyTorch are used. A call therefore takes about twice as
    long, and the record keeps all activations in memory. The activations have no gradients.
    Subclasses that override ``forward`` are not recorded.

    Args:
        module: A layer, a cell, or a model with some inside.

    Yields:
        The record, to which every call adds its activations.

    Raises:
        ValueError: The module has no layer or cell of rnnfast.
        RuntimeError: A call cannot be repeated, because dropout between layers is active, a layer
            with parametrized weights is in training mode, or a torch.func transform is active.
    """
    record = GateRecord()
    handles = []
    try:
        for name, layer in module.named_modules():
            if type(layer).forward in _FORWARDS and "forward" not in vars(layer):
                hook = partial(_record_call, record, name)
                handles.append(layer.register_forward_hook(hook, with_kwargs=True))
        if not handles:
            raise ValueError(
                f"{type(module).__name__} has no layer or cell of rnnfast to record; "
                f"rnnfast.accelerate turns torch.nn's into these"
            )
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _record_call(
    record: GateRecord,
    name: str,
    layer: Layers | Cells,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    """The forward hook, which appends the activations of a call after it."""
    _check_repeatable(name or type(layer).__name__, layer)
    with torch.no_grad():
        if isinstance(layer, Cells):
            activations, time = repeat_step(layer, *args, **kwargs)
        else:
            activations, time = repeat_sequence(layer, *args, **kwargs)
    for key, own in activations.items():
        record._append(f"{name}.{key}" if name else key, own, time)


def _check_repeatable(name: str, layer: Layers | Cells) -> None:
    if backend.transforms_active():
        raise RuntimeError("record_gates cannot look into torch.func transforms")
    if not layer.training:
        return
    if isinstance(layer, Layers) and layer.dropout > 0 and layer.num_layers > 1:
        raise RuntimeError(
            f"the gates of {name} cannot be recorded while dropout between its layers is active, "
            f"because the dropout mask is not known; call eval() first"
        )
    if parametrize.is_parametrized(layer):
        raise RuntimeError(
            f"the gates of {name} cannot be recorded in training, because its parametrized weights "
            f"may change with every use; call eval() first"
        )
