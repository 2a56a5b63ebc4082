"""Frozen modules: their values, their saved weights, and what they refuse.

The oracle of a frozen module is torch.nn's in float64 with the weights as they were rounded. That
of int8 also rounds inputs and states, as the kernels do: see `int8_oracle`.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from targets import check_on, running_on
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnfast
from rnnfast import backend
from rnnfast.frozen import TYPES, FrozenCell, FrozenLayers
from rnnfast.reference import CELLS

INSTRUCTION_SETS = [] if backend.EXTENSION is None else backend.EXTENSION.cpu_capabilities()
BOUND = {"float32": 2e-6, "bfloat16": 2e-6, "float16": 2e-6, "int8": 1e-3}
"""The largest error relative to the oracle without rounded states, of values of size 1."""
KINDS: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (nn.LSTM, {}),
    (nn.GRU, {}),
    (nn.RNN, {}),
    (nn.RNN, {"nonlinearity": "relu"}),
    (nn.LSTM, {"proj_size": 5}),
    (nn.GRU, {"bias": False}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 3, "batch_first": True}),
]
SIZES = [(4, 3, 9, 20), (7, 1, 1, 6), (3, 20, 33, 70), (1, 2, 64, 16), (5, 40, 2, 129)]
"""(T, B, I, H): below, at and beyond whole vectors, tiles and pairs."""
every_type = pytest.mark.parametrize("weights", TYPES)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def double_of(module: nn.Module, frozen: nn.Module) -> nn.Module:
    """torch.nn's module in float64 with the rounded weights of a frozen one."""
    rounded = {name: each.dense() for name, each in frozen.unpacked().items()}
    result = copy.deepcopy(module)
    result.load_state_dict({**module.state_dict(), **rounded})
    return result.double()


