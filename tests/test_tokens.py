"""Integer tokens instead of one-hot vectors and embeddings."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast
from rnnfast import autograd, functional
from rnnfast import tokens as tokens_module
from rnnfast.reference import CELLS, LayerInputs

BACKENDS = ["fused", "aten", "reference"]
V, T, B, I, H = 23, 9, 4, 6, 11
LENGTHS = torch.tensor([9, 0, 4, 7])
STACK = {"num_layers": 2, "bidirectional": True}

# keywords of the constructor; keywords of the call
CASES = {
    "plain": ({}, {}),
    "stack": (STACK, {}),
    "batch first": ({"batch_first": True, "num_layers": 2}, {}),
    "no biases": ({"bias": False}, {}),
    "recompute": ({"recompute": True}, {}),
    "lengths": (STACK, {"lengths": LENGTHS}),
    "reset": ({}, {"reset": torch.rand(T, B, generator=torch.Generator().manual_seed(1)) < 0.3}),
    "projection": ({"proj_size": 3, "num_layers": 2}, {}),
    "cells": ({}, {"return_cells": True}),
}
ONLY_OURS = ("lengths", "reset", "cells")  # torch's kernels do not support these
ONLY_LSTM = ("projection", "cells")
KINDS = ("RNN", "GRU", "LSTM")
calls = pytest.mark.parametrize(
    ("kind", "case", "backend"),
    [
        (kind, case, backend)
        for kind in KINDS
        for case in CASES
        for backend in BACKENDS
        if not (case in ONLY_LSTM and kind != "LSTM")
        and not (case in ONLY_OURS and backend == "aten")
    ],
)
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def many(monkeypatch):
    """Makes tables pay for any number of tokens."""
    monkeypatch.setattr(tokens_module, "_LEAST_TOKENS", 1)


def layer(kind, inputs, **keywords):
    return getattr(rnnfast, kind)(inputs, H, **{"dtype": torch.float64, **keywords})


def pair(kind, **keywords):
    """Returns a layer that reads tokens, and the same layer that reads vectors."""
    ours, theirs = layer(kind, V, tokens=True, **keywords), layer(kind, V, **keywords)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def embedded(kind, vocabulary=V, **keywords):
    embedding = nn.Embedding(vocabulary, I, padding_idx=2, dtype=torch.float64)
    return layer(kind, I, **keywords), embedding


def drawn(module, vocabulary=V):
    return torch.randint(vocabulary, (B, T) if module.batch_first else (T, B))


def numbers(result):
    """Returns all tensors in a result, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for part in result if part is not None for t in numbers(part)]


