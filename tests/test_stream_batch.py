"""Batches of streams: the results of one stream for each sequence, slots, states, and errors."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import threading
import time
import tracemalloc
from typing import Any

import pytest
import torch
from covering import quick_pairs, quick_values
from targets import FROZEN, check_on, running_on
from torch import Tensor, nn

import rnnfast
from rnnfast import Stream, StreamBatch
from rnnfast.frozen import TYPES

MODULES: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (nn.LSTM, {}),
    (nn.LSTM, {"proj_size": 5, "batch_first": True}),
    (nn.LSTM, {"num_layers": 2, "proj_size": 5}),
    (nn.GRU, {"num_layers": 2}),
    (nn.RNN, {"bias": False}),
    (nn.LSTMCell, {}),
    (nn.GRUCell, {}),
]


def parts(state: Any) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def joined(frozen: Any, capacity: int) -> StreamBatch:
    streams = StreamBatch(frozen, capacity)
    assert [streams.join() for _ in range(capacity)] == list(range(capacity))
    return streams


@quick_pairs(module=MODULES, inputs=[1, 9], weights=[*TYPES])
def test_the_bits_are_those_of_single_streams(
    module: tuple[type[nn.Module], dict[str, Any]], inputs: int, weights: str
) -> None:
    """Streams join and leave at random, and random ones of them have input."""
    kind, options = module
    frozen = rnnfast.freeze(kind(inputs, 20, **options), weights)

    def check(_: str) -> None:
        chance = random.Random(0)
        batch, single = StreamBatch(frozen, 70), dict[int, Stream]()
        for turn in range(40):
            leaving = chance.sample(sorted(single), chance.randrange(len(single) // 4 + 1))
            for slot in leaving:
                batch.leave(slot)
                del single[slot]
            for _ in range(chance.randrange(min(12, 70 - len(single)) + 1)):
                slot = batch.join()
                assert slot not in single
                single[slot] = Stream(frozen)
            assert len(batch) == len(single)
            slots = chance.sample(sorted(single), chance.randrange(len(single) + 1))
            if turn % 3 == 0:  # consecutive slots, where none of these is free
                first = chance.randrange(70)
                slots = [slot for slot in range(first, first + len(slots)) if slot in single]
            x = torch.randn(len(slots), inputs)
            y = batch.step(torch.tensor(slots, dtype=torch.long) if turn % 2 else slots, x)
            assert y.shape == (len(slots), options.get("proj_size", 20))
            for slot, x_t, y_t in zip(slots, x, y, strict=True):
                assert torch.equal(single[slot].step(x_t), y_t)
        for slot, stream in single.items():
            for one, other in zip(parts(batch.state([slot])), parts(stream.state), strict=True):
                assert torch.equal(one, other)

    check_on(FROZEN, check)


@quick_values(weights=["float32", "int8"], threads=[2, 1])
def test_a_large_batch(weights: str, threads: int) -> None:
    """Products of 1,000 rows run other kernels than those of one row."""
    frozen, before = rnnfast.freeze(nn.LSTM(40, 64), weights), torch.get_num_threads()
    x, order = torch.randn(3, 1000, 40), torch.randperm(1000)

    def check(_: str) -> None:
        there, mixed = joined(frozen, 1000), joined(frozen, 1000)
        y = torch.stack([there.step(range(1000), x_t) for x_t in x])
        shuffled = torch.stack([mixed.step(order, x_t[order]) for x_t in x])
        assert torch.equal(shuffled, y[:, order])
        for k in range(0, 1000, 50):
            assert torch.equal(Stream(frozen).run(x[:, k]), y[:, k])

    torch.set_num_threads(threads)
    try:
        check_on(FROZEN, check)
    finally:
        torch.set_num_threads(before)


def test_slots() -> None:
    streams = StreamBatch(rnnfast.freeze(nn.GRU(3, 4)), 3)
    assert len(streams) == 0
    assert [streams.join() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match=r"all 3 slots are taken: leave\(slot\) frees one"):
        streams.join()
    streams.leave(2)
    streams.leave(torch.tensor(0))
    assert len(streams) == 1
    assert [streams.join(), streams.join()] == [0, 2]  # the lowest free slot
    assert len(streams) == 3
    assert repr(streams) == f"StreamBatch({streams.module!r}, capacity=3)"


def test_a_slot_starts_with_zeros() -> None:
    frozen = rnnfast.freeze(nn.LSTM(3, 4, num_layers=2))
    streams, x = joined(frozen, 3), torch.randn(3, 3)
    first = streams.step([0, 1, 2], x)
    before = streams.state([0, 2])
    assert all(state.abs().min() > 0 for state in before)
    streams.leave(1)
    assert streams.join() == 1
    assert all(state.eq(0).all() for state in streams.state([1]))
    for one, other in zip(streams.state([0, 2]), before, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(streams.step([1], x[1:2]), first[1:2])


def test_slots_are_read_in_any_form() -> None:
    frozen, x = rnnfast.freeze(nn.LSTM(3, 4)), torch.randn(2, 3)
    expected = joined(frozen, 6).step([2, 5], x)
    for slots in [(2, 5), range(2, 6, 3), torch.tensor([0, 2, 5])[1:]]:
        assert torch.equal(joined(frozen, 6).step(slots, x), expected)
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        slots = torch.tensor([2, 5], dtype=dtype)
        assert torch.equal(joined(frozen, 6).step(slots, x), expected)
    strided = torch.randn(3, 2).T
    streams = joined(frozen, 6)
    assert torch.equal(
        streams.step([2, 5], strided), joined(frozen, 6).step([2, 5], strided.clone())
    )
    assert streams.step([], torch.empty(0, 3)).shape == (0, 4)
    assert streams.step(torch.tensor([], dtype=torch.long), torch.empty(0, 3)).shape == (0, 4)


def test_outputs_are_new_memory() -> None:
    streams, x = joined(rnnfast.freeze(nn.RNN(3, 4)), 2), torch.randn(2, 3)
    first = streams.step([0, 1], x)
    state = streams.state([0, 1])
    assert torch.equal(first, state[0])
    kept = first.clone()
    second = streams.step([0, 1], x)
    assert torch.equal(first, kept)
    second.zero_()
    assert streams.state([0, 1]).abs().min() > 0


@pytest.mark.parametrize("slots", [[1, 2], [3, 0]], ids=["consecutive", "gathered"])
@pytest.mark.parametrize(("kind", "options"), MODULES, ids=str)
def test_states(kind: type[nn.Module], options: dict[str, Any], slots: list[int]) -> None:
    frozen = rnnfast.freeze(kind(3, 6, **options))
    streams, x = joined(frozen, 4), torch.randn(4, 3)
    streams.step(range(4), x)
    saved, others = streams.state(slots), [k for k in range(4) if k not in slots]
    kept = streams.state(others)
    after = streams.step(slots, x[:2])
    streams.set_state(slots, saved)
    assert torch.equal(streams.step(slots, x[:2]), after)
    streams.reset(slots)
    assert all(state.eq(0).all() for state in parts(streams.state(slots)))
    for one, other in zip(parts(streams.state(others)), parts(kept), strict=True):
        assert torch.equal(one, other)
    streams.set_state(slots, saved)
    single = Stream(frozen, 2)
    single.state = saved
    assert torch.equal(single.step(x[:2]), after)


def test_copies() -> None:
    streams = joined(rnnfast.freeze(nn.LSTM(3, 6), "int8"), 3)
    streams.leave(1)
    x = torch.randn(2, 3)
    streams.step([0, 2], x)
    copies = [copy.deepcopy(streams), pickle.loads(pickle.dumps(streams))]
    expected = streams.step([0, 2], x)
    for other in copies:
        assert len(other) == 2
        assert torch.equal(other.step([0, 2], x), expected)
        assert other.join() == 1


def test_weights_that_are_loaded_later() -> None:
    frozen, other = (rnnfast.freeze(nn.LSTM(3, 6)) for _ in range(2))
    streams, x = joined(frozen, 2), torch.randn(2, 3)
    frozen.load_state_dict(other.state_dict())
    assert torch.equal(streams.step([0, 1], x), joined(other, 2).step([0, 1], x))


@pytest.mark.skipif(len(FROZEN) < 2, reason="this processor has one instruction set alone")
def test_weights_of_another_instruction_set() -> None:
    with running_on(FROZEN[0]):
        frozen, x = rnnfast.freeze(nn.LSTM(3, 40)), torch.randn(2, 3)
        streams = joined(frozen, 2)
        expected = streams.step([0, 1], x)
        streams.reset([0, 1])
    with running_on(FROZEN[1]):
        torch.testing.assert_close(streams.step([0, 1], x), expected)  # packed again


def test_inference_mode() -> None:
    frozen, x = rnnfast.freeze(nn.GRU(3, 4)), torch.randn(2, 3)
    expected = joined(frozen, 2).step([1, 0], x)
    with torch.inference_mode():
        streams = joined(frozen, 2)
        streams.step([0, 1], x)
        streams.reset([0, 1])
    assert torch.equal(streams.step([1, 0], x), expected)
    streams.reset([1, 0])
    with torch.inference_mode():
        assert torch.equal(streams.step([1, 0], x), expected)
        stream = Stream(frozen)
        stream.step(x[0])
    stream.reset()
    assert torch.equal(stream.step(x[0]), expected[0])


def test_threads_with_slots_of_their_own() -> None:
    frozen, x = rnnfast.freeze(nn.LSTM(4, 33), "int8"), torch.randn(4, 500, 8, 4)
    expected = [frozen(part)[0] for part in x]
    streams = joined(frozen, 32)
    results: list[Any] = [None] * 4

    def work(i: int) -> None:
        slots = torch.arange(32)[i::4]
        results[i] = torch.stack([streams.step(slots, x_t) for x_t in x[i]])

    threads = [threading.Thread(target=work, args=[i]) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, y in zip(results, expected, strict=True):
        assert torch.equal(result, y)


def test_many_steps_take_no_more_memory() -> None:
    streams, x = joined(rnnfast.freeze(nn.LSTM(3, 4)), 20), torch.randn(20, 3)
    chance = random.Random(0)

    def run(steps: int) -> None:
        for _ in range(steps):
            slot = chance.randrange(20)
            streams.leave(slot)
            assert streams.join() == slot
            slots = chance.sample(range(20), chance.randrange(1, 21))
            streams.step(slots, x[: len(slots)])

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(each), Tensor) for each in gc.get_objects())

    run(100)
    before = tensors()
    tracemalloc.start()
    try:
        run(500)
        gc.collect()
        first = tracemalloc.get_traced_memory()[0]
        run(1500)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] <= first + 2000
    finally:
        tracemalloc.stop()
    assert tensors() == before


def test_the_time_of_a_step_does_not_depend_on_the_capacity() -> None:
    frozen, x = rnnfast.freeze(nn.LSTM(2, 1)), torch.randn(2, 2)

    def least(capacity: int) -> float:
        streams, times = StreamBatch(frozen, capacity), []
        a, b, c = (streams.join() for _ in range(3))
        for _ in range(300):
            begin = time.perf_counter()
            streams.step([a, c], x)
            streams.leave(b)
            b = streams.join()
            times.append(time.perf_counter() - begin)
        return min(times)

    # To read one byte for each of 4,000,000 slots would take longer.
    assert least(4_000_000) < 3 * least(10)


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"rnnfast.freeze\(module\) makes one"):
        StreamBatch(nn.LSTM(3, 4), 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bidirectional"):
        StreamBatch(rnnfast.freeze(nn.LSTM(3, 4, bidirectional=True)), 2)
    frozen = rnnfast.freeze(nn.LSTM(3, 4))
    for capacity in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="positive number of sequences"):
            StreamBatch(frozen, capacity)  # type: ignore[arg-type]
    streams = joined(frozen, 5)
    streams.leave(3)
    state, x = streams.state(range(3)), torch.randn(2, 3)
    grad = torch.randn(2, 3, requires_grad=True)
    calls: list[tuple[type[Exception], str, Any]] = [
        (ValueError, "slot 3 is not joined", lambda: streams.leave(3)),
        (ValueError, "slot 9 is not joined", lambda: streams.leave(9)),
        (TypeError, "integer", lambda: streams.leave(1.5)),  # type: ignore[arg-type]
        (
            RuntimeError,
            r"input of shape \(2, 3\) and float32, got \[2, 2\]",
            lambda: streams.step([0, 1], x[:, :2]),
        ),
        (RuntimeError, r"got \[3\]", lambda: streams.step([0], x[0])),
        (RuntimeError, r"got \[1, 3\]", lambda: streams.step([0, 1], x[:1])),
        (RuntimeError, "got .* torch.float64", lambda: streams.step([0, 1], x.double())),
        (RuntimeError, "no gradients", lambda: streams.step([0, 1], grad)),
        (RuntimeError, "not at the same device", lambda: streams.step([0, 1], x.to("meta"))),
        (RuntimeError, "expected 2 states, got 1", lambda: streams.set_state([0], state[0])),
        (
            RuntimeError,
            r"h of shape \(1, 2, 4\), got \[1, 3, 4\]",
            lambda: streams.set_state([0, 1], state),
        ),
    ]
    for slots, error, words in [
        ([0, 3], ValueError, "slot 3 is not joined"),
        ([2, 3, 4], ValueError, "slot 3 is not joined"),
        ([-1, 0], ValueError, "slot -1 is not joined"),
        ([4, 5], ValueError, "slot 5 is not joined"),
        (torch.tensor([0, 5]), ValueError, "slot 5 is not joined"),
        ([0, 2, 0], ValueError, "slots should be distinct, but 0 is there 2 times"),
        (torch.tensor([2, 1, 1, 1]), ValueError, "but 1 is there 3 times"),
        ([0.0, 2.0], TypeError, "float"),
        ([0.0], TypeError, "float"),
        (torch.tensor([0.0]), TypeError, r"integers of shape \(N\), got torch.float32"),
        (torch.tensor([True, False]), TypeError, "got torch.bool"),
        (torch.tensor(1), TypeError, r"of shape \[\]"),
        (torch.tensor([[1, 2]]), TypeError, r"of shape \[1, 2\]"),
        (0, TypeError, "int"),
    ]:
        for call in (
            lambda slots=slots: streams.step(slots, x),
            lambda slots=slots: streams.reset(slots),
            lambda slots=slots: streams.state(slots),
            lambda slots=slots: streams.set_state(slots, state),
        ):
            calls.append((error, words, call))
    for error, words, call in calls:
        with pytest.raises(error, match=words):
            call()
    with pytest.raises(RuntimeError, match="outside of autocast"), torch.autocast("cpu"):
        streams.step([0, 1], x)
    assert all(each.eq(0).all() for each in streams.state([0, 1, 2, 4]))  # no call changed a state
    with torch.no_grad():
        streams.step([0, 1], grad)