def tensors_of(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return [tensor for part in results for tensor in tensors_of(part)]


def assert_near(results: Any, expected: Any, bound: float) -> None:
    for one, other in zip(tensors_of(results), tensors_of(expected), strict=True):
        assert one.shape == other.shape
        assert one.dtype is torch.float32
        torch.testing.assert_close(one.double(), other.double(), rtol=bound, atol=bound)


def states_for(module: nn.Module, batch: int) -> Any:
    rows = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(rows, batch, module.proj_size or module.hidden_size)
    return (h, torch.randn(rows, batch, module.hidden_size)) if module.mode == "LSTM" else h


@every_type
@pytest.mark.parametrize(
    ("kind", "options"), KINDS, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_values(kind: type[nn.Module], options: dict[str, Any], weights: str) -> None:
    for T, B, I, H in SIZES:
        module = kind(I, H, **options).requires_grad_(False)
        x = torch.randn(B, T, I) if module.batch_first else torch.randn(T, B, I)
        hx = states_for(module, B)

        def check(_: str, module: nn.Module = module, x: Tensor = x, hx: Any = hx) -> None:
            frozen = rnnfast.freeze(module, weights)
            oracle = double_of(module, frozen)
            doubles = tuple(s.double() for s in hx) if isinstance(hx, tuple) else hx.double()
            for states, expected in ((None, oracle(x.double())), (hx, oracle(x.double(), doubles))):
                results = frozen(x, states)
                assert results[0].abs().max() > 1e-3
                assert_near(results, expected, BOUND[weights])

        check_on(INSTRUCTION_SETS, check)


@every_type
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(kind: type[nn.Module], weights: str) -> None:
    for (_, B, I, H), bias in product(SIZES, [True, False]):
        cell = kind(I, H, bias=bias).requires_grad_(False)
        x, h, c = torch.randn(B, I), torch.randn(B, H), torch.randn(B, H)
        hx = (h, c) if kind is nn.LSTMCell else h

        def check(_: str, cell: nn.Module = cell, x: Tensor = x, hx: Any = hx) -> None:
            frozen = rnnfast.freeze(cell, weights)
            assert isinstance(frozen, FrozenCell)
            oracle = double_of(cell, frozen)
            doubles = tuple(s.double() for s in hx) if isinstance(hx, tuple) else hx.double()
            assert_near(frozen(x, hx), oracle(x.double(), doubles), BOUND[weights])
            assert_near(frozen(x), oracle(x.double()), BOUND[weights])
            one = tuple(s[0] for s in hx) if isinstance(hx, tuple) else hx[0]
            first = oracle(x.double(), doubles)
            first = tuple(s[0] for s in first) if isinstance(first, tuple) else first[0]
            assert_near(frozen(x[0], one), first, BOUND[weights])

        check_on(INSTRUCTION_SETS, check)


def rounded_to_13_bits(rows: Tensor) -> Tensor:
    """Rows as the kernels quantise them: to 4095 steps of their largest number."""
    scale = rows.abs().amax(-1, keepdim=True) / 4095
    return torch.where(scale > 0, (rows / scale).round() * scale, 0)


def int8_oracle(module: nn.Module, frozen: FrozenLayers, x: Tensor) -> Tensor:
    """A layer in float64 with rounded weights, inputs and states."""
    cell = CELLS["lstm" if module.mode == "LSTM" else "gru"]
    w = {name: (each.dense().double(), each.bias) for name, each in frozen.unpacked().items()}
    w_ih, b_ih = w["weight_ih_l0"]
    w_hh, b_hh = w["weight_hh_l0"]
    states = (torch.zeros(x.shape[1], module.hidden_size, dtype=torch.double),) * cell.states
    outputs = []
    for x_t in x.double():
        gates_x = rounded_to_13_bits(x_t) @ w_ih.T + b_ih.double()
        gates_h = rounded_to_13_bits(states[0]) @ w_hh.T + b_hh.double()
        states = cell.step(gates_x, gates_h, *states)
        outputs.append(states[0])
    return torch.stack(outputs)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_int8_is_exact_but_for_what_it_rounds(kind: type[nn.Module]) -> None:
    for T, B, I, H in SIZES:
        module, x = kind(I, H).requires_grad_(False), torch.randn(T, B, I)

        def check(_: str, module: nn.Module = module, x: Tensor = x) -> None:
            frozen = rnnfast.freeze(module, "int8")
            # A state may be rounded to the other side, which is worth 1/4095 of one weight.
            assert_near(frozen(x)[0], int8_oracle(module, frozen, x), 2e-4)

        check_on(INSTRUCTION_SETS, check)


def test_int8_does_not_saturate() -> None:
    """Sums of as many and as large integers as there can be, over several chains of them."""
    for K in (4095, 4096, 4097, 9001):
        cell = nn.RNNCell(K, 3, bias=False, nonlinearity="relu").requires_grad_(False)
        cell.weight_ih[0], cell.weight_ih[1], cell.weight_ih[2] = 1, -1, 0.5
        x = torch.ones(2, K)
        x[1, ::2] = -1

        def check(_: str, K: int = K, x: Tensor = x, cell: nn.Module = cell) -> None:
            result = rnnfast.freeze(cell, "int8")(x)
            odd = K % 2
            expected = torch.tensor([[K, 0, K / 2], [0, odd, 0]])
            torch.testing.assert_close(result, expected.float(), rtol=1e-6, atol=2e-4)

        check_on(INSTRUCTION_SETS, check)


def test_int8_error_after_200_steps() -> None:
    """At most what the most exact int8 layer of others loses: 1.4 % of the outputs."""
    for kind, (H, B) in product((nn.LSTM, nn.GRU), ((64, 4), (512, 2))):
        module, x = kind(H, H), torch.randn(200, B, H)
        (row,) = rnnfast.quantize_error(module, x)
        assert 1e-5 < row.relative < 0.014


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_int8_row_that_is_not_finite(value: float) -> None:
    """It gives what float32 gives, and no other row changes."""
    module = nn.LSTM(40, 36).requires_grad_(False)
    x = torch.randn(3, 7, 40)
    x[1, 2, 5] = value

    def check(_: str) -> None:
        frozen = rnnfast.freeze(module, "int8")
        dense = copy.deepcopy(module)
        dense.load_state_dict(
            {**module.state_dict(), **{n: w.dense() for n, w in frozen.unpacked().items()}}
        )
        found, expected = frozen(x)[0], dense(x)[0]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3, equal_nan=True)
        others = [0, 1, 3, 4, 5, 6]
        assert torch.equal(found[:, others], frozen(x[:, others])[0])
        h = torch.zeros(1, 7, 36)
        h[0, 3, 1] = value
        found, expected = (m(x[:1], (h, torch.zeros(1, 7, 36)))[0] for m in (frozen, dense))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3, equal_nan=True)

    check_on(INSTRUCTION_SETS, check)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_int8_weights_that_are_not_finite(value: float) -> None:
    cell = nn.RNNCell(5, 6).requires_grad_(False)
    cell.weight_ih[2, 3] = value
    result = rnnfast.freeze(cell, "int8")(torch.randn(4, 5))
    assert result[:, 2].isnan().all()
    assert result[:, [0, 1, 3, 4, 5]].isfinite().all()


