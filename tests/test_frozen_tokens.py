"""Frozen layers that read tokens: one-hot ones in tables of every type, and of embeddings."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from covering import quick_values
from frozen_cases import (
    TOKENS,
    assert_near,
    bound_of,
    drawn,
    embedded,
    every_type,
    reader,
    tensors_of,
)
from targets import FROZEN, check_on, running_on
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast
from rnnfast import tokens as tokens_module
from rnnfast.frozen import TYPES, FrozenLayers

V, T, B, I, H = TOKENS
LENGTHS = torch.tensor([9, 0, 4, 7])
KINDS: list[tuple[type[Any], dict[str, Any]]] = [
    (rnnfast.LSTM, {}),
    (rnnfast.GRU, {"num_layers": 2, "bidirectional": True}),
    (rnnfast.RNN, {"batch_first": True}),
    (rnnfast.RNN, {"nonlinearity": "relu", "bias": False}),
    (rnnfast.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 5, "batch_first": True}),
]
kinds = pytest.mark.parametrize(("kind", "options"), KINDS, ids=lambda v: getattr(v, "__name__", v))


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes tables pay for any number of tokens."""
    monkeypatch.setattr(tokens_module, "_LEAST_TOKENS", 1)


def torchs(module: Any, frozen: Any) -> nn.Module:
    """torch.nn's layers in float64 with the rounded weights of frozen ones."""
    mode = module.mode.split("_")
    extra = {"nonlinearity": mode[1].lower()} if mode[0] == "RNN" else {}
    extra |= {"proj_size": module.proj_size} if mode[0] == "LSTM" else {}
    result = getattr(nn, mode[0])(
        module.input_size,
        module.hidden_size,
        module.num_layers,
        bias=module.bias,
        batch_first=module.batch_first,
        bidirectional=module.bidirectional,
        **extra,
    )
    rounded = {name: each.dense() for name, each in frozen.unpacked().items()}
    result.load_state_dict({**module.state_dict(), **rounded})
    return result.double().requires_grad_(False)


def one_hot(tokens: Tensor, count: int = V) -> Tensor:
    return F.one_hot(tokens, count).double()


def states_for(module: Any) -> Any:
    rows = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(rows, B, module.proj_size or H)
    return (h, torch.randn(rows, B, H)) if module.mode == "LSTM" else h


def doubles(states: Any) -> Any:
    return tuple(s.double() for s in states) if isinstance(states, tuple) else states.double()


# ---- one-hot tokens ----


@every_type
@kinds
def test_values(kind: type[Any], options: dict[str, Any], weights: str) -> None:
    module = reader(kind, **options)
    tokens, hx = drawn(module), states_for(module)

    def check(_: str) -> None:
        frozen = rnnfast.freeze(module, weights)
        oracle = torchs(module, frozen)
        for given, exact in ((None, None), (hx, doubles(hx))):
            y = frozen(tokens, given)
            assert y[0].abs().max() > 1e-3
            assert_near(y, oracle(one_hot(tokens), exact), bound_of(weights))

    check_on(FROZEN, check)


@every_type
def test_sizes(weights: str) -> None:
    """Units and tokens below, at and beyond whole vectors and tiles."""
    for hidden, count, batch in ((1, 1, 1), (16, 5, 1), (65, 300, 7), (129, 2, 40)):
        module = reader(rnnfast.GRU, hidden, count)
        tokens = torch.randint(count, (3, batch))

        def check(_: str, module: Any = module, tokens: Tensor = tokens, n: int = count) -> None:
            frozen = rnnfast.freeze(module, weights)
            expected = torchs(module, frozen)(one_hot(tokens, n))
            assert_near(frozen(tokens), expected, bound_of(weights))

        check_on(FROZEN, check)


