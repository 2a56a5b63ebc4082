"""Sequences of unequal length given by ``lengths``; resets; the c of every step; projections."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from covering import quick_values
from sequence_cases import (
    BACKENDS,
    LENGTHS,
    B,
    T,
    Watched,
    backends,
    modes,
    options,
    padded,
    sample,
    two,
    ways,
    with_gradients,
)
from test_modules import EXPECT_FUSED, LAYERS, tensors
from torch.func import functional_call, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from rnnfast import functional


class TestLengths:
    @ways
    @pytest.mark.parametrize("backend", [*BACKENDS, "aten"])
    @options
    @modes
    def test_as_packing(self, mode, options, backend, way):
        theirs, ours = two(mode, options, backend)
        x, hx = sample(mode, options)
        inputs = [x, *tensors(hx)]
        expected = with_gradients(lambda: padded(theirs, x, hx, LENGTHS), inputs, theirs)
        if way == "general":
            with Watched():
                actual = with_gradients(lambda: ours(x, hx, lengths=LENGTHS), inputs, ours)
        else:
            actual = with_gradients(lambda: ours(x, hx, lengths=LENGTHS), inputs, ours)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            tensors(ours(x, lengths=LENGTHS)), tensors(padded(theirs, x, None, LENGTHS))
        )

    @backends
    @modes
    def test_what_lies_beyond_does_not_matter(self, mode, backend):
        _, ours = two(mode, {"bidirectional": True}, backend)
        x, hx = sample(mode, {"bidirectional": True})
        beyond = torch.arange(T).unsqueeze(1) >= LENGTHS
        spoiled = x.detach().masked_fill(beyond.unsqueeze(2), float("nan")).requires_grad_()
        clean, dirty = (
            with_gradients(lambda x=x: ours(x, hx, lengths=LENGTHS), [x, *tensors(hx)], ours)
            for x in (x, spoiled)
        )
        torch.testing.assert_close(dirty, clean)
        y, d_x = clean[0], clean[2 + (mode == "LSTM")]
        assert (y[beyond] == 0).all()
        assert (d_x[beyond] == 0).all()
        assert (y[~beyond] != 0).any()

    @backends
    @modes
    def test_no_step_at_all(self, mode, backend):
        """A sequence of length 0 keeps its state, and passes the gradient on."""
        _, ours = two(mode, {"bidirectional": True}, backend)
        x, hx = sample(mode, {"bidirectional": True})
        y, finals = ours(x, hx, lengths=[0, 3, 0, 6])
        for final, initial in zip(tensors(finals), tensors(hx), strict=True):
            torch.testing.assert_close(final[:, [0, 2]], initial[:, [0, 2]])
            assert not torch.equal(final[:, 1], initial[:, 1])
        assert (y[:, [0, 2]] == 0).all()
        loss = sum(final.sum() for final in tensors(finals))
        for gradient in torch.autograd.grad(loss, tensors(hx)):
            assert (gradient[:, [0, 2]] == 1).all()
        torch.testing.assert_close(tensors(ours(x, hx, lengths=[0] * B)[1]), tensors(hx))

    def test_any_kind_of_integers(self):
        _, ours = two("GRU", {})
        x, _ = sample("GRU", {})
        expected = ours(x, lengths=LENGTHS)[0]
        spaced = LENGTHS.repeat_interleave(2)[::2]
        for lengths in (LENGTHS.tolist(), LENGTHS.to(torch.int32), LENGTHS.numpy(), spaced):
            assert torch.equal(ours(x, lengths=lengths)[0], expected)

    @pytest.mark.parametrize("kind", ["lengths", "reset"])
    def test_what_was_given_may_change(self, kind):
        """The backward uses the values at the time of the call."""
        _, ours = two("LSTM", {})
        x, _ = sample("LSTM", {})
        given = LENGTHS.numpy().copy() if kind == "lengths" else TestResets.reset.clone()
        y, _ = ours(x, **{kind: given})
        (expected,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        given[:] = 6 if kind == "lengths" else True
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected)

    def test_no_sequence_at_all(self):
        _, ours = two("GRU", {})
        x = torch.zeros(T, 0, 3, dtype=torch.float64)
        for name in BACKENDS:
            ours.backend = name
            assert ours(x, lengths=[])[0].shape == (T, 0, 4)

    def test_functional(self):
        for mode, function in zip(LAYERS, ("rnn", "rnn", "gru", "lstm"), strict=True):
            _, ours = two(mode, {})
            x, hx = sample(mode, {})
            own = {"nonlinearity": "relu"} if mode == "RNN_RELU" else {}
            weights = list(ours.parameters())
            found = getattr(functional, function)(x, hx, weights, lengths=LENGTHS, **own)
            torch.testing.assert_close(tensors(found), tensors(ours(x, hx, lengths=LENGTHS)))

    @pytest.mark.parametrize(
        ("lengths", "error", "words"),
        [
            ([1, 2, 3], RuntimeError, r"Expected lengths of shape \(4,\), got \[3\]"),
            ([[1, 2, 3, 4]], RuntimeError, "Expected lengths of shape"),
            ([1, 2, 3, 7], ValueError, "lengths should be between 0 and 6, got 7"),
            ([1, -2, 3, 4], ValueError, "lengths should be between 0 and 6, got -2"),
            ([1.0, 2.0, 3.0, 4.0], TypeError, "lengths should be integers, got torch.float32"),
            ([True] * 4, TypeError, "lengths should be integers, got torch.bool"),
        ],
    )
    @backends
    def test_errors(self, backend, lengths, error, words):
        _, ours = two("LSTM", {}, backend)
        with pytest.raises(error, match=words):
            ours(torch.zeros(T, B, 3, dtype=torch.float64), lengths=lengths)

    def test_a_batch_is_needed(self):
        _, ours = two("LSTM", {})
        with pytest.raises(RuntimeError, match="lengths need a batch"):
            ours(torch.zeros(T, 3, dtype=torch.float64), lengths=[2])
        packed = pack_sequence([torch.zeros(2, 3, dtype=torch.float64)])
        with pytest.raises(RuntimeError, match="need a tensor as input, got a PackedSequence"):
            ours(packed, lengths=[2])

    def test_forced_aten_knows_no_empty_sequence(self):
        _, ours = two("LSTM", {}, "aten")
        with pytest.raises(RuntimeError, match="torch's kernels have no reset"):
            ours(torch.zeros(T, B, 3, dtype=torch.float64), lengths=[0, 1, 2, 3])


def episodes(module, x, hx, reset):
    """Runs one module call per piece between resets, one sequence at a time, from zero states."""
    outputs, finals = [], []
    for b in range(B):
        state = [s[:, b] for s in tensors(hx)]
        edges = sorted({0, T, *(t for t in range(T) if reset[t, b])})
        pieces = []
        for begin, end in pairwise(edges):
            if reset[begin, b]:
                state = [torch.zeros_like(s) for s in state]
            y, final = module(x[begin:end, b], tuple(state) if len(state) > 1 else state[0])
            state = tensors(final)
            pieces.append(y)
        outputs.append(torch.cat(pieces))
        finals.append(state)
    joined = tuple(torch.stack(states, 1) for states in zip(*finals, strict=True))
    return torch.stack(outputs, 1), joined


class TestResets:
    reset = torch.tensor(
        [[0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 1]]
    ).bool()

    @ways
    @backends
    @pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"recompute": True}], ids=str)
    @modes
    def test_as_separate_episodes(self, mode, options, backend, way):
        theirs, ours = two(mode, options, backend)
        x, hx = sample(mode, options)
        inputs = [x, *tensors(hx)]
        expected = with_gradients(lambda: episodes(theirs, x, hx, self.reset), inputs, theirs)
        if way == "general":
            with Watched():
                actual = with_gradients(lambda: ours(x, hx, reset=self.reset), inputs, ours)
        else:
            actual = with_gradients(lambda: ours(x, hx, reset=self.reset), inputs, ours)
        torch.testing.assert_close(actual, expected)

    @backends
    @modes
    def test_nothing_passes_a_reset(self, mode, backend):
        """In both directions, whatever the values on the other side."""
        options = {"bidirectional": True, "batch_first": True, "num_layers": 2}
        _, ours = two(mode, options, backend)
        x, hx = sample(mode, options)
        reset = torch.zeros(B, T, dtype=torch.bool)
        reset[:, 3] = True
        y, _ = ours(x, hx, reset=reset)
        (d_x,) = torch.autograd.grad(y[:, 3:].sin().sum(), x, retain_graph=True)
        assert (d_x[:, :3] == 0).all()
        assert (d_x[:, 3:] != 0).any()
        (d_x,) = torch.autograd.grad(y[:, :3].sin().sum(), x)
        assert (d_x[:, 3:] == 0).all()
        assert (d_x[:, :3] != 0).any()
        for part in (slice(0, 3), slice(3, T)):
            changed = x.detach().clone()
            changed[:, [t for t in range(T) if t not in range(T)[part]]] = 7
            torch.testing.assert_close(ours(changed, hx, reset=reset)[0][:, part], y[:, part])

    @backends
    @modes
    def test_with_lengths(self, mode, backend):
        """Steps beyond the end have no effect, and neither have their resets."""
        _, ours = two(mode, {"bidirectional": True}, backend)
        x, hx = sample(mode, {"bidirectional": True})
        y, finals = ours(x, hx, lengths=LENGTHS, reset=self.reset)
        for b, length in enumerate(LENGTHS):
            one = [s[:, b] for s in tensors(hx)]
            alone, final = ours(
                x[:length, b],
                tuple(one) if len(one) > 1 else one[0],
                reset=self.reset[:length, b],
            )
            torch.testing.assert_close(y[:length, b], alone)
            torch.testing.assert_close([s[:, b] for s in tensors(finals)], tensors(final))

    def test_errors(self):
        _, ours = two("GRU", {"batch_first": True})
        x = torch.zeros(B, T, 3, dtype=torch.float64)
        with pytest.raises(RuntimeError, match=r"Expected reset of shape \(4, 6\), got \[6, 4\]"):
            ours(x, reset=torch.zeros(T, B).bool())
        with pytest.raises(TypeError, match="reset should be booleans"):
            ours(x, reset=torch.zeros(B, T))
        expected = ours(x, reset=torch.ones(B, T).bool())[0]
        assert torch.equal(ours(x, reset=[[True] * T] * B)[0], expected)
        with pytest.raises(RuntimeError, match="not at the same device"):
            ours(x, reset=torch.zeros(B, T, device="meta").bool())
        packed = pack_sequence([x[0]])
        with pytest.raises(RuntimeError, match="need a tensor as input, got a PackedSequence"):
            ours(packed, reset=torch.zeros(1, T).bool())
        _, ours = two("GRU", {}, "aten")
        with pytest.raises(RuntimeError, match="torch's kernels have no reset"):
            ours(x, reset=torch.zeros(B, T).bool())


class TestCellStates:
    @backends
    def test_of_every_step(self, backend):
        options = {"num_layers": 2, "bidirectional": True, "batch_first": True}
        _, ours = two("LSTM", options, backend)
        x, hx = sample("LSTM", options)
        y, (h_n, c_n), cells = ours(x, hx, return_cells=True)
        assert cells.shape == y.shape
        torch.testing.assert_close(cells[:, -1, :4], c_n[2])
        torch.testing.assert_close(cells[:, 0, 4:], c_n[3])
        torch.testing.assert_close((y, (h_n, c_n)), ours(x, hx))

    @pytest.mark.parametrize("extras", ["", "lengths", "reset"])
    @backends
    def test_gradients(self, backend, extras):
        _, ours = two("LSTM", {}, backend)
        x, hx = sample("LSTM", {})
        more = {"lengths": LENGTHS} if extras == "lengths" else {}
        more |= {"reset": TestResets.reset} if extras == "reset" else {}
        ours.backend = "reference"
        expected = with_gradients(
            lambda: ours(x, hx, return_cells=True, **more), [x, *tensors(hx)], ours
        )
        ours.backend = backend
        actual = with_gradients(
            lambda: ours(x, hx, return_cells=True, **more), [x, *tensors(hx)], ours
        )
        torch.testing.assert_close(actual, expected)

    @backends
    def test_packed(self, backend):
        _, ours = two("LSTM", {}, backend)
        x, _ = sample("LSTM", {})
        packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
        _, _, cells = ours(packed, return_cells=True)
        expected = ours(x, lengths=LENGTHS, return_cells=True)[2]
        torch.testing.assert_close(pad_packed_sequence(cells)[0], expected)

    def test_dtype_is_the_inputs(self):
        _, ours = two("LSTM", {}, dtype=torch.bfloat16)
        x = torch.randn(T, B, 3, dtype=torch.bfloat16)
        with torch.no_grad():
            assert ours(x, return_cells=True)[2].dtype == torch.bfloat16
        assert ours(x[:, 0], return_cells=True)[2].shape == (T, 4)

    def test_errors(self):
        x = torch.zeros(T, B, 3, dtype=torch.float64)
        with pytest.raises(ValueError, match="only supported for LSTM, not GRU"):
            two("GRU", {})[1](x, return_cells=True)
        with pytest.raises(RuntimeError, match="torch's kernels have no reset"):
            two("LSTM", {}, "aten")[1](x, return_cells=True)


class TestProjection:
    """``proj_size``: h has fewer features than c."""

    @staticmethod
    def pair(backend, **options):
        return two("LSTM", {"proj_size": 2, **options}, backend)

    @staticmethod
    def state(rows, *batch):
        return tuple(
            torch.randn(rows, *batch, size, dtype=torch.float64, requires_grad=True)
            for size in (2, 4)
        )

    @ways
    @pytest.mark.parametrize("backend", [*BACKENDS, "aten"])
    @options
    def test_as_torch_nn(self, options, backend, way):
        theirs, ours = self.pair(backend, **options)
        x, hx = sample("LSTM", options)
        hx = self.state(hx[0].shape[0], B)
        inputs = [x, *hx]
        expected = with_gradients(lambda: theirs(x, hx), inputs, theirs)
        if way == "general":
            with Watched():
                actual = with_gradients(lambda: ours(x, hx), inputs, ours)
        else:
            actual = with_gradients(lambda: ours(x, hx), inputs, ours)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(tensors(ours(x)), tensors(theirs(x)))
        single = (hx[0][:, 0], hx[1][:, 0])
        torch.testing.assert_close(tensors(ours(x[:, 0], single)), tensors(theirs(x[:, 0], single)))

    @ways
    @pytest.mark.parametrize("backend", [*BACKENDS, "aten"])
    def test_packed_and_lengths(self, backend, way):
        theirs, ours = self.pair(backend, bidirectional=True, num_layers=2)
        x, hx = sample("LSTM", {})[0], self.state(4, B)
        inputs = [x, *hx]
        expected = with_gradients(lambda: padded(theirs, x, hx, LENGTHS), inputs, theirs)
        calls = [lambda: padded(ours, x, hx, LENGTHS), lambda: ours(x, hx, lengths=LENGTHS)]
        for call in calls:
            if way == "general":
                with Watched():
                    actual = with_gradients(call, inputs, ours)
            else:
                actual = with_gradients(call, inputs, ours)
            torch.testing.assert_close(actual, expected)

    @backends
    def test_resets_and_cells(self, backend):
        theirs, ours = self.pair(backend)
        x, hx = sample("LSTM", {})[0], self.state(1, B)
        expected = episodes(theirs, x, hx, TestResets.reset)
        y, finals, cells = ours(x, hx, reset=TestResets.reset, return_cells=True)
        torch.testing.assert_close(tensors((y, finals)), tensors(expected))
        assert cells.shape == (T, B, 4)
        torch.testing.assert_close(cells[-1], finals[1][0])

    @backends
    def test_functional(self, backend):
        theirs, _ = self.pair(None, num_layers=2)
        x, hx = sample("LSTM", {})[0], self.state(2, B)
        weights = list(theirs.parameters())
        found = functional.lstm(x, hx, weights, num_layers=2, proj_size=2, backend=backend)
        torch.testing.assert_close(tensors(found), tensors(theirs(x, hx)))
        with pytest.raises(RuntimeError, match=r"Expected w_hr size \(3, 4\), got \[2, 4\]"):
            functional.lstm(x, None, weights, num_layers=2, proj_size=3, backend=backend)

    @pytest.mark.skipif(not EXPECT_FUSED, reason="the extension is not expected")
    def test_compile_and_second_derivatives(self):
        torch._dynamo.reset()
        theirs, ours = self.pair("fused")
        x, hx = sample("LSTM", {})[0], self.state(1, B)
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        expected = with_gradients(lambda: theirs(x, hx), [x, *hx], theirs)
        actual = with_gradients(lambda: compiled(x, hx), [x, *hx], ours)
        torch.testing.assert_close(actual, expected)
        outcomes = []
        for name in ("reference", "fused"):
            ours.backend = name
            loss = sum(result.sin().sum() for result in tensors(ours(x, hx)))
            first = torch.autograd.grad(loss, [x, *ours.parameters()], create_graph=True)
            second = sum(gradient.pow(2).sum() for gradient in first)
            outcomes.append(torch.autograd.grad(second, [x, *ours.parameters()]))
        torch.testing.assert_close(outcomes[1], outcomes[0])


EXTRAS = {
    "lengths": {"lengths": LENGTHS},
    "reset": {"reset": TestResets.reset},
    "both": {"lengths": LENGTHS, "reset": TestResets.reset},
}
extras = pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS.keys())


class TestTransforms:
    """Function transforms work as with plain calls."""

    @extras
    @modes
    def test_second_derivatives(self, mode, extras):
        _, ours = two(mode, {})
        x, hx = sample(mode, {})
        inputs = [x, *tensors(hx)]
        outcomes = []
        for name in ("reference", None):
            ours.backend = name
            loss = sum(result.sin().sum() for result in tensors(ours(x, hx, **extras)))
            first = torch.autograd.grad(loss, [*inputs, *ours.parameters()], create_graph=True)
            second = sum(gradient.pow(2).sum() for gradient in first)
            outcomes.append(torch.autograd.grad(second, [*inputs, *ours.parameters()]))
        torch.testing.assert_close(outcomes[1], outcomes[0])

    @extras
    @modes
    def test_jvp_and_vmap(self, mode, extras):
        _, ours = two(mode, {})
        x, hx = sample(mode, {})
        x = x.detach()

        def call(x):
            return ours(x, hx, **extras)[0]

        direction = torch.randn_like(x)
        step = 1e-6 * direction
        _, tangent = jvp(call, (x,), (direction,))
        torch.testing.assert_close(
            tangent, (call(x + step) - call(x - step)) / 2e-6, atol=1e-7, rtol=1e-6
        )
        several = torch.randn(3, *x.shape, dtype=x.dtype)
        expected = torch.stack([call(one) for one in several])
        torch.testing.assert_close(vmap(call)(several), expected)

    @quick_values(mode=[*LAYERS], extras=[*EXTRAS.values()])
    @pytest.mark.skipif(not EXPECT_FUSED, reason="the extension is not expected")
    def test_compile(self, mode, extras):
        torch._dynamo.reset()
        _, ours = two(mode, {"bidirectional": True})
        x, hx = sample(mode, {"bidirectional": True})
        more = extras | ({"return_cells": True} if mode == "LSTM" else {})
        compiled = torch.compile(partial(ours, **more), backend="aot_eager", fullgraph=True)
        expected = with_gradients(lambda: ours(x, hx, **more), [x, *tensors(hx)], ours)
        actual = with_gradients(lambda: compiled(x, hx), [x, *tensors(hx)], ours)
        torch.testing.assert_close(actual, expected)

    def test_functional_call_and_autocast(self):
        _, ours = two("LSTM", {}, dtype=torch.float32)
        x = torch.randn(T, B, 3)
        values = {name: value * 2 for name, value in ours.named_parameters()}
        found = functional_call(ours, values, (x,), {"lengths": LENGTHS})[0]
        ours.load_state_dict(values)
        torch.testing.assert_close(found, ours(x, lengths=LENGTHS)[0])
        with torch.autocast("cpu", torch.bfloat16):
            y, _, cells = ours(x, lengths=LENGTHS, return_cells=True)
        assert y.dtype == cells.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), found, atol=2e-2, rtol=2e-2)