def test_rows_without_a_scale() -> None:
    """Zeros, and numbers too small to be divided by."""
    cell = nn.RNNCell(5, 4, bias=False).requires_grad_(False)
    cell.weight_ih[0] = 0
    cell.weight_ih[1] = 1e-44
    x = torch.randn(3, 5)
    x[1], x[2] = 0, 1e-40
    for name in INSTRUCTION_SETS:
        with running_on(name):
            result = rnnfast.freeze(cell, "int8")(x)
            assert result[:, :2].abs().max() < 1e-30
            assert result[1:].abs().max() < 1e-30
            assert result[0, 2:].abs().min() > 1e-4


@every_type
def test_bits_do_not_depend_on_threads_or_the_batch(weights: str, threads: None) -> None:
    for kind in (nn.LSTM, nn.GRU):
        module, x = kind(33, 72).requires_grad_(False), torch.randn(6, 23, 33)
        for name in INSTRUCTION_SETS:
            with running_on(name):
                frozen = rnnfast.freeze(module, weights)
                torch.set_num_threads(1)
                y, _ = frozen(x)
                assert torch.equal(torch.cat([frozen(x[:, :5])[0], frozen(x[:, 5:])[0]], 1), y)
                assert torch.equal(frozen(x[:, 3:4])[0], y[:, 3:4])
                for count in (2, 3, 4):
                    torch.set_num_threads(count)
                    assert torch.equal(frozen(x)[0], y)


def calls_of(options: dict[str, Any]) -> list[Callable[[nn.Module], Any]]:
    """Calls of LSTM(9, 20) with sequences of unequal length, resets, and single sequences."""
    time_first = not options.get("batch_first")
    x = torch.randn(6, 4, 9) if time_first else torch.randn(4, 6, 9)
    lengths = torch.tensor([6, 2, 0, 4])
    reset = torch.rand(x.shape[:2]) < 0.3
    packed = pack_padded_sequence(
        torch.randn(6, 4, 9), torch.tensor([3, 6, 1, 2]), enforce_sorted=False
    )
    return [
        lambda module: module(x, lengths=lengths),
        lambda module: module(x, reset=reset),
        lambda module: module(x, lengths=lengths, reset=reset),
        lambda module: module(x[0]),
        lambda module: module(x[0], reset=reset[0]),
        lambda module: [pad_packed_sequence(module(packed)[0])[0], module(packed)[1]],
        lambda module: module(x[:, :0] if time_first else x[:0]),
        lambda module: module(x.transpose(0, 2).contiguous().transpose(0, 2)),
    ]


