"""Streams: the same results as the module, states, several threads, and errors."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from itertools import product
from typing import Any

import pytest
import torch
from frozen_cases import every_type
from targets import FROZEN, check_on, running_on
from torch import Tensor, nn
from torch.autograd import forward_ad

import rnnfast
from rnnfast import Stream

STACKS: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (nn.LSTM, {}),
    (nn.GRU, {"num_layers": 2}),
    (nn.RNN, {"nonlinearity": "relu", "bias": False}),
    (nn.LSTM, {"num_layers": 3, "proj_size": 5}),
]
BLOCKS = [1, 1, 2, 64, 3, 65, 150, 1]
"""Steps of the calls of a stream: below, at and beyond what it computes at once."""


def joined(states: Any) -> Tensor:
    return torch.cat([s.flatten() for s in states]) if isinstance(states, tuple) else states


@every_type
@pytest.mark.parametrize(("kind", "options"), STACKS, ids=str)
def test_the_bits_are_those_of_the_module(
    kind: type[nn.Module], options: dict[str, Any], weights: str
) -> None:
    for (I, H), batch in product([(1, 8), (9, 20), (40, 70)], [1, 3]):
        module, x = kind(I, H, **options), torch.randn(sum(BLOCKS), batch, I)

        def check(_: str, module: nn.Module = module, x: Tensor = x) -> None:
            frozen = rnnfast.freeze(module, weights)
            y, finals = frozen(x)
            assert y[-1].abs().max() > 1e-3
            stream, outputs = Stream(frozen, x.shape[1]), []
            for block in x.split(BLOCKS):
                one = len(block) == 1
                outputs.append(stream.step(block[0]).clone()[None] if one else stream.run(block))
            assert torch.equal(torch.cat(outputs), y)
            assert torch.equal(joined(stream.state), joined(finals))

        check_on(FROZEN, check)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(kind: type[nn.Module]) -> None:
    frozen = rnnfast.freeze(kind(5, 7), "int8")
    stream, x, states = Stream(frozen, 2), torch.randn(3, 2, 5), None
    for x_t in x:
        states = frozen(x_t, states)
        h = states[0] if isinstance(states, tuple) else states
        assert h.abs().max() > 1e-3
        assert torch.equal(stream.step(x_t), h)
    assert torch.equal(joined(stream.state), joined(states))


def test_many_steps() -> None:
    frozen, x = rnnfast.freeze(nn.LSTM(3, 8)), torch.randn(100_000, 3)
    expected, _ = frozen(x)
    assert expected[-1].abs().max() > 1e-3
    stream, out = Stream(frozen), torch.empty(100_000, 8)
    for x_t, y_t in zip(x, out, strict=True):
        assert stream.step(x_t, y_t) is y_t
    assert torch.equal(out, expected)
    stream.reset()
    assert torch.equal(stream.run(x), expected)


def test_outputs() -> None:
    stream = Stream(rnnfast.freeze(nn.GRU(3, 4)))
    x = torch.randn(3)
    y = stream.step(x)
    first = y.clone()
    assert stream.step(x) is y  # the next step overwrites it
    assert not torch.equal(y, first)
    stream.reset()
    assert torch.equal(stream.step(x[None]), first[None])
    stream.reset()
    out = torch.empty(2, 4)
    assert stream.run(torch.stack([x, x]), out) is out
    assert torch.equal(out[0], first)
    strided = torch.randn(3, 2).T  # rows that are not contiguous
    stream.reset()
    result = stream.run(strided)
    stream.reset()
    assert torch.equal(result, stream.run(strided.contiguous()))
    assert stream.run(torch.empty(0, 3)).shape == (0, 4)


def test_states() -> None:
    frozen = rnnfast.freeze(nn.LSTM(3, 6, num_layers=2, proj_size=4))
    stream, x = Stream(frozen, 3), torch.randn(5, 3, 3)
    stream.run(x)
    h, c = stream.state
    assert h.shape == (2, 3, 4)
    assert c.shape == (2, 3, 6)
    expected = frozen(x, (h, c))[0]
    copies = [stream.clone(), copy.copy(stream), copy.deepcopy(stream)]
    copies.append(pickle.loads(pickle.dumps(stream)))
    for other in copies:
        assert torch.equal(other.run(x), expected)
    assert torch.equal(joined(stream.state), joined((h, c)))  # the copies have states of their own
    other = Stream(frozen, 3)
    other.state = stream.state
    assert torch.equal(other.run(x), expected)
    stream.reset([0, 2])
    assert stream.state[0][:, [0, 2]].eq(0).all()
    assert torch.equal(stream.state[1][:, 1], c[:, 1])
    stream.reset(torch.tensor([False, True, False]))
    assert joined(stream.state).eq(0).all()
    gru = Stream(rnnfast.freeze(nn.GRU(3, 6)))
    gru.state = torch.ones(1, 1, 6)
    assert gru.state.eq(1).all()


def test_weights_that_are_loaded_later() -> None:
    frozen, other = (rnnfast.freeze(nn.LSTM(3, 6), "int8") for _ in range(2))
    stream, x = Stream(frozen), torch.randn(7, 3)
    before = stream.run(x)
    frozen.load_state_dict(other.state_dict())
    stream.reset()
    after = stream.run(x)
    assert torch.equal(after, other(x)[0])
    assert not torch.equal(after, before)
    frozen.share_memory()  # the blocks move
    stream.reset()
    assert torch.equal(stream.run(x), after)


def test_weights_of_another_instruction_set() -> None:
    with running_on("portable"):
        frozen = rnnfast.freeze(nn.LSTM(3, 40))
        stream, x = Stream(frozen), torch.randn(7, 3)
        expected = frozen(x)[0]
    if len(FROZEN) > 1:
        with running_on(FROZEN[1]):
            torch.testing.assert_close(stream.run(x), expected)  # as it was made
            frozen(x)  # packs the weights again
            for call in (lambda: stream.step(x[0]), lambda: stream.run(x)):
                with pytest.raises(RuntimeError, match="make a new stream"):
                    call()
            torch.testing.assert_close(Stream(frozen).run(x), expected)


def test_streams_in_many_threads() -> None:
    frozen = rnnfast.freeze(nn.LSTM(4, 33), "int8")
    inputs = torch.randn(8, 3000, 4)
    expected = [frozen(x)[0] for x in inputs]
    results: list[Any] = [None] * 8

    def work(i: int) -> None:
        stream = Stream(frozen)
        results[i] = torch.stack([stream.step(x_t).clone() for x_t in inputs[i]])

    threads = [threading.Thread(target=work, args=[i]) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, y in zip(results, expected, strict=True):
        assert torch.equal(result, y)


def test_one_thread_at_a_time_and_without_the_gil() -> None:
    """While a long call runs, this thread goes on, and its own call of that stream is refused."""
    stream = Stream(rnnfast.freeze(nn.LSTM(64, 512)))
    x = torch.randn(10_000, 64)
    thread = threading.Thread(target=stream.run, args=[x])
    thread.start()
    time.sleep(0.1)  # it is in its call by then
    for _ in range(10):
        with pytest.raises(RuntimeError, match="another thread is running this stream"):
            stream.step(x[0])
    assert thread.is_alive()
    thread.join()
    stream.step(x[0])


def test_autograd_notices_that_outputs_are_overwritten() -> None:
    stream, head = Stream(rnnfast.freeze(nn.LSTM(3, 4))), nn.Linear(4, 1)
    x = torch.randn(2, 3)
    loss = sum(head(stream.step(x_t)) for x_t in x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    stream.reset()
    sum(head(stream.step(x_t).clone()) for x_t in x).backward()
    out = torch.empty(2, 4)
    stream.run(x, out)
    assert out._version == 1


def test_outputs_in_the_place_of_inputs() -> None:
    frozen, x = rnnfast.freeze(nn.GRU(5, 5, num_layers=2)), torch.randn(130, 5)
    expected = Stream(frozen).run(x)
    buffer = x.clone()
    assert torch.equal(Stream(frozen).run(buffer, buffer), expected)
    with pytest.raises(RuntimeError, match="memory location"):
        Stream(frozen).run(buffer[:100], buffer[1:101])


@pytest.mark.parametrize("index", [0, 1])
def test_damaged_weights(index: int) -> None:
    def damaged(change: Any) -> Stream:
        frozen = rnnfast.freeze(nn.LSTM(3, 4))
        stream = Stream(frozen)
        change(frozen._blocks()[index])
        return stream

    for change in (
        lambda block: block.untyped_storage().resize_(0),
        lambda block: block.zero_(),
        lambda block: setattr(block, "data", block[:64].clone()),
    ):
        with pytest.raises(RuntimeError, match="freed or damaged"):
            damaged(change).step(torch.zeros(3))


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"rnnfast.freeze\(module\) makes one"):
        Stream(nn.LSTM(3, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bidirectional"):
        Stream(rnnfast.freeze(nn.LSTM(3, 4, bidirectional=True)))
    frozen = rnnfast.freeze(nn.LSTM(3, 4))
    for batch in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="positive number of sequences"):
            Stream(frozen, batch)  # type: ignore[arg-type]
    one, two = Stream(frozen), Stream(frozen, 2)
    x = torch.randn(3)
    grad = torch.randn(3, requires_grad=True)
    meta = torch.zeros(1, 1, 4, device="meta")
    for call, words in [
        (lambda: one.step(torch.randn(2)), r"input of shape \(1, 3\) or \(3\), got \[2\]"),
        (lambda: one.step(torch.randn(2, 3)), r"got \[2, 3\]"),
        (lambda: two.step(x), r"input of shape \(2, 3\), got \[3\]"),
        (lambda: two.run(torch.randn(5, 3)), r"input of shape \(T, 2, 3\), got \[5, 3\]"),
        (lambda: one.run(x), r"input of shape \(T, 1, 3\) or \(T, 3\), got \[3\]"),
        (lambda: one.step(x.double()), "input of float32, got Double"),
        (lambda: one.step(x, torch.empty(3)), r"out of shape \(1, 4\) or \(4\), got \[3\]"),
        (lambda: one.step(x, torch.empty(1, 4)), "same shape but for the last"),
        (lambda: one.run(torch.randn(5, 3), torch.empty(4, 4)), "same shape but for the last"),
        (lambda: one.step(x, torch.empty(8)[::2]), "out to be contiguous"),
        (lambda: one.step(grad), "no gradients"),
        (lambda: one.step(x.to("meta")), "plain tensors on the CPU"),
        (lambda: one.step(None), "plain tensors on the CPU"),  # type: ignore[arg-type]
        (lambda: setattr(one, "state", (torch.ones(1, 1, 4), meta)), "without memory"),
        (lambda: setattr(one, "state", torch.zeros(1, 1, 4)), "expected 2 states, got 1"),
        (lambda: setattr(one, "state", (torch.zeros(1, 4), 0)), r"Expected h of shape \(1, 1, 4\)"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            call()
    assert one.state[0].eq(0).all()
    with torch.no_grad():
        one.step(grad)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no derivatives"):
        one.step(forward_ad.make_dual(x, x))
    with pytest.raises(RuntimeError, match="plain tensors"), torch.autocast("cpu"):
        one.step(x)
    assert repr(two) == f"Stream({frozen!r}, batch=2)"
