"""Packed sequences."""

import pytest
import torch
from sequence_cases import (
    BACKENDS,
    LENGTHS,
    Watched,
    backends,
    modes,
    options,
    sample,
    two,
    ways,
    with_gradients,
)
from test_modules import EXPECT_FUSED, LAYERS, random_state, tensors
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

import rnnfast


class TestPacked:
    @ways
    @pytest.mark.parametrize("is_sorted", [False, True])
    @backends
    @options
    @modes
    def test_as_torch_nn(self, mode, options, backend, is_sorted, way):
        theirs, ours = two(mode, options, backend)
        x, hx = sample(mode, options)
        lengths = LENGTHS.sort(descending=True).values if is_sorted else LENGTHS
        outcomes = []
        for module in (theirs, ours):

            def call(module=module):
                first = module.batch_first
                packed = pack_padded_sequence(x, lengths, first, enforce_sorted=is_sorted)
                y, finals = module(packed, hx)
                assert isinstance(y, PackedSequence)
                assert torch.equal(y.batch_sizes, packed.batch_sizes)
                assert (y.sorted_indices is None) == is_sorted
                return y.data, finals

            if way == "general" and module is ours:
                with Watched():
                    outcomes.append(with_gradients(call, [x, *tensors(hx)], module))
            else:
                outcomes.append(with_gradients(call, [x, *tensors(hx)], module))
        torch.testing.assert_close(outcomes[1], outcomes[0])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @modes
    def test_without_state(self, mode, dtype):
        theirs, ours = two(mode, {}, dtype=dtype)
        packed = pack_sequence([torch.randn(n, 3, dtype=dtype) for n in (5, 2, 2)])
        for actual, expected in zip(
            tensors(ours(packed)[1]), tensors(theirs(packed)[1]), strict=True
        ):
            tolerance = {} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
            torch.testing.assert_close(actual, expected, **tolerance)

    @pytest.mark.skipif(not EXPECT_FUSED, reason="the extension is not expected")
    @modes
    def test_runs_on_the_fused_kernels(self, mode):
        _, ours = two(mode, {}, "fused")
        packed = pack_sequence([torch.randn(n, 3, dtype=torch.float64) for n in (5, 2)])
        with torch.profiler.profile() as profile:
            ours(packed)
        names = {event.name for event in profile.events()}
        cells = rnnfast.reference.CELLS
        assert names & set(cells) == {mode.lower().replace("rnn", "elman")}
        theirs = tuple(f"aten::{cell.aten}" for cell in cells.values())
        assert not any(name.startswith(("aten::mkldnn", *theirs)) for name in names)

    @modes
    def test_second_derivatives(self, mode):
        """Second derivatives through the short path, whose gradients Python differentiates."""
        _, ours = two(mode, {})
        lengths = [4, 2]
        x = torch.randn(4, 2, 3, dtype=torch.float64)
        data, *shape = pack_padded_sequence(x, lengths)
        data.requires_grad_()

        def call(data):
            return ours(PackedSequence(data, *shape))[0].data.sin()

        assert torch.autograd.gradgradcheck(call, data)
        torch.testing.assert_close(
            torch.autograd.functional.jacobian(call, data, vectorize=True),
            torch.autograd.functional.jacobian(call, data),
        )

    @pytest.mark.parametrize(
        "mode",
        [
            pytest.param(m, marks=[pytest.mark.full] * (m not in ("RNN_RELU", "LSTM")))
            for m in LAYERS
        ],
    )
    def test_in_compiled_code(self, mode):
        _, ours = two(mode, {})
        x, _ = sample(mode, {})

        def call(x):
            packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
            return pad_packed_sequence(ours(packed)[0])[0]

        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(call, backend="aot_eager")(x), call(x))

    def test_a_trace_holds_for_other_batches(self):
        _, ours = two("GRU", {})

        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.rnn = ours

            def forward(self, data, batch_sizes):
                return self.rnn(PackedSequence(data, batch_sizes))[0].data

        packed = [
            pack_sequence([torch.randn(n, 3, dtype=torch.float64) for n in lengths])
            for lengths in ((4, 2, 1), (5, 3))
        ]
        traced = torch.jit.trace(Model(), tuple(packed[0][:2]))
        for one in packed:
            torch.testing.assert_close(traced(*one[:2]), ours(one)[0].data)

    @pytest.mark.parametrize("backend", [*BACKENDS, "aten"])
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"batch_sizes": torch.tensor([3, 2])}, "sum to the rows of data, 6, got 5"),
            ({"batch_sizes": torch.tensor([3, 2, 2])}, "sum to the rows of data, 6, got 7"),
            ({"batch_sizes": torch.tensor([3, 2, 1, 0])}, "not rise and be at least 1, got"),
            ({"batch_sizes": torch.tensor([3, 1, 2])}, r"should not rise .* got \[3, 1, 2\]"),
            ({"batch_sizes": torch.tensor([3, 5, -2])}, "should not rise"),
            ({"batch_sizes": torch.tensor([2**40, 1])}, "sum to the rows of data"),
            ({"batch_sizes": torch.zeros(0).long()}, "length to be larger than 0"),
            ({"batch_sizes": torch.tensor([3, 2, 1]).int()}, "batch_sizes should be an int64"),
            ({"batch_sizes": torch.tensor([[3, 2, 1]])}, "batch_sizes should be an int64"),
            ({"batch_sizes": [3, 2, 1]}, "batch_sizes should be an int64"),
            ({"data": torch.zeros(())}, "data of a PackedSequence should be a tensor"),
            ({"data": [1.0]}, "data of a PackedSequence should be a tensor"),
            ({"sorted_indices": torch.tensor([0, 1])}, "sorted_indices should have 3 entries"),
            (
                {"sorted_indices": torch.tensor([1, 0, 2]).int()},
                "sorted_indices should be an int64",
            ),
            ({"sorted_indices": torch.zeros(3, device="meta").long()}, "on the data's device"),
            ({"sorted_indices": torch.tensor([1, 1, 2])}, "should undo sorted_indices"),
            ({"sorted_indices": torch.tensor([0, 1, 2])}, "should undo sorted_indices"),
            ({"sorted_indices": torch.tensor([9, 0, 2])}, "should undo sorted_indices"),
            ({"unsorted_indices": torch.tensor([1, 0, 9])}, "should be a permutation"),
            ({"unsorted_indices": torch.tensor([-1, 0, 1])}, "should be a permutation"),
            ({"unsorted_indices": torch.tensor([0, 0, 2])}, "should be a permutation"),
            ({"unsorted_indices": torch.tensor([0, 1])}, "unsorted_indices should have 3"),
            ({"unsorted_indices": None}, "unsorted_indices are missing"),
        ],
        ids=str,
    )
    def test_malformed(self, change, words, backend):
        _, ours = two("LSTM", {}, backend)
        sequences = [torch.randn(n, 3, dtype=torch.float64) for n in (2, 3, 1)]
        packed = pack_sequence(sequences, enforce_sorted=False)
        # the constructor would refuse or complete some of it
        packed = PackedSequence._make((packed._asdict() | change).values())
        with pytest.raises(RuntimeError, match=words):
            ours(packed)

    @pytest.mark.parametrize("enforce_sorted", [False, True])
    @pytest.mark.parametrize("backend", [*BACKENDS, "aten"])
    @pytest.mark.parametrize(("mode", "which"), [("GRU", 0), ("LSTM", 0), ("LSTM", 1)])
    @pytest.mark.parametrize("shape", [(1, 2, 4), (3, 2, 4), (2, 3, 4), (2, 2, 5), (2, 4), ()])
    def test_malformed_states(self, mode, shape, which, backend, enforce_sorted):
        """Bad h0 and c0; torch.nn.LSTM does not check c0's layers and reads past its end."""
        _, ours = two(mode, {"num_layers": 2}, backend)
        packed = pack_sequence(
            [torch.randn(n, 3, dtype=torch.float64) for n in (5, 2)], enforce_sorted
        )
        states = list(tensors(random_state(mode, 2, 2, 4)))
        states[which] = torch.zeros(shape, dtype=torch.float64)
        hx = tuple(states) if mode == "LSTM" else states[0]
        name = f"hidden[{which}]" if mode == "LSTM" else "hidden"
        with pytest.raises(RuntimeError) as caught:
            ours(packed, hx)
        assert str(caught.value) == f"Expected {name} size (2, 2, 4), got {list(shape)}"

    @pytest.mark.parametrize("backend", [*BACKENDS, "aten"])
    @pytest.mark.parametrize(
        ("mode", "state", "words"),
        [
            (mode, *case)
            for mode in ("GRU", "LSTM")
            for case in (
                (torch.zeros(1, 2, 4), "not the same dtype, found .* with torch.float32"),
                (torch.zeros(1, 2, 4).long(), "not the same dtype, found .* with torch.int64"),
                (torch.zeros(1, 2, 4, device="meta").double(), "hidden tensor at meta"),
                (torch.zeros(1, 2, 4).numpy(), "ndarray|'int' object is not callable"),
                (1.0, "'float' object has no|got float"),
                *[(None, "'NoneType' object has no|got NoneType")] * (mode == "LSTM"),
            )
        ],
        ids=str,
    )
    def test_states_of_another_kind(self, mode, state, words, backend):
        _, ours = two(mode, {}, backend)
        x = torch.randn(5, 2, 3, dtype=torch.float64)
        hx = (torch.zeros(1, 2, 4, dtype=torch.float64), state) if mode == "LSTM" else state
        for input in (x, pack_sequence([x[:, 0], x[:2, 1]])):
            with pytest.raises((RuntimeError, AttributeError, TypeError), match=words):
                ours(input, hx)
        of_one = words if not isinstance(state, torch.Tensor) else "For unbatched 2-D input, hx"
        with pytest.raises((RuntimeError, AttributeError), match=of_one):
            ours(x[:, 0], hx)

    @modes
    def test_errors_are_torch_nns(self, mode):
        """Errors are torch.nn's for padded sequences; its LSTM does not check packed ones."""
        theirs, ours = two(mode, {})
        x = torch.randn(5, 2, 3, dtype=torch.float64)
        packed = pack_padded_sequence(x, [5, 2])
        calls = [
            lambda m, x: m(x, random_state(mode, 1, 3, 4)),
            lambda m, x: m(x, random_state(mode, 2, 2, 4)),
            lambda m, x: m(x, random_state(mode, 1, 2, 5)),
            lambda m, x: m(
                x._replace(data=x.data[:, :2]) if isinstance(x, PackedSequence) else x[..., :2]
            ),
        ]
        for call in calls:
            with pytest.raises(RuntimeError) as expected:
                call(theirs, x)
            with pytest.raises(RuntimeError) as actual:
                call(ours, packed)
            assert str(actual.value) == str(expected.value)
        with pytest.raises((ValueError, RuntimeError), match="dtype"):
            ours(packed._replace(data=packed.data.float()))