@every_type
@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True, "num_layers": 2}, {"batch_first": True}, {"proj_size": 6}],
    ids=str,
)
def test_lengths_resets_packed_and_single_sequences(options: dict[str, Any], weights: str) -> None:
    module, plain = (rnnfast.LSTM(9, 20, **options).requires_grad_(False) for _ in range(2))
    calls = calls_of(options)

    def check(_: str) -> None:
        frozen = rnnfast.freeze(module, weights)
        rounded = {name: each.dense() for name, each in frozen.unpacked().items()}
        plain.load_state_dict({**module.state_dict(), **rounded})
        for call in calls:
            assert_near(call(frozen), call(plain), BOUND[weights])

    check_on(INSTRUCTION_SETS, check)


def test_embedding() -> None:
    module, table = rnnfast.GRU(8, 16), nn.Embedding(30, 8).requires_grad_(False)
    tokens = torch.randint(30, (5, 3))
    frozen = rnnfast.freeze(module)
    assert_near(frozen(tokens, embedding=table), frozen(table(tokens)), 0)


# ---- saved weights ----


@every_type
def test_state_dict_is_the_same_for_every_instruction_set(weights: str) -> None:
    module = nn.LSTM(9, 21, num_layers=2, bidirectional=True, proj_size=4)
    x = torch.randn(4, 3, 9)
    saved, outputs = {}, {}
    for name in INSTRUCTION_SETS:
        with running_on(name):
            frozen = rnnfast.freeze(module, weights)
            saved[name], outputs[name] = frozen.state_dict(), frozen(x)[0]
    for one, other in product(INSTRUCTION_SETS, INSTRUCTION_SETS):
        with running_on(other):
            frozen = rnnfast.freeze(nn.LSTM(9, 21, 2, bidirectional=True, proj_size=4), weights)
            assert not torch.equal(frozen(x)[0], outputs[other])
            frozen.load_state_dict(saved[one])
            assert torch.equal(frozen(x)[0], outputs[other])
    first = saved[INSTRUCTION_SETS[0]]
    assert first["weight_ih_l0"].dtype is TYPES[weights]
    assert ("weight_ih_l0_scale" in first) is (weights == "int8")
    without_scales = {name: value for name, value in first.items() if "_scale" not in name}
    assert {n: v.shape for n, v in without_scales.items()} == {
        n: v.shape for n, v in module.state_dict().items()
    }


@every_type
def test_other_instruction_set_than_at_freezing(weights: str) -> None:
    """As for a pickle from another machine."""
    module, x = nn.GRU(9, 21), torch.randn(4, 3, 9)
    for one, other in product(INSTRUCTION_SETS, INSTRUCTION_SETS):
        with running_on(one):
            frozen = rnnfast.freeze(module, weights)
            stored = pickle.dumps(frozen)
        with running_on(other):
            expected = rnnfast.freeze(module, weights)(x)[0]
            assert torch.equal(frozen(x)[0], expected)
            assert torch.equal(pickle.loads(stored)(x)[0], expected)


@every_type
def test_copies(weights: str) -> None:
    module, x = nn.Sequential(nn.LSTM(9, 21)), torch.randn(4, 3, 9)
    frozen = rnnfast.freeze(module, weights)
    file = io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    y = frozen(x)[0]
    for other in (
        copy.deepcopy(frozen),
        pickle.loads(pickle.dumps(frozen)),
        torch.load(file, weights_only=False),
        copy.deepcopy(frozen).share_memory(),
    ):
        assert torch.equal(other(x)[0], y)
    assert next(copy.deepcopy(frozen).share_memory().buffers()).is_shared()


def test_loading_takes_weights_that_are_not_frozen() -> None:
    one, other, x = nn.LSTM(9, 21), nn.LSTM(9, 21), torch.randn(4, 3, 9)
    for weights in TYPES:
        frozen, expected = rnnfast.freeze(one, weights), rnnfast.freeze(other, weights)
        frozen.load_state_dict(other.state_dict())
        assert torch.equal(frozen(x)[0], expected(x)[0])
        for source in TYPES:  # saved in one type, loaded in another
            frozen.load_state_dict(rnnfast.freeze(other, source).state_dict())
            assert_near(frozen(x)[0], expected(x)[0], 0.02)


