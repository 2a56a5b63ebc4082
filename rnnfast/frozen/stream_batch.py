"""`StreamBatch` runs many streams of one frozen module, those that have input in one call.

Sizes: N slots of a call, I inputs, H hidden units, P the size of h (H unless projected), L layers.
"""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from collections.abc import Sequence
from operator import index
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..reference import autocast_enabled
from .modules import FrozenCell, FrozenLayers
from .stream import copy_states, zero_states

_INTEGERS = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}


class StreamBatch:
    """Runs a frozen module on many streams, which come, go, and have input at different times.

    Each stream has a slot from `join` to `leave`, which is a row of the memory for states. A call
    of `step` gathers the rows of the streams that have input, runs the module once on all of them,
    and writes the new states back. Consecutive slots are not gathered, but read where they are.
    `join` gives the lowest free slot, so slots stay close together.

    The outputs are those of one `Stream` for each sequence, with the same bits. The module runs on
    torch's number of threads. There are no gradients. A batch sees weights that are loaded into the
    module later. Several Python threads may use it at once, if no two of them run the same slot.

    Args:
        module: Made by `rnnfast.freeze` of an RNN, LSTM, GRU or cell, of one direction.
        capacity: The number of slots. The memory of all of them is allocated at once.

    Raises:
        TypeError: ``module`` is not frozen.
        ValueError: ``module`` is bidirectional, or ``capacity`` is not positive.

    Example:
        >>> frozen = rnnfast.freeze(torch.nn.LSTM(3, 8))
        >>> streams = rnnfast.StreamBatch(frozen, capacity=1000)
        >>> a, b, c = (streams.join() for _ in range(3))
        >>> streams.step([a, b, c], torch.zeros(3, 3)).shape
        torch.Size([3, 8])
        >>> streams.step([c, a], torch.zeros(2, 3)).shape  # b has no input now
        torch.Size([2, 8])
        >>> streams.leave(b)
        >>> len(streams)
        2
    """

    def __init__(self, module: FrozenLayers | FrozenCell, capacity: int) -> None:
        states = zero_states(module, capacity)
        self.module, self.capacity = module, capacity
        self._input_size = int(module.input_size)
        self._time_dim: int | None
        if isinstance(module, FrozenCell):  # its calls have no dimensions of layers and time
            self._states = [state[0] for state in states]
            self._row_dim, self._time_dim = 0, None
        else:
            self._states = [*states]
            self._row_dim, self._time_dim = 1, int(module.batch_first)
        self._joined: set[int] = set()
        self._free = list(range(capacity))  # a heap

    def join(self) -> int:
        """Takes a slot for a new stream, whose states are zero.

        Returns:
            The lowest free slot.

        Raises:
            RuntimeError: No slot is free.
        """
        try:
            slot = heapq.heappop(self._free)
        except IndexError:
            raise RuntimeError(
                f"all {self.capacity} slots are taken: leave(slot) frees one"
            ) from None
        self._joined.add(slot)
        self.reset([slot])
        return slot

    def leave(self, slot: int) -> None:
        """Frees the slot of a stream that has ended.

        Raises:
            ValueError: ``slot`` is not joined.
        """
        slot = index(slot)
        try:
            self._joined.remove(slot)
        except KeyError:
            raise ValueError(f"slot {slot} is not joined") from None
        heapq.heappush(self._free, slot)

    def step(self, slots: Tensor | Sequence[int], input: Tensor) -> Tensor:
        """Runs one step of some streams. The others stay as they are.

        Args:
            slots: (N) distinct numbers from `join`, a list or a tensor of integers.
            input: (N, I), in the order of ``slots``. float32.

        Returns:
            The outputs h (N, P) in the order of ``slots``, in new memory.

        Raises:
            TypeError: ``slots`` are no integers.
            ValueError: A slot is not joined, or is given twice.
            RuntimeError: The input does not fit, or needs a gradient while gradients are recorded,
                or autocast is on.
        """
        where = self._where(slots)
        if input.shape != (len(where), self._input_size) or input.dtype is not torch.float32:
            raise RuntimeError(
                f"Expected input of shape {(len(where), self._input_size)} and float32, got "
                f"{list(input.shape)} and {input.dtype}"
            )
        if autocast_enabled("cpu"):
            raise RuntimeError("streams take and keep float32: call them outside of autocast")
        rows = self._read(where)
        states = rows[0] if len(rows) == 1 else (rows[0], rows[1])
        if self._time_dim is None:
            finals = self.module(input, states)
            y = finals if len(rows) == 1 else finals[0]
        else:
            y, finals = self.module(input.unsqueeze(self._time_dim), states)
            y = y.squeeze(self._time_dim)
        self._write(where, rows, (finals,) if len(rows) == 1 else finals)
        return y

    def reset(self, slots: Tensor | Sequence[int]) -> None:
        """Sets the states of some streams to zero.

        Args:
            slots: As for `step`.

        Raises:
            TypeError, ValueError: As for `step`.
        """
        where = self._where(slots)
        rows = self._read(where)
        for each in rows:
            each.zero_()
        self._write(where, rows, rows)

    def state(self, slots: Tensor | Sequence[int]) -> Any:
        """A copy of the states of some streams as torch.nn has them: h (L, N, P), or (h, c).

        Those of a cell have no dimension of layers.

        Args:
            slots: As for `step`.

        Raises:
            TypeError, ValueError: As for `step`.
        """
        copies = tuple(each.clone() for each in self._read(self._where(slots)))
        return copies if len(copies) > 1 else copies[0]

    def set_state(self, slots: Tensor | Sequence[int], value: Any) -> None:
        """Copies ``value`` to the states of some streams.

        Args:
            slots: As for `step`.
            value: What `state` returns.

        Raises:
            TypeError, ValueError: As for `step`.
            RuntimeError: The shapes of ``value`` do not fit.
        """
        where = self._where(slots)
        rows = self._read(where)
        copy_states(value, rows)
        self._write(where, rows, rows)

    def __len__(self) -> int:
        """The number of streams that have a slot."""
        return len(self._joined)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.module!r}, capacity={self.capacity})"

    def _where(self, slots: Tensor | Sequence[int]) -> range | Tensor:
        """The rows of ``slots``: a range if they are consecutive, else indices (N)."""
        if isinstance(slots, Tensor):
            if slots.dtype not in _INTEGERS or slots.dim() != 1:
                raise TypeError(
                    f"slots should be integers of shape (N), got {slots.dtype} of shape "
                    f"{list(slots.shape)}"
                )
            numbers = slots.tolist()
        else:
            numbers = list(slots)
        if len(self._joined.intersection(numbers)) < len(numbers):
            self._refuse(numbers)
        if not numbers:
            return range(0)
        consecutive = range(numbers[0], numbers[0] + len(numbers))
        if numbers[-1] == consecutive[-1] and numbers == list(consecutive):
            return consecutive
        if isinstance(slots, Tensor):
            return slots.to("cpu", torch.int64)
        # torch.tensor(numbers) takes several times as long.
        return torch.frombuffer(array("q", numbers), dtype=torch.int64)

    def _refuse(self, numbers: list[int]) -> NoReturn:
        for slot, times in Counter(numbers).items():
            if slot not in self._joined:
                raise ValueError(f"slot {slot} is not joined")
            if times > 1:
                raise ValueError(f"slots should be distinct, but {slot} is there {times} times")
        raise RuntimeError("a slot left while it was looked for")

    def _read(self, where: range | Tensor) -> list[Tensor]:
        """The states of some rows, which are no copies if these are consecutive."""
        if isinstance(where, range):
            start, count = where.start, len(where)
            return [state.narrow(self._row_dim, start, count) for state in self._states]
        return [state.index_select(self._row_dim, where) for state in self._states]

    def _write(
        self, where: range | Tensor, rows: Sequence[Tensor], values: Sequence[Tensor]
    ) -> None:
        """Sets the states of ``rows``, which `_read` returned, to ``values``."""
        for state, row, value in zip(self._states, rows, values, strict=True):
            if isinstance(where, range):
                row.copy_(value)
            else:
                state.index_copy_(self._row_dim, where, value)