@kinds
def test_float32_has_the_bits_of_a_layer_that_is_not_frozen(
    kind: type[Any], options: dict[str, Any]
) -> None:
    module = reader(kind, **options)
    tokens = drawn(module, steps=40)

    def check(_: str) -> None:
        found, expected = rnnfast.freeze(module)(tokens), module(tokens)
        for one, other in zip(tensors_of(found), tensors_of(expected), strict=True):
            assert torch.equal(one, other)

    check_on(FROZEN, check)


@every_type
def test_what_is_looked_up_is_not_rounded(weights: str) -> None:
    """Without a product with states, the result is that of the weights as they are stored."""
    module = reader(rnnfast.RNN, nonlinearity="relu")
    module.weight_hh_l0.zero_()

    def check(_: str) -> None:
        frozen = rnnfast.freeze(module, weights)
        table = frozen.unpacked()["weight_ih_l0"].dense()
        expected = (table.t() + module.bias_ih_l0 + module.bias_hh_l0).relu()
        found = frozen(torch.arange(V).unsqueeze(0))[0][0]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)

    check_on(FROZEN, check)


@every_type
@kinds
def test_lengths_resets_packed_and_single_sequences(
    kind: type[Any], options: dict[str, Any], weights: str
) -> None:
    module = reader(kind, **options)
    tokens, state = drawn(module), states_for(module)
    one = tuple(s[:, 0] for s in state) if isinstance(state, tuple) else state[:, 0]
    reset = torch.rand(tokens.shape) < 0.3
    steps = torch.arange(T).unsqueeze(1) < LENGTHS
    spoilt = tokens.where(steps.t() if module.batch_first else steps, 10**12)
    packed = pack_padded_sequence(
        torch.randint(V, (T, B)), torch.tensor([3, T, 1, 6]), enforce_sorted=False
    )
    calls = [
        lambda layer: layer(spoilt, lengths=LENGTHS),
        lambda layer: layer(tokens, reset=reset),
        lambda layer: layer(tokens, lengths=LENGTHS.tolist(), reset=reset),
        lambda layer: layer(tokens[0]),
        lambda layer: layer(tokens[0].int(), one, reset=reset[0]),
        lambda layer: layer(tokens[:, :0] if not module.batch_first else tokens[:0]),
        lambda layer: [layer(packed)[0].data, layer(packed)[1]],
        lambda layer: layer(tokens.t().contiguous().t().to(torch.uint8)),
    ]

    def check(_: str) -> None:
        frozen, plain = rnnfast.freeze(module, weights), copy.deepcopy(module)
        rounded = {name: each.dense() for name, each in frozen.unpacked().items()}
        plain.load_state_dict({**module.state_dict(), **rounded})
        for call in calls:
            assert_near(call(frozen), call(plain), bound_of(weights))

    check_on(FROZEN, check)


@every_type
def test_bits_do_not_depend_on_threads_or_the_batch(weights: str, threads: None) -> None:
    module, tokens = reader(rnnfast.LSTM, 72, num_layers=3), torch.randint(V, (6, 23))
    for name in FROZEN:
        with running_on(name):
            frozen = rnnfast.freeze(module, weights)
            torch.set_num_threads(1)
            y, _ = frozen(tokens)
            assert torch.equal(
                torch.cat([frozen(tokens[:, :5])[0], frozen(tokens[:, 5:])[0]], 1), y
            )
            for count in (2, 3):
                torch.set_num_threads(count)
                assert torch.equal(frozen(tokens)[0], y)