@every_type
def test_loading_needs_no_float32_weights(weights: str) -> None:
    module, x = nn.LSTM(9, 21, num_layers=2), torch.randn(4, 3, 9)
    with torch.device("meta"):
        frozen = rnnfast.freeze(nn.LSTM(9, 21, num_layers=2), weights)
    assert frozen(x)[0].isnan().all()
    frozen.load_state_dict(rnnfast.freeze(module, weights).state_dict())
    assert_near(frozen(x), rnnfast.freeze(module, weights)(x), 0)


def test_what_loading_refuses() -> None:
    frozen = rnnfast.freeze(nn.Sequential(nn.GRU(9, 21)), "int8")
    good = frozen.state_dict()
    before = frozen(torch.ones(2, 1, 9))[0]
    for change, words in (
        (lambda d: d.pop("0.weight_hh_l0_scale"), 'Missing key.*"0.weight_hh_l0_scale"'),
        (lambda d: d.pop("0.bias_ih_l0"), 'Missing key.*"0.bias_ih_l0"'),
        (lambda d: d.update({"0.other": torch.ones(1)}), 'Unexpected key.*"0.other"'),
        (
            lambda d: d.update({"0.weight_ih_l0": torch.ones(63, 8)}),
            r"0.weight_ih_l0: expected size \(63, 9\), got \[63, 8\]",
        ),
        (
            lambda d: d.update({"0.weight_ih_l0_scale": torch.ones(3)}),
            r"0.weight_ih_l0_scale: expected size \(63,\), got \[3\]",
        ),
        (
            lambda d: d.update({"0.weight_ih_l0": torch.ones(63, 9, dtype=torch.int64)}),
            "expected floating-point or int8 numbers, got torch.int64",
        ),
    ):
        changed = dict(good)
        change(changed)
        with pytest.raises(RuntimeError, match=words):
            frozen.load_state_dict(changed)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"0.junk.a"'):
        frozen.load_state_dict({**good, "0.junk.a": torch.ones(1)})
    with pytest.raises(RuntimeError, match="bias_ih_l0: expected a tensor with memory, got list"):
        frozen.load_state_dict({**good, "0.bias_ih_l0": [0.0] * 63})
    with pytest.raises(RuntimeError, match=r"expected floating-point numbers, got torch.complex64"):
        frozen.load_state_dict({**good, "0.bias_ih_l0": torch.ones(63, dtype=torch.complex64)})
    frozen.load_state_dict(good)
    assert torch.equal(frozen(torch.ones(2, 1, 9))[0], before)


@every_type
def test_loading_a_part(weights: str) -> None:
    """With strict=False what is there is loaded, and the rest is named and stays."""
    one, other = nn.GRU(9, 21), nn.GRU(9, 21)
    frozen, x = rnnfast.freeze(one, weights), torch.randn(4, 3, 9)
    hooked = []
    frozen.register_load_state_dict_pre_hook(lambda *_: hooked.append(True))
    for name in ("weight_ih_l0", "bias_hh_l0"):
        missing, unexpected = frozen.load_state_dict({name: getattr(other, name)}, strict=False)
        assert name not in missing
        assert len(missing) >= 3
        assert not unexpected
    mixed = copy.deepcopy(one)
    mixed.load_state_dict(
        {"weight_ih_l0": other.weight_ih_l0, "bias_hh_l0": other.bias_hh_l0}, strict=False
    )
    assert torch.equal(frozen(x)[0], rnnfast.freeze(mixed, weights)(x)[0])
    assert hooked == [True, True]


def test_loading_writes_into_shared_memory() -> None:
    frozen, other = (rnnfast.freeze(nn.GRU(9, 21), "int8") for _ in range(2))
    block = frozen.share_memory().packed_hh_l0
    frozen.load_state_dict(other.state_dict())
    assert frozen.packed_hh_l0 is block
    assert torch.equal(block, other.packed_hh_l0)


