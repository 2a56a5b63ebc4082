"""`Stream` runs frozen layers step by step, and keeps their states.

Sizes: T time steps, B sequences, I inputs, H hidden units, P the size of h (H unless projected), L
layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..reference import CELLS
from .modules import FrozenCell, FrozenLayers


def zero_states(module: FrozenLayers | FrozenCell, batch: int) -> tuple[Tensor, ...]:
    """The first states of ``batch`` sequences: h (L, B, P), and for an LSTM c (L, B, H).

    Raises:
        TypeError: ``module`` is not frozen.
        ValueError: ``module`` is bidirectional or reads tokens, or ``batch`` is not positive.
    """
    if not isinstance(module, (FrozenLayers, FrozenCell)):
        raise TypeError(
            f"expected a frozen RNN, LSTM, GRU or cell, got {type(module).__name__}: "
            "rnnfast.freeze(module) makes one"
        )
    if getattr(module, "bidirectional", False):
        raise ValueError("a stream cannot run backwards in time: the module is bidirectional")
    if getattr(module, "tokens", False):
        raise ValueError("a stream reads vectors, and the module reads tokens")
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"expected a positive number of sequences, got {batch!r}")
    layers, hidden = getattr(module, "num_layers", 1), module.hidden_size
    sizes = (getattr(module, "proj_size", 0) or hidden, hidden)[: CELLS[module._cell_name].states]
    with torch.inference_mode(False):  # else they could not be changed outside of it
        return tuple(
            torch.zeros(layers, batch, size, device="cpu", dtype=torch.float32) for size in sizes
        )


def copy_states(value: Any, states: Sequence[Tensor]) -> None:
    """Copies h, or (h, c), to ``states``.

    Raises:
        RuntimeError: Their number or shapes do not fit.
    """
    given = value if isinstance(value, (tuple, list)) else (value,)
    if len(given) != len(states):
        raise RuntimeError(f"expected {len(states)} states, got {len(given)}")
    for name, new, state in zip("hc", given, states, strict=False):
        if not isinstance(new, Tensor) or new.shape != state.shape or new.is_meta:
            got = list(new.shape) if isinstance(new, Tensor) else type(new).__name__
            got = "a tensor without memory" if getattr(new, "is_meta", False) else got
            raise RuntimeError(f"Expected {name} of shape {tuple(state.shape)}, got {got}")
    with torch.no_grad():
        for new, state in zip(given, states, strict=True):
            state.copy_(new)


class Stream:
    """Runs a frozen module on data that arrive step by step, and keeps the states in between.

    A call of the module itself takes states and returns new ones, and makes new tensors for them
    and for its output. That takes longer than a step of a small layer. A stream has allocated all
    that before. It runs in the calling thread alone and releases the GIL meanwhile, so several
    streams run side by side in several threads. The methods of one stream are for one thread at a
    time.

    The outputs are those of the module, with the same bits. There are no gradients. A stream sees
    weights that are loaded into the module later.

    Args:
        module: Made by `rnnfast.freeze` of an RNN, LSTM, GRU or cell, of one direction.
        batch: B, the sequences that run together. Default: 1.

    Raises:
        TypeError: ``module`` is not frozen.
        ValueError: ``module`` is bidirectional or reads tokens (``tokens=True``), or ``batch`` is
            not positive.

    Example:
        >>> frozen = rnnfast.freeze(torch.nn.LSTM(3, 8))
        >>> stream = rnnfast.Stream(frozen)
        >>> stream.step(torch.zeros(3)).shape
        torch.Size([8])
        >>> stream.run(torch.zeros(100, 3)).shape
        torch.Size([100, 8])
        >>> stream.reset()
    """

    def __init__(self, module: FrozenLayers | FrozenCell, batch: int = 1) -> None:
        self._states = zero_states(module, batch)
        self.module, self.batch = module, batch
        outputs = self._outputs = self._states[0].shape[-1]
        self._output = torch.zeros(batch, outputs, device="cpu", dtype=torch.float32)
        self._output_of_one = self._output[0]
        module._make_readable()
        self._packed = module._times_packed
        extension: Any = backend.EXTENSION  # is there, since the module is frozen
        projects = outputs != module.hidden_size
        self._stream = extension.Stream(
            backend.CELL_KINDS[module._cell_name], module._blocks(), projects, [*self._states]
        )

    def step(self, input: Tensor, out: Tensor | None = None) -> Tensor:
        """Runs one step.

        Args:
            input: (B, I), or (I) for a single sequence. float32.
            out: Where to write the output, (B, P) or (P). It may be ``input`` itself. Default:
                memory of the stream, which the next step overwrites: clone the output to keep it.

        Returns:
            The output h: ``out``, or the memory of the stream.

        Raises:
            RuntimeError: Shapes or types do not fit, the input needs a gradient, another thread is
                running the stream, or the module's weights were packed for another instruction set.
        """
        if out is None:
            single = isinstance(input, Tensor) and input.dim() == 1
            out = self._output_of_one if single else self._output
        if self._packed != self.module._times_packed:
            self._refuse_other_weights()
        self._stream.run(input, out, False)
        return out

    def run(self, input: Tensor, out: Tensor | None = None) -> Tensor:
        """Runs many steps in one call.

        Args:
            input: (T, B, I), or (T, I) for a single sequence. Time comes first, also for a module
                with ``batch_first``. float32.
            out: Where to write the outputs, (T, B, P) or (T, P), contiguous. It may be ``input``
                itself, but not overlap it in part. Default: new memory.

        Returns:
            The outputs h of all steps.

        Raises:
            RuntimeError: As `step`.
        """
        if out is None:
            out = torch.empty(*input.shape[:-1], self._outputs, device="cpu", dtype=torch.float32)
        if self._packed != self.module._times_packed:
            self._refuse_other_weights()
        self._stream.run(input, out, True)
        return out

    def reset(self, sequences: Any = None) -> None:
        """Sets states to zero.

        Args:
            sequences: Which of the B sequences: what indexes a dimension of a tensor, such as a
                number, a list of numbers or a mask (B). Default: all.
        """
        for state in self._states:
            if sequences is None:
                state.zero_()
            else:
                state[:, sequences] = 0

    @property
    def state(self) -> Any:
        """A copy of the states as torch.nn has them: h (L, B, P), or for an LSTM (h, c).

        Those of a cell have no dimension of layers. Setting it copies what is given.

        Raises:
            RuntimeError: The shapes of states that are set do not fit.
        """
        copies = tuple(self._shaped(state).clone() for state in self._states)
        return copies if len(copies) > 1 else copies[0]

    @state.setter
    def state(self, value: Any) -> None:
        copy_states(value, [self._shaped(state) for state in self._states])

    def clone(self) -> Stream:
        """A stream of the same module with a copy of the states."""
        return _restored(type(self), self.module, self.batch, self.state)

    def __reduce__(self) -> Any:
        return _restored, (type(self), self.module, self.batch, self.state)

    def __copy__(self) -> Stream:
        return self.clone()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.module!r}, batch={self.batch})"

    def _shaped(self, state: Tensor) -> Tensor:
        return state[0] if isinstance(self.module, FrozenCell) else state

    def _refuse_other_weights(self) -> None:
        raise RuntimeError(
            "the module's weights were packed again after this stream was made, since the "
            "instruction set changed: make a new stream"
        )


def _restored(
    kind: type[Stream], module: FrozenLayers | FrozenCell, batch: int, state: Any
) -> Stream:
    stream = kind(module, batch)
    stream.state = state
    return stream