@every_type
@kinds
def test_a_plain_call_runs_in_the_extension_alone(
    kind: type[Any], options: dict[str, Any], weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And has the bits of the operators, which run all other calls."""
    module = reader(kind, **options)
    frozen, tokens, state = rnnfast.freeze(module, weights), drawn(module), states_for(module)
    with monkeypatch.context() as changed:
        changed.setattr(FrozenLayers, "_forward", None)
        found = [frozen(tokens), frozen(tokens, state), frozen(tokens.t().contiguous().t())]
    monkeypatch.setattr(FrozenLayers, "_run_short", lambda *_: None)
    for result, expected in zip(found, [frozen(tokens), frozen(tokens, state)] * 2, strict=False):
        assert_near(result, expected, 0)


# ---- embeddings ----


@every_type
@kinds
@pytest.mark.parametrize("count", [5, 10**4], ids=["all occur", "few occur"])
def test_embeddings_give_the_bits_of_their_vectors(
    kind: type[Any], options: dict[str, Any], count: int, weights: str, many: None
) -> None:
    module, table = embedded(kind, count, **options)
    tokens = drawn(module, 5, 30) * (count // 5)
    packed = (
        pack_padded_sequence(tokens, [30] * tokens.shape[1], batch_first=False)
        if (not module.batch_first)
        else None
    )

    def check(_: str) -> None:
        frozen = rnnfast.freeze(module, weights)
        assert_near(frozen(tokens, embedding=table), frozen(table(tokens)), 0)
        if packed is not None:
            vectors = PackedSequence(table(packed.data), *packed[1:])
            found, expected = frozen(packed, embedding=table), frozen(vectors)
            assert torch.equal(found[0].data, expected[0].data)

    check_on(FROZEN, check)


@every_type
def test_products_of_embeddings_over_several_tiles_and_chains(weights: str, many: None) -> None:
    for inputs, hidden, count in ((1, 1, 3), (300, 70, 130), (9001, 5, 51)):
        module, table = nn.GRU(inputs, hidden), nn.Embedding(count, inputs)
        tokens = torch.randint(count, (3 * count, 2))

        def check(_: str, m: Any = module, e: Any = table, t: Tensor = tokens) -> None:
            frozen = rnnfast.freeze(m, weights)
            with torch.no_grad():
                assert_near(frozen(t, embedding=e), frozen(e(t)), 0)

        check_on(FROZEN, check)


def test_vectors_are_not_written_out(monkeypatch: pytest.MonkeyPatch, many: None) -> None:
    module, table = embedded(rnnfast.LSTM)
    frozen, reads = rnnfast.freeze(module, "int8"), rnnfast.freeze(reader(rnnfast.LSTM))
    monkeypatch.delattr(F, "one_hot")
    monkeypatch.setattr(nn.Embedding, "forward", None)
    assert frozen(drawn(module, 5), embedding=table)[0].abs().sum() > 0
    assert reads(drawn(module))[0].abs().sum() > 0


def test_threads_share_the_product_of_an_embedding(threads: None) -> None:
    module, table = embedded(rnnfast.LSTM, 200)
    tokens = torch.randint(200, (300, B))
    for weights in TYPES:
        frozen = rnnfast.freeze(module, weights)
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(frozen(tokens, embedding=table)[0])
        assert all(torch.equal(one, results[0]) for one in results)


class Tripled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


def test_embeddings_that_do_more(many: None) -> None:
    module, hooked = embedded(rnnfast.GRU, 5)
    hooked.register_forward_hook(lambda *arguments: arguments[-1].cos())
    frozen = rnnfast.freeze(module)
    for table in (
        hooked,
        Tripled(5, I).requires_grad_(False),
        nn.Embedding(5, I, max_norm=0.5).requires_grad_(False),
        nn.utils.spectral_norm(nn.Embedding(5, I)).eval().requires_grad_(False),
    ):
        tokens = drawn(module, 5, 30)
        assert_near(frozen(tokens, embedding=table), frozen(table(tokens)), 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_int8_embedding_that_is_not_finite(value: float, many: None) -> None:
    module, table = embedded(rnnfast.LSTM)
    table.weight[3, 1] = value
    tokens, frozen = drawn(module, steps=30), rnnfast.freeze(module, "int8")
    found, expected = frozen(tokens, embedding=table)[0], frozen(table(tokens))[0]
    assert torch.equal(found.isfinite(), expected.isfinite())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


# ---- what they refuse ----


def test_errors(many: None) -> None:
    frozen = rnnfast.freeze(reader(rnnfast.LSTM), "int8")
    module, table = embedded(rnnfast.LSTM)
    vectors, tokens = rnnfast.freeze(module), torch.randint(V, (T, B))
    states = torch.zeros(1, B, H), torch.zeros(1, B, H + 1)
    calls: list[tuple[Any, type[Exception], str]] = [
        (lambda: frozen(tokens.float()), TypeError, "integers, got torch.float32"),
        (lambda: frozen(tokens.bool()), TypeError, "integers, got torch.bool"),
        (lambda: frozen(tokens.unsqueeze(0)), RuntimeError, "1 or 2 dimensions, time and batch"),
        (lambda: frozen([1, 2]), RuntimeError, "got list"),
        (lambda: frozen(tokens[:0]), RuntimeError, "sequence length to be larger than 0"),
        (lambda: frozen(tokens, states), RuntimeError, "Expected hidden.1. size"),
        (lambda: frozen(tokens, embedding=table), ValueError, "tokens=True stands for one-hot"),
        (lambda: frozen(tokens, lengths=[1, 2]), RuntimeError, "Expected lengths of shape"),
        (lambda: frozen(tokens, lengths=[1, 2, 3, 99]), ValueError, "between 0 and 9, got 99"),
        (lambda: frozen(tokens + V), IndexError, f"expected tokens from 0 to {V - 1}, got"),
        (lambda: frozen(tokens - V), IndexError, "index out of range"),
        (lambda: vectors(tokens + V, embedding=table), IndexError, "index out of range"),
        (lambda: vectors(tokens, embedding=nn.Embedding(V, 7)), RuntimeError, "Expected 6, got 7"),
        (lambda: vectors(tokens, embedding=table.double()), ValueError, "RNN input dtype"),
        (lambda: vectors(tokens.float(), embedding=table), TypeError, "integers"),
        (lambda: rnnfast.Stream(frozen), ValueError, "a stream reads vectors"),
        (lambda: frozen.save("never"), ValueError, "the C library reads vectors"),
    ]
    for call, kind, words in calls:
        with pytest.raises(kind, match=words):
            call()


def test_gradients_are_refused(many: None) -> None:
    module, table = embedded(rnnfast.LSTM)
    frozen, tokens = rnnfast.freeze(module), drawn(module, steps=30)
    for weight in (table.weight, nn.Embedding(10**4, I).weight):
        learnt = nn.Embedding.from_pretrained(weight, freeze=False)
        with pytest.raises(RuntimeError, match="a frozen layer has no gradients"):
            frozen(tokens, embedding=learnt)
        with torch.no_grad():
            assert not frozen(tokens, embedding=learnt)[0].requires_grad
    reads, state = rnnfast.freeze(reader(rnnfast.GRU)), torch.zeros(1, B, H, requires_grad=True)
    with pytest.raises(RuntimeError, match="a frozen layer has no gradients"):
        reads(tokens, state)
    with pytest.raises(RuntimeError, match="a frozen layer has no derivatives"):
        torch.func.vmap(lambda each: reads(each)[0])(tokens.expand(2, -1, -1))


def test_blocks_of_the_other_kind_are_refused() -> None:
    reads, multiplies = rnnfast.freeze(reader(rnnfast.GRU)), rnnfast.freeze(rnnfast.GRU(V, H))
    table, matrix, w_hh = reads.packed_ih_l0, multiplies.packed_ih_l0, reads.packed_hh_l0
    h, tokens, x = torch.zeros(B, H), torch.randint(V, (T, B, 1)), torch.randn(T, B, V)
    layer, make = torch.ops.rnnfast.frozen_layer, torch.ops.rnnfast.frozen_table
    for call, words in (
        (lambda: layer("gru", x, h, None, table, w_hh, None, False), "got .* as a table of tokens"),
        (lambda: layer("gru", tokens, h, None, matrix, w_hh, None, False), "as a table of tokens,"),
        (lambda: layer("gru", tokens, h, None, table, table, None, False), "expected w_hh"),
        (lambda: make("gru", torch.randn(5, V), table, H), "expected w_ih of shape"),
        (lambda: make("gru", torch.randn(5, V + 1), matrix, H), "expected w_ih of shape"),
        (lambda: make("gru", torch.randn(5, V).double(), matrix, H), "float32 and on the CPU"),
        (lambda: make("lstm", torch.randn(5, V), matrix, H), "expected w_ih of shape"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()
    for place in (*range(44), 48, 52, 56):
        block = table.clone()
        block[place] += 1
        reads._buffers["packed_ih_l0"] = block
        with pytest.raises((RuntimeError, ValueError), match=r"packed weights|expected w_|damaged"):
            reads(tokens[..., 0])


# ---- the rest of torch ----


class Model(nn.Module):
    def __init__(self, layers: nn.Module, table: nn.Embedding | None = None) -> None:
        super().__init__()
        self.layers, self.table = layers, table

    def forward(self, tokens: Tensor) -> Tensor:
        more = {} if self.table is None else {"embedding": self.table}
        return self.layers(tokens, **more)[0]


def reading() -> Model:
    options = {"num_layers": 2, "bidirectional": True, "proj_size": 4}
    return Model(reader(rnnfast.LSTM, **options))


def embedding() -> Model:
    return Model(*embedded(rnnfast.GRU, 20))


@quick_values(weights=[*TYPES], make=[reading, embedding])
def test_compile_export_and_trace(weights: str, make: Callable[[], Model], many: None) -> None:
    torch._dynamo.reset()
    sizes = ({0: torch.export.Dim("time", min=2), 1: torch.export.Dim("batch", min=2)},)
    frozen, tokens = rnnfast.freeze(make(), weights), torch.randint(20, (30, B))
    with torch.no_grad():
        compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
        assert_near(compiled(tokens), frozen(tokens), 1e-6)
        program = torch.export.export(frozen, (tokens,), dynamic_shapes=sizes)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        traced = torch.jit.trace(frozen, tokens)
        for shape in ((30, B), (3, 2), (70, 9)):
            tokens = torch.randint(20, shape)
            assert_near(loaded(tokens), frozen(tokens), 1e-6)
            if shape[1] == B:
                assert_near(traced(tokens), frozen(tokens), 1e-6)


def test_operators() -> None:
    for weights in TYPES:
        reads = rnnfast.freeze(reader(rnnfast.LSTM), weights)
        blocks = [reads.get_buffer(f"packed_{kind}_l0") for kind in ("ih", "hh")]
        h, tokens = torch.zeros(B, H), torch.randint(V, (T, B, 1))
        arguments = "lstm", tokens, h, h, *blocks, None, False
        torch.library.opcheck(torch.ops.rnnfast.frozen_layer.default, arguments)
        multiplies = rnnfast.freeze(rnnfast.GRU(I, H), weights)
        for count in (0, 1, 60):
            arguments = "gru", torch.randn(count, I), multiplies.packed_ih_l0, H
            torch.library.opcheck(torch.ops.rnnfast.frozen_table.default, arguments)


def test_autocast(many: None) -> None:
    for model in (reading(), embedding()):
        frozen, tokens = rnnfast.freeze(model), torch.randint(20, (30, B))
        expected = frozen(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            result = frozen(tokens)
        assert result.dtype is torch.bfloat16
        torch.testing.assert_close(result.float(), expected, rtol=0.02, atol=0.01)


def test_quantize_error_and_accelerate() -> None:
    for model in (reading(), embedding()):
        tokens = torch.randint(20, (80, B))
        row = rnnfast.quantize_error(model, tokens)[0]
        assert (row.name, row.weights) == ("layers", "int8")
        assert 1e-5 < row.relative < 0.03
        expected = rnnfast.freeze(model, "int8")(tokens)
        before = model(tokens)
        report = rnnfast.accelerate(model, weights="int8", keep_float=True)
        assert list(report.replaced) == ["layers"]
        assert isinstance(model.layers, FrozenLayers)
        assert torch.equal(model(tokens), expected)
        rnnfast.restore(model)
        assert torch.equal(model(tokens), before)