def test_memory() -> None:
    module = nn.LSTM(512, 512, num_layers=2)
    floats = sum(p.nbytes for p in module.parameters())
    for weights, share in (
        ("float32", 1.01),
        ("bfloat16", 0.51),
        ("float16", 0.51),
        ("int8", 0.27),
    ):
        frozen = rnnfast.freeze(module, weights)
        assert not list(frozen.parameters())
        assert sum(b.nbytes for b in frozen.buffers()) < share * floats


# ---- models ----


class Model(nn.Module):
    """With recurrent layers at several places, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.layers = nn.ModuleList([rnnfast.LSTM(8, 16), nn.GRU(16, 16)])
        self.again = self.layers[1]
        self.cell = nn.GRUCell(16, 16)
        self.dropout = nn.Dropout(0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        y, _ = self.layers[0](self.embedding(tokens))
        y, _ = self.layers[1](y)
        y, _ = self.again(y)
        self.layers[0].flatten_parameters()
        return self.dropout(self.cell(y[-1]))


def test_whole_model() -> None:
    model = Model()
    tokens = torch.randint(20, (5, 3))
    before = copy.deepcopy(model.state_dict())
    frozen = rnnfast.freeze(model, {"layers.0": "int8", "cell": "bfloat16"})
    assert model.training
    assert not frozen.training
    assert frozen.again is frozen.layers[1]
    assert [m.weights for m in (*frozen.layers, frozen.cell)] == ["int8", "float32", "bfloat16"]
    model.eval()
    expected = model(tokens)
    torch.testing.assert_close(frozen(tokens), expected.detach(), rtol=0.02, atol=0.01)
    assert not frozen(tokens).requires_grad
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # does not reach the copy
    assert frozen(tokens).abs().max() > 0.01


def test_parametrized_and_accelerated_modules() -> None:
    x = torch.randn(4, 3, 9)
    for keep_class in (False, True):
        module = nn.LSTM(9, 21).requires_grad_(False)
        rnnfast.accelerate(module, keep_class=keep_class)
        parametrize.register_parametrization(module, "weight_hh_l0", nn.Tanh(), unsafe=True)
        assert_near(rnnfast.freeze(module)(x), module(x), 2e-6)


def test_the_model_does_not_change() -> None:
    """Parametrizations that change in training are read as in eval mode."""
    module = nn.utils.parametrizations.spectral_norm(nn.LSTM(9, 21), "weight_hh_l0")
    before, x = copy.deepcopy(module.state_dict()), torch.randn(4, 3, 9)
    frozen = rnnfast.freeze(module)
    assert module.training
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    assert_near(frozen(x), module.eval().requires_grad_(False)(x), 2e-6)


def test_trace() -> None:
    for module in (nn.LSTM(9, 21, proj_size=4), nn.GRUCell(9, 21)):
        frozen = rnnfast.freeze(module, "int8")
        x = torch.randn(3, 9) if isinstance(module, nn.GRUCell) else torch.randn(4, 3, 9)
        with torch.no_grad():
            traced = torch.jit.trace(frozen, x)
            assert_near(traced(x), frozen(x), 1e-6)


def test_backend_and_autocast() -> None:
    frozen, x = rnnfast.freeze(nn.LSTM(9, 21), "int8"), torch.randn(4, 3, 9)
    y = frozen(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        for input in (x, x.bfloat16()):
            result, (h, c) = frozen(input)
            assert {result.dtype, h.dtype, c.dtype} == {torch.bfloat16}
            torch.testing.assert_close(result.float(), y, rtol=0.02, atol=0.01)
        cell = rnnfast.freeze(nn.GRUCell(9, 21))
        assert cell(x[0].bfloat16()).dtype is torch.bfloat16


@every_type
def test_compile_and_export(weights: str) -> None:
    model = nn.LSTM(9, 21, num_layers=2, bidirectional=True, proj_size=4)
    frozen, x = rnnfast.freeze(model, weights), torch.randn(4, 3, 9)
    with torch.no_grad():
        y, (h, c) = torch.compile(frozen, fullgraph=True, backend="aot_eager")(x)
        assert_near([y, h, c], frozen(x), 1e-6)
        program = torch.export.export(frozen, (x,))
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        assert_near(loaded(x), frozen(x), 1e-6)
        cell = rnnfast.freeze(nn.GRUCell(9, 21), weights)
        compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
        assert_near(compiled(x[0]), cell(x[0]), 1e-6)


def test_operator() -> None:
    frozen = rnnfast.freeze(nn.LSTM(9, 21), "int8")
    w_ih, w_hh = (frozen.get_buffer(f"packed_{kind}_l0") for kind in ("ih", "hh"))
    h = torch.zeros(3, 21)
    arguments = "lstm", torch.randn(4, 3, 9), h, h, w_ih, w_hh, None, False
    torch.library.opcheck(torch.ops.rnnfast.frozen_layer.default, arguments)


# ---- errors ----


def test_what_freeze_refuses() -> None:
    class Own(nn.LSTM):
        def forward(self, *args: Any) -> Any:
            return super().forward(*args)

    class Called(nn.GRU):
        def __call__(self, *args: Any) -> Any:
            return super().__call__(*args)

    changed, hooked, dropped = nn.GRU(2, 3), nn.GRU(2, 3), nn.GRU(2, 3)
    changed.forward = lambda x: x  # type: ignore[method-assign]
    hooked.register_forward_hook(lambda *_: None)
    weight = dropped._parameters.pop("weight_hh_l0")
    dropped.weight_hh_l0 = weight.detach()  # as a wrapper that drops weights does
    for module, weights, words in (
        (nn.Linear(2, 3), "int8", "Linear has no RNN, LSTM, GRU or cell to freeze"),
        (Called(2, 3), "int8", "GRU cannot be frozen|Called cannot be frozen: .* its own __call__"),
        (rnnfast.freeze(nn.GRU(2, 3)), "int8", "FrozenLayers is frozen already"),
        (nn.GRU(2, 3), torch.int8, "expected weights float32.*got torch.int8"),
        (nn.GRU(2, 3), "int4", "expected weights float32, bfloat16, float16, int8, got 'int4'"),
        (
            nn.Sequential(nn.GRU(2, 3)),
            {"1": "int8"},
            r"no recurrent module is named '1'; .*\['0'\]",
        ),
        (nn.GRU(2, 3).double(), "int8", "Expected float32 weights on the CPU.*torch.float64"),
        (rnnfast.GRU(2, 3, tokens=True), "int8", "GRU cannot be frozen: .*tokens=True"),
        (nn.Sequential(Own(2, 3)), "int8", "0 cannot be frozen: .*Own.* has its own forward"),
        (changed, "int8", "GRU cannot be frozen: it has its own forward, set on the instance"),
        (hooked, "int8", "GRU cannot be frozen: it has hooks"),
        (dropped, "int8", "weight_hh_l0 is no parameter of the module"),
    ):
        with pytest.raises(ValueError, match=words):
            rnnfast.freeze(module, weights)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_malformed_calls_raise_what_torch_raises(kind: type[nn.Module]) -> None:
    module = kind(9, 21).requires_grad_(False)
    frozen = rnnfast.freeze(module, "int8")
    x, h = torch.randn(4, 3, 9), torch.randn(1, 3, 21)
    good = (h, h) if kind is nn.LSTM else h
    bad = (h[:, :2], h[:, :2]) if kind is nn.LSTM else h[:, :2]
    for arguments in (
        (x[0, 0],),
        (x[..., :8],),
        (x.double(), good),
        (x, bad),
        (x[:0], good),
        (x.unsqueeze(0),),
        (x[:, 0], good),
        (None,),
    ):
        with pytest.raises(Exception, match=r".") as expected:
            module(*arguments)
        with pytest.raises(type(expected.value)) as found:
            frozen(*arguments)
        assert str(found.value) == str(expected.value)


def test_gradients_are_refused() -> None:
    frozen, x = rnnfast.freeze(nn.LSTM(9, 21)), torch.randn(4, 3, 9, requires_grad=True)
    cell = rnnfast.freeze(nn.GRUCell(9, 21))
    for call in (
        lambda: frozen(x),
        lambda: frozen(x.detach(), (torch.ones(1, 3, 21, requires_grad=True),) * 2),
        lambda: cell(x[0]),
    ):
        with pytest.raises(RuntimeError, match="a frozen layer has no gradients"):
            call()
    with pytest.raises(RuntimeError, match="a frozen layer has no derivatives"):
        torch.func.jvp(lambda x: frozen(x)[0], (x.detach(),), (x.detach(),))
    with torch.no_grad():
        assert not frozen(x)[0].requires_grad


def test_other_devices_are_refused() -> None:
    frozen = rnnfast.freeze(nn.LSTM(9, 21)).to("meta")
    with pytest.raises(RuntimeError, match="run on the CPU, and this one was moved to meta"):
        frozen(torch.randn(4, 3, 9))


def test_damaged_and_foreign_weights_are_refused() -> None:
    frozen = rnnfast.freeze(nn.GRU(9, 21))
    good, x = frozen.packed_hh_l0, torch.randn(4, 3, 9)
    other = rnnfast.freeze(nn.GRU(9, 22)).packed_hh_l0
    for block, words in (
        (good[:-1].clone(), "damaged"),
        (torch.zeros_like(good), "expected packed weights"),
        (torch.zeros(3, dtype=torch.uint8), "expected packed weights"),
        (rnnfast.freeze(nn.GRU(9, 21), "int8").packed_hh_l0, "expected w_ih of shape.*Char"),
        (other, r"Expected|expected"),
    ):
        frozen._buffers["packed_hh_l0"] = block
        with pytest.raises((RuntimeError, ValueError), match=words):
            frozen(x)
    for place in range(44):  # every byte of the header that says what follows
        block = good.clone()
        block[place] += 1
        frozen._buffers["packed_hh_l0"] = block
        with pytest.raises((RuntimeError, ValueError), match=r"packed weights|expected w_"):
            frozen(x)
    frozen._buffers["packed_hh_l0"] = good
    frozen(x)


def test_other_operators_refuse_packed_weights() -> None:
    frozen = rnnfast.freeze(nn.GRU(9, 21))
    w_ih, w_hh = (frozen.get_buffer(f"packed_{kind}_l0") for kind in ("ih", "hh"))
    x, h = torch.randn(4, 3, 9), torch.zeros(3, 21)
    with pytest.raises(RuntimeError, match="frozen_layer takes packed weights"):
        torch.ops.rnnfast.gru(x, h, w_ih, w_hh, None, None, False, False)


def test_quantize_error() -> None:
    model, tokens = Model(), torch.randint(20, (50, 3))
    table = rnnfast.quantize_error(model, tokens)
    assert model.training
    assert [row.name for row in table] == ["layers.0", "layers.1", "cell", ""]
    assert all(0 < row.rms <= row.largest < 0.1 for row in table)
    assert all(0 < row.relative < 0.1 for row in table)
    lines = str(table).splitlines()
    assert len(lines) == 5
    assert lines[1].startswith("layers.0  int8")
    exact = rnnfast.quantize_error(model, tokens, weights="float32")
    assert all(row.relative < 1e-6 for row in exact)


def test_quantize_error_of_other_results() -> None:
    """A dict, nothing, and outputs that the model then changes in place."""

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(4, 8)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor, result: str) -> Any:
            self.calls += 1
            y, _ = self.layer(x)
            y *= 0
            return {"dict": {"y": y}, "none": None}[result]

    model, x = Other(), torch.randn(5, 3, 4)
    assert [row.name for row in rnnfast.quantize_error(model, x, "dict")] == ["layer", ""]
    (row,) = rnnfast.quantize_error(model, x, "none")
    assert row.relative > 1e-5
    assert model.calls == 0
    assert rnnfast.quantize_error(model, x[:, :0], "none") == []