def outcome(result, parameters):
    """Returns the tensors of a result, and gradients of a loss that weights them differently."""
    found = [t for t in numbers(result) if t.is_floating_point()]
    loss = sum(
        (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum() for y in found
    )
    return [*found, *torch.autograd.grad(loss, list(parameters))]


def assert_same(ours, theirs, tolerance=1e-11):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@calls
def test_one_hot(kind, case, backend):
    keywords, call = CASES[case]
    ours, theirs = pair(kind, backend=backend, **keywords)
    tokens = drawn(ours)
    vectors = F.one_hot(tokens, V).double()
    assert_same(
        outcome(ours(tokens, **call), ours.parameters()),
        outcome(theirs(vectors, **call), theirs.parameters()),
    )


@calls
@pytest.mark.parametrize("vocabulary", [5, 10**4], ids=["all occur", "few occur"])
def test_embedding(kind, case, backend, vocabulary, many):
    keywords, call = CASES[case]
    module, embedding = embedded(kind, vocabulary, backend=backend, **keywords)
    tokens = drawn(module, 5) * (vocabulary // 5)
    tokens[0, 0] = embedding.padding_idx
    parameters = [*module.parameters(), embedding.weight]
    assert_same(
        outcome(module(tokens, embedding=embedding, **call), parameters),
        outcome(module(embedding(tokens), **call), parameters),
    )


@kinds
def test_padding_gets_no_gradient(kind, many):
    module, embedding = embedded(kind)
    tokens = torch.full((T, B), embedding.padding_idx)
    tokens[::2] = 3
    module(tokens, embedding=embedding)[0].sum().backward()
    norms = embedding.weight.grad.norm(dim=1)
    assert norms[3] > 0
    assert norms.count_nonzero() == 1


@kinds
def test_tables_are_used(kind, many, monkeypatch):
    """With the fused kernels no vectors are materialised."""
    ours, _ = pair(kind)
    module, embedding = embedded(kind)
    monkeypatch.delattr(F, "one_hot")
    monkeypatch.setattr(nn.Embedding, "forward", None)
    assert ours(drawn(ours))[0].abs().sum() > 0
    assert module(drawn(module, 5), embedding=embedding)[0].abs().sum() > 0


@pytest.mark.parametrize(
    "options", [{"max_norm": 0.5}, {"scale_grad_by_freq": True}], ids=["max_norm", "frequency"]
)
def test_embeddings_of_other_kinds(options, many):
    module = layer("LSTM", I)
    embedding = nn.Embedding(V, I, dtype=torch.float64, **options)
    tokens = drawn(module, 5)
    parameters = [*module.parameters(), embedding.weight]
    assert_same(
        outcome(module(tokens, embedding=embedding), parameters),
        outcome(module(embedding(tokens)), parameters),
    )


class Tripled(nn.Embedding):
    def forward(self, tokens):
        return 3 * super().forward(tokens)


def hooked(embedding):
    embedding.register_forward_hook(lambda module, arguments, y: y.cos())
    return embedding


def normalised(embedding):
    return nn.utils.parametrizations.weight_norm(embedding)


@pytest.mark.parametrize(
    "build",
    [
        lambda *sizes, **options: Tripled(*sizes, **options),
        lambda *sizes, **options: hooked(nn.Embedding(*sizes, **options)),
        lambda *sizes, **options: normalised(nn.Embedding(*sizes, **options)),
        lambda *sizes, **options: nn.utils.spectral_norm(nn.Embedding(*sizes, **options)).eval(),
    ],
    ids=["subclass", "hook", "parametrization", "pre-hook"],
)
def test_embeddings_that_do_more(build, many):
    module, embedding = layer("GRU", I), build(5, I, dtype=torch.float64)
    tokens = drawn(module, 5)
    parameters = [*module.parameters(), *embedding.parameters()]
    assert_same(
        outcome(module(tokens, embedding=embedding), parameters),
        outcome(module(embedding(tokens)), parameters),
    )


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(kind, dtype, many):
    ours, theirs = pair(kind, dtype=dtype, num_layers=2)
    tokens = drawn(ours)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    assert_same(
        outcome(ours(tokens), ours.parameters()),
        outcome(theirs(F.one_hot(tokens, V).to(dtype)), theirs.parameters()),
        tolerance,
    )


@kinds
@pytest.mark.parametrize("integers", [torch.uint8, torch.int16, torch.int32])
def test_every_integer_type(kind, integers):
    ours, _ = pair(kind)
    tokens = drawn(ours)
    assert torch.equal(ours(tokens.to(integers))[0], ours(tokens)[0])


@kinds
@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_single_sequence_and_state(kind, backend):
    ours, theirs = pair(kind, backend=backend, **STACK)
    tokens = torch.randint(V, (T,))
    state = torch.randn(4, H, dtype=torch.float64)
    hx = (state, state.cos()) if kind == "LSTM" else state
    assert_same(
        outcome(ours(tokens, hx), ours.parameters()),
        outcome(theirs(F.one_hot(tokens, V).double(), hx), theirs.parameters()),
    )


@kinds
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed(kind, backend, many):
    ours, theirs = pair(kind, backend=backend, **STACK)
    module, embedding = embedded(kind, backend=backend, **STACK)
    lengths = torch.tensor([3, T, 1, 6])
    packed = pack_padded_sequence(drawn(ours), lengths, enforce_sorted=False)
    vectors = PackedSequence(F.one_hot(packed.data, V).double(), *packed[1:])
    assert_same(
        outcome(ours(packed), ours.parameters()), outcome(theirs(vectors), theirs.parameters())
    )
    parameters = [*module.parameters(), embedding.weight]
    vectors = PackedSequence(embedding(packed.data), *packed[1:])
    assert_same(
        outcome(module(packed, embedding=embedding), parameters),
        outcome(module(vectors), parameters),
    )


@kinds
@pytest.mark.parametrize("beyond", [-1, V, 10**12])
def test_what_lies_beyond_the_end_does_not_matter(kind, beyond, many):
    ours, _ = pair(kind)
    module, embedding = embedded(kind)
    tokens = drawn(ours)
    spoilt = tokens.where(torch.arange(T).unsqueeze(1) < LENGTHS, beyond)
    for call in (ours, lambda x, **more: module(x, embedding=embedding, **more)):
        expected, actual = (numbers(call(x, lengths=LENGTHS)) for x in (tokens, spoilt))
        assert all(torch.equal(*each) for each in zip(actual, expected, strict=True))


@kinds
def test_threads_agree(kind, threads):
    ours = layer(kind, V, tokens=True, dtype=torch.float32)
    tokens = torch.randint(V, (40, 12))
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(outcome(ours(tokens), ours.parameters()))
    for result in results[1:]:
        assert all(torch.equal(*each) for each in zip(result, results[0], strict=True))


@kinds
def test_derivatives(kind):
    """First and second derivatives, compared with finite differences."""
    module = layer(kind, 5, tokens=True)
    tokens = torch.randint(5, (3, 2))
    names = [name for name, _ in module.named_parameters()]

    def run(*parameters):
        arguments = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, arguments, (tokens,))[0]

    parameters = [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert torch.autograd.gradcheck(run, parameters)
    few = [parameters[0], *[p.detach() for p in parameters[1:]]]
    assert torch.autograd.gradgradcheck(run, few)


def test_transforms(many):
    module, embedding = embedded("LSTM")
    tokens = drawn(module)
    weight = embedding.weight.detach()
    tangent = torch.randn_like(weight)
    model = _Embedded(module)

    def folded(weight):
        return torch.func.functional_call(model, {"embedding.weight": weight}, (tokens,))

    def spelt_out(weight):
        return module(F.embedding(tokens, weight))[0]

    for ours, theirs in zip(
        torch.func.jvp(folded, (weight,), (tangent,)),
        torch.func.jvp(spelt_out, (weight,), (tangent,)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    many_weights = torch.stack([weight, tangent])
    torch.testing.assert_close(
        torch.vmap(folded)(many_weights), torch.stack([spelt_out(w) for w in many_weights])
    )


class _Embedded(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module
        self.embedding = nn.Embedding(V, I, dtype=torch.float64)

    def forward(self, tokens):
        return self.module(tokens, embedding=self.embedding)[0]


@kinds
@pytest.mark.parametrize("form", ["tokens", "embedding"])
def test_compile(kind, form, many):
    torch._dynamo.reset()
    model = layer(kind, V, tokens=True) if form == "tokens" else _Embedded(layer(kind, I))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = torch.randint(V, (T, B))
    assert_same(
        outcome(compiled(tokens), model.parameters()), outcome(model(tokens), model.parameters())
    )


def test_autocast(many):
    ours, theirs = pair("LSTM", dtype=torch.float32)
    tokens = drawn(ours)
    with torch.autocast("cpu", torch.bfloat16):
        y, z = ours(tokens)[0], theirs(F.one_hot(tokens, V).float())[0]
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y, z, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("steps", [5, 300])
def test_export_with_open_sizes(steps):
    model = _Embedded(layer("LSTM", I)).eval()
    sizes = ({0: torch.export.Dim("time", min=2), 1: torch.export.Dim("batch", min=2)},)
    with torch.no_grad():
        tokens = torch.randint(V, (steps, 3))
        program = torch.export.export(model, (tokens,), dynamic_shapes=sizes)
        for shape in ((4, 2), (400, 7)):
            tokens = torch.randint(V, shape)
            torch.testing.assert_close(program.module()(tokens), model(tokens))


def test_vmap_over_tokens(many):
    module, embedding = embedded("LSTM", 5000)
    tokens = torch.randint(20, (3, T, B))

    def run(tokens):
        return module(tokens, embedding=embedding)[0]

    expected = torch.stack([run(each) for each in tokens])
    torch.testing.assert_close(torch.vmap(run)(tokens), expected)


def test_fx():
    graph = torch.fx.symbolic_trace(_Embedded(layer("LSTM", I)))
    tokens = torch.randint(V, (T, B))
    torch.testing.assert_close(graph(tokens), graph.module(graph.embedding(tokens))[0])


@kinds
def test_a_layer_is_saved_and_copied(kind):
    ours, theirs = pair(kind, **STACK)
    names = [name for name, _ in theirs.named_parameters()]
    assert [name for name, _ in ours.named_parameters()] == names
    assert {n: w.shape for n, w in ours.state_dict().items()} == {
        n: w.shape for n, w in theirs.state_dict().items()
    }
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    tokens = drawn(ours)
    for copied in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert torch.equal(copied(tokens)[0], ours(tokens)[0])


@kinds
def test_parameters_are_contiguous(kind):
    """And so are gradients, whether a call reads a table or writes vectors out."""
    for backend in BACKENDS:
        ours, theirs = pair(kind, backend=backend, **STACK)
        ours(drawn(ours))[0].sum().backward()
        for (name, weight), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert weight.stride() == weight.grad.stride() == other.stride(), name
            assert weight.is_contiguous()


@kinds
def test_gradients_are_written_as_the_parameters_lie(kind):
    ours, _ = pair(kind, **STACK)
    loss = ours(drawn(ours))[0].sum()
    grads = torch.autograd.grad(loss, list(ours.parameters()))
    assert all(grad.is_contiguous() for grad in grads)


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    ours, _ = pair("LSTM")
    safetensors.save_model(ours, tmp_path / "layer.safetensors")
    other = layer("LSTM", V, tokens=True)
    safetensors.load_model(other, tmp_path / "layer.safetensors")
    tokens = drawn(ours)
    assert torch.equal(other(tokens)[0], ours(tokens)[0])


def test_parameters_as_one_vector():
    ours, theirs = pair("GRU")
    vector = nn.utils.parameters_to_vector(ours.parameters())
    assert torch.equal(vector, nn.utils.parameters_to_vector(theirs.parameters()))
    tokens = drawn(ours)
    expected = theirs(F.one_hot(tokens, V).double())[0]
    other = layer("GRU", V, tokens=True)
    nn.utils.vector_to_parameters(vector, other.parameters())
    torch.testing.assert_close(other(tokens)[0], expected)


def test_lbfgs():
    """It steps to the same parameters as with vectors written out."""
    ours, theirs = pair("RNN")
    tokens = drawn(ours)
    for module, x in ((ours, tokens), (theirs, F.one_hot(tokens, V).double())):
        optimizer = torch.optim.LBFGS(module.parameters(), max_iter=4)

        def loss(module=module, x=x, optimizer=optimizer):
            optimizer.zero_grad()
            value = (module(x)[0] - 0.5).square().mean()
            value.backward()
            return value

        first = optimizer.step(loss).item()
        assert loss().item() < 0.9 * first
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@kinds
def test_state_dict_of_torch_nn(kind):
    theirs = getattr(nn, kind)(V, H, dtype=torch.float64, **STACK)
    ours = layer(kind, V, tokens=True, **STACK)
    ours.load_state_dict(theirs.state_dict())
    tokens = drawn(ours)
    torch.testing.assert_close(ours(tokens)[0], theirs(F.one_hot(tokens, V).double())[0])
    back = getattr(nn, kind)(V, H, dtype=torch.float64, **STACK)
    back.load_state_dict(ours.state_dict())
    for one, other in zip(back.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


def column_major(weight):
    return weight.detach().t().contiguous().t()


@kinds
def test_column_major_weights_of_older_versions(kind):
    """Checkpoints and pickles that hold W_ih as older versions kept it."""
    ours, theirs = pair(kind)
    state = {**ours.state_dict(), "weight_ih_l0": column_major(ours.weight_ih_l0)}
    assert state["weight_ih_l0"].stride() == (1, ours.weight_ih_l0.shape[0])
    loaded, old = layer(kind, V, tokens=True), copy.deepcopy(ours)
    loaded.load_state_dict(state)
    assert loaded.weight_ih_l0.is_contiguous()
    old.weight_ih_l0.data = state["weight_ih_l0"]
    old = copy.deepcopy(old)
    assert not old.weight_ih_l0.is_contiguous()
    tokens = drawn(ours)
    expected = outcome(theirs(F.one_hot(tokens, V).double()), theirs.parameters())
    assert_same(outcome(loaded(tokens), loaded.parameters()), expected)
    assert_same(outcome(old(tokens), old.parameters()), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("vocabulary", [70, 3000], ids=["all occur", "few occur"])
def test_large_tables(dtype, recompute, vocabulary, threads):
    """Columns of W_ih give the numbers of a contiguous table, which the kernels read as it is."""
    ours = rnnfast.GRU(vocabulary, 40, tokens=True, recompute=recompute, dtype=dtype)
    tokens = torch.randint(vocabulary, (20, 30))
    tokens[0, :2] = torch.tensor([0, vocabulary - 1])
    weights = [weight.detach().clone().requires_grad_() for weight in ours.parameters()]
    rows = weights[0].detach().t().contiguous().requires_grad_()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        actual = outcome(ours(tokens), ours.parameters())
        x, states = tokens.unsqueeze(-1), torch.zeros(30, 40, dtype=dtype)
        inputs = LayerInputs(x, (states,), rows, *weights[1:], False)
        y, (h_n,), _ = autograd.layer(CELLS["gru"], inputs, recompute=recompute)
        expected = outcome((y, h_n.unsqueeze(0)), [rows, *weights[1:]])
        expected[2] = expected[2].t()
        assert all(torch.equal(*each) for each in zip(actual, expected, strict=True))


FUNCTIONS = {"RNN": functional.rnn, "GRU": functional.gru, "LSTM": functional.lstm}


@calls
@pytest.mark.parametrize("form", ["tokens", "embedding"])
def test_functional(kind, case, backend, form, many):
    keywords, call = CASES[case]
    if "proj_size" in keywords and form == "embedding":
        keywords = {**keywords, "bidirectional": True}
    inputs = V if form == "tokens" else I
    module = layer(kind, inputs, backend=backend, **keywords)
    weights, tokens = list(module.parameters()), drawn(module, 5)
    options = {name: keywords[name] for name in keywords if name != "bias"}
    options |= {"has_biases": module.bias, "backend": backend, **call}
    matrix = torch.randn(V, I, dtype=torch.float64, requires_grad=True)
    given = {"tokens": True} if form == "tokens" else {"embedding": matrix}
    vectors = F.one_hot(tokens, V).double() if form == "tokens" else F.embedding(tokens, matrix)
    wanted = weights if form == "tokens" else [*weights, matrix]
    assert_same(
        outcome(FUNCTIONS[kind](tokens, None, weights, **given, **options), wanted),
        outcome(module(vectors, **call), wanted),
    )


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"tokens": True, "embedding": torch.zeros(V, I)}, ValueError, "no embedding can be given"),
        ({"embedding": torch.zeros(V, 7)}, RuntimeError, "Expected 6, got 7"),
        ({"input": torch.zeros(T, B), "tokens": True}, TypeError, "integers, got torch.float32"),
        ({"input": torch.full((T, B), I), "tokens": True}, IndexError, "index out of range"),
        ({"input": torch.zeros(T, dtype=torch.int64), "tokens": True}, RuntimeError, "dimensions"),
        ({}, RuntimeError, "dimensions"),
        ({"hx": torch.zeros(1, B + 1, H), "tokens": True}, RuntimeError, "Expected hidden size"),
    ],
)
def test_malformed_functional_calls(change, error, words):
    module = rnnfast.GRU(I, H)
    arguments = {"input": torch.zeros(T, B, dtype=torch.int64), "hx": None, **change}
    with pytest.raises(error, match=words):
        functional.gru(flat_weights=list(module.parameters()), **arguments)


def test_initial_values_are_torch_nns():
    torch.manual_seed(5)
    ours = rnnfast.LSTM(V, H, tokens=True)
    torch.manual_seed(5)
    theirs = nn.LSTM(V, H)
    for name, weight in theirs.named_parameters():
        assert torch.equal(getattr(ours, name), weight), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("token", [-1, V])
@pytest.mark.parametrize("form", ["tokens", "all occur", "few occur"])
def test_out_of_range(backend, token, form, many):
    tokens = torch.zeros(T, B, dtype=torch.int64)
    tokens[3, 2] = token
    if form == "tokens":
        call = layer("LSTM", V, tokens=True, backend=backend)
    else:
        module = layer("LSTM", I, backend=backend)
        embedding = nn.Embedding(V, I, dtype=torch.float64)
        if form == "few occur":
            embedding = nn.Embedding(1000, I, dtype=torch.float64)
            tokens[3, 2] = -1 if token < 0 else 1000

        def call(x):
            return module(x, embedding=embedding)

    with pytest.raises(IndexError, match="index out of range"):
        call(tokens)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((torch.zeros(T, B),), TypeError, "integers, got torch.float32"),
        ((torch.zeros(T, B, dtype=torch.bool),), TypeError, "integers, got torch.bool"),
        ((torch.zeros(T, B, 3, dtype=torch.int64),), RuntimeError, r"dimensions.*\[9, 4, 3\]"),
        ((torch.tensor(3),), RuntimeError, r"dimensions.*got \[\]"),
        (([1, 2],), RuntimeError, "got list"),
        ((torch.zeros(0, B, dtype=torch.int64),), RuntimeError, "length to be larger than 0"),
        (
            (torch.zeros(T, B, dtype=torch.int64), torch.zeros(1, B + 1, H, dtype=torch.float64)),
            RuntimeError,
            r"Expected hidden size \(1, 4, 11\), got \[1, 5, 11\]",
        ),
    ],
)
def test_malformed_tokens(arguments, error, words):
    with pytest.raises(error, match=words):
        layer("GRU", V, tokens=True)(*arguments)


def test_malformed_embeddings():
    tokens = torch.zeros(T, B, dtype=torch.int64)
    with pytest.raises(ValueError, match="no embedding can be given"):
        layer("GRU", V, tokens=True)(tokens, embedding=nn.Embedding(V, V))
    with pytest.raises(RuntimeError, match="Expected 6, got 7"):
        layer("GRU", I)(tokens, embedding=nn.Embedding(V, 7, dtype=torch.float64))
    with pytest.raises((RuntimeError, ValueError), match=r"dtype|type"):
        layer("GRU", I)(tokens, embedding=nn.Embedding(V, I))


@pytest.mark.parametrize("count", [1000, 4000])
def test_gradients_of_frequent_tokens_err_no_more_than_products(count):
    """A token that occurs thousands of times: a single chain of additions would err more."""
    torch.manual_seed(0)
    tokens = torch.full((count, 1), 7)
    ours = rnnfast.LSTM(35, 11, tokens=True, bias=False, backend="fused")
    theirs = torch.nn.LSTM(35, 11, bias=False)
    theirs.load_state_dict(ours.state_dict())
    exact = copy.deepcopy(theirs).double()
    vectors = F.one_hot(tokens, 35)
    grads = []
    for layer, x in ((ours, tokens), (theirs, vectors.float()), (exact, vectors.double())):
        layer(x)[0].sum().backward()
        grads.append(layer.weight_ih_l0.grad.double())
    ours_off, theirs_off = (
        (grad - grads[2]).square().mean().sqrt() / grads[2].square().mean().sqrt()
        for grad in grads[:2]
    )
    assert grads[2].abs().max() > 0
    assert ours_off <= max(theirs_off, 1e-6)
