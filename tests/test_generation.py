"""Sampling: the choice of a token, the fused generation, and CharLSTM.generate."""

import math
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from targets import is_emulated
from torch import nn

import rnnfast
from rnnfast import backend, generation
from rnnfast.generation import Sampling, continue_tokens, sample
from rnnfast.models import CharLSTM
from rnnfast.text import CharVocabulary, TextError, WordVocabulary

VOCABULARY = CharVocabulary("the cat sat on the mat; ")
CHOICES = {
    "greedy": Sampling(0.0),
    "all": Sampling(),
    "cold": Sampling(0.3),
    "top k": Sampling(1.1, 4),
    "top p": Sampling(0.9, 0, 0.7),
    "both": Sampling(1.3, 6, 0.8),
}
FIFTH = torch.tensor(4)
choices = pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())


def fused_sample(scores, choice, uniforms):
    return backend.EXTENSION.sample(scores, uniforms, *choice)


both = pytest.mark.parametrize("draw", [sample, fused_sample], ids=["torch", "fused"])


def kept(scores, choice):
    """Returns the probabilities of one row, by the definitions of top-k and top-p."""
    probabilities = (scores / choice.temperature).softmax(0)
    order = sorted(range(len(scores)), key=lambda i: (-probabilities[i].item(), i))
    if choice.top_k:
        order = order[: choice.top_k]
    total, chosen, mass = sum(probabilities[i].item() for i in order), [], 0.0
    for i in order:
        if mass >= choice.top_p * total:
            break
        chosen.append(i)
        mass += probabilities[i].item()
    result = torch.zeros_like(probabilities)
    result[chosen] = probabilities[chosen]
    return result / result.sum()


@both
@pytest.mark.parametrize("choice", list(CHOICES.values())[1:], ids=list(CHOICES)[1:])
def test_frequencies_are_the_probabilities(draw, choice):
    scores = torch.randn(9, dtype=torch.float64) * 2
    count = 20001
    uniforms = (torch.arange(count) + 0.5) / count
    drawn = draw(scores.expand(count, -1).contiguous(), choice, uniforms.double())
    frequencies = drawn.bincount(minlength=9) / count
    torch.testing.assert_close(frequencies.double(), kept(scores, choice), rtol=0, atol=2e-4)
    assert torch.equal(drawn, drawn.sort().values)  # rising uniforms, rising tokens


@choices
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_both_choose_the_same(choice, spread):
    scores = torch.randn(500, 40, dtype=torch.float64) * spread
    uniforms = torch.rand(500, dtype=torch.float64)
    assert torch.equal(sample(scores, choice, uniforms), fused_sample(scores, choice, uniforms))


@both
@choices
def test_edges(draw, choice):
    only = torch.full((1, 5), -torch.inf, dtype=torch.float64)
    only[0, 3] = 2.0
    for uniform in (0.0, 0.5, 1 - 2**-53):
        assert draw(only, choice, torch.tensor([uniform], dtype=torch.float64)) == 3
    alike = torch.zeros(1, 5, dtype=torch.float64)
    assert draw(alike, choice, torch.zeros(1, dtype=torch.float64)) == 0
    large = torch.tensor([[1e300, -1e300, 1e300]], dtype=torch.float64)
    assert draw(large, choice, torch.tensor([0.25], dtype=torch.float64)) == 0


@both
def test_tokens_as_likely_as_the_last_of_top_k_stay(draw):
    scores = torch.tensor([[1.0, 3.0, 1.0, 0.0]], dtype=torch.float64)
    uniforms = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    drawn = draw(scores.expand(1000, -1).contiguous(), Sampling(1.0, 2), uniforms)
    assert drawn.unique().tolist() == [0, 1, 2]


@both
@choices
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 3])
def test_scores_that_are_not_finite(draw, choice, bad, place):
    scores = torch.randn(2, 5, dtype=torch.float64)
    scores[1, place] = bad
    with pytest.raises((ValueError, RuntimeError), match="scores are not finite"):
        draw(scores, choice, torch.rand(2, dtype=torch.float64))


# ---- runs ----


class Model:
    """Layers, head and embedding with logits so different that rounding changes no choice."""

    def __init__(self, kind, vocabulary, hidden, *, embedded=True, bias=True, dtype, **options):
        options = {"batch_first": True, "dtype": dtype, "bias": bias, **options}
        self.embedding = nn.Embedding(vocabulary, 5, dtype=dtype) if embedded else None
        inputs = 5 if embedded else vocabulary
        layers = getattr(rnnfast, kind)
        self.layers = layers(inputs, hidden, tokens=not embedded, **options).eval()
        self.head = nn.Linear(hidden, vocabulary, bias=bias, dtype=dtype)
        with torch.no_grad():
            for weight in self.layers.parameters():
                weight.mul_(3)
            self.head.weight.mul_(12)

    @torch.no_grad()
    def run(self, prompts, choice, chunks, seed=3):
        generator = torch.Generator().manual_seed(seed)
        parts = (self.layers, self.head, self.embedding)
        return torch.cat(list(continue_tokens(*parts, prompts, choice, generator, chunks)), 1)

    @torch.no_grad()
    def plain_loop(self, prompts, choice, count, seed=3):
        """The choices of torch.nn's layers, which read the whole sequence again for each token."""
        mode = self.layers.mode.split("_")
        theirs = getattr(nn, mode[0])(
            self.layers.input_size,
            self.layers.hidden_size,
            self.layers.num_layers,
            bias=self.layers.bias,
            dtype=self.head.weight.dtype,
            **({"nonlinearity": mode[1].lower()} if mode[0] == "RNN" else {}),
        )
        theirs.load_state_dict(self.layers.state_dict())
        uniforms = torch.rand(
            count, len(prompts), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        rows = []
        for b, prompt in enumerate(prompts):
            text = prompt.tolist()
            for n in range(count):
                tokens = torch.tensor(text)
                if self.embedding is None:
                    x = F.one_hot(tokens, self.layers.input_size).to(self.head.weight.dtype)
                else:
                    x = self.embedding(tokens)
                scores = self.head(theirs(x)[0][-1])
                if choice.temperature == 0:
                    text.append(scores.argmax().item())
                    continue
                steps = kept(scores, choice).cumsum(0)
                text.append(int((steps <= uniforms[n, b]).sum()))
            rows.append(text[len(prompt) :])
        return torch.tensor(rows)


SHAPES = {
    "small": {"vocabulary": 7, "hidden": 3},
    "odd": {"vocabulary": 33, "hidden": 21, "num_layers": 2},
    "no biases": {"vocabulary": 12, "hidden": 8, "bias": False},
    "tokens": {"vocabulary": 20, "hidden": 17, "embedded": False, "num_layers": 3},
}


@choices
@pytest.mark.parametrize("backend", ["fused", "aten", "reference"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_runs_equal_a_plain_loop(kind, shape, backend, choice):
    model = Model(kind, dtype=torch.float64, backend=backend, **shape)
    prompts = [torch.randint(shape["vocabulary"], (n,)) for n in (3, 1, 5, 3)]
    expected = model.plain_loop(prompts, choice, 12)
    assert len(expected.unique()) > 1
    assert torch.equal(model.run(prompts, choice, [12]), expected)
    assert torch.equal(model.run(prompts, choice, [1, 4, 7]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_dtypes_and_instruction_sets(kind, dtype, device):
    """The greedy choices agree with the loop's, unless the logits are almost equal."""
    if is_emulated():
        states, head = [torch.zeros(1, 1, 3)] * 2, torch.zeros(2, 3)
        weights = [torch.zeros(2, 12), torch.zeros(12, 3)]
        lstm = backend.CELL_KINDS["lstm"]
        with pytest.raises(RuntimeError, match="kernels in use cannot generate"):
            backend.EXTENSION.Generation(lstm, weights, False, states, head, None, 1, 0, 1)
        return
    model = Model(kind, 40, 37, dtype=dtype, num_layers=2)
    prompts = [torch.randint(40, (4,)) for _ in range(11)]
    tokens = model.run(prompts, Sampling(0.0), [8])
    tolerance = 1e-4 if dtype is torch.float32 else 0.25
    for prompt, row in zip(prompts, tokens, strict=True):
        whole = torch.cat([prompt, row])
        y, _ = model.layers(model.embedding(whole[:-1]).unsqueeze(0))
        scores = model.head(y)[0, len(prompt) - 1 :].float()
        reached = scores.gather(1, row.unsqueeze(1)).squeeze(1)
        assert (scores.max(1).values - reached).max() <= tolerance
        assert scores.std() > 1


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("batch", [1, 13])
def test_threads_agree(count, batch, threads):
    model = Model("LSTM", 50, 150, dtype=torch.float32, num_layers=2)
    prompts, results = [torch.randint(50, (2,)) for _ in range(batch)], []
    for number in (1, count):
        torch.set_num_threads(number)
        results.append(model.run(prompts, Sampling(), [20]))
    assert torch.equal(*results)


def test_the_fused_run_is_one_call(monkeypatch):
    model = Model("LSTM", 20, 16, dtype=torch.float32, num_layers=2)
    prompt = [torch.tensor([1])]
    expected = model.run(prompt, Sampling(), [30])
    monkeypatch.setattr(nn.Linear, "forward", None)
    monkeypatch.setattr(rnnfast.LSTM, "forward", None)
    assert torch.equal(model.run(prompt, Sampling(), [30]), expected)


def test_hooks_are_obeyed():
    model = Model("LSTM", 20, 16, dtype=torch.float32)
    model.head.register_forward_hook(lambda module, arguments, y: y.index_fill(1, FIFTH, 1e4))
    assert (model.run([torch.tensor([1])], Sampling(), [9]) == FIFTH).all()


@pytest.mark.parametrize("ours", [True, False])
def test_a_large_vocabulary_and_few_tokens(ours, monkeypatch):
    """The loop is used if setting up a fused run would take longer."""
    monkeypatch.setattr(generation, "_SETTING_UP", 1 if ours else 10**6)
    model = Model("GRU", 600, 16, dtype=torch.float64)
    prompts = [torch.tensor([1, 5]), torch.tensor([2])]
    expected = model.plain_loop(prompts, Sampling(), 7)
    assert torch.equal(model.run(prompts, Sampling(), [7]), expected)


def test_threads_of_one_run_take_turns():
    model = Model("GRU", 20, 16, dtype=torch.float32)
    weights = list(model.layers._flat_weights)
    weights[0] = (model.embedding.weight @ model.layers.weight_ih_l0.t()).detach()
    states = [torch.zeros(1, 2, 16)]
    head = model.head
    run = backend.EXTENSION.Generation(
        backend.CELL_KINDS["gru"], weights, True, states, head.weight, head.bias, 1.0, 0, 1.0
    ).run
    uniforms = torch.rand(30, 2, dtype=torch.float64)
    with ThreadPoolExecutor(4) as threads:
        each = [threads.submit(run, torch.zeros(2, dtype=torch.int64), uniforms) for _ in range(40)]
    assert all(0 <= found.result().min() <= found.result().max() < 20 for found in each)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_a_run_refuses_scores_that_are_not_finite(backend):
    model = Model("GRU", 20, 16, dtype=torch.float32, backend=backend)
    with torch.no_grad():
        model.head.bias[3] = math.nan
    with pytest.raises(ValueError, match="scores are not finite"):
        model.run([torch.tensor([1])], Sampling(), [5])


# ---- CharLSTM ----


def small(**options):
    options = {"embedding_size": 16, "vocabulary": VOCABULARY, **options}
    model = CharLSTM(len(VOCABULARY), 32, **options)
    with torch.no_grad():
        model.head.weight.mul_(6)
    return model


def test_the_shape_of_the_prompt_is_kept():
    model = small()
    assert model.generate(torch.tensor([1, 2, 3]), 5).shape == (5,)
    assert model.generate(torch.tensor([[1, 2, 3], [3, 2, 1]]), 5).shape == (2, 5)
    assert model.generate(torch.tensor([[1, 2, 3]]), 0).shape == (1, 0)
    assert model.generate("the", 0) == ""
    assert model.generate(["the", "a"], 0) == ["", ""]


@pytest.mark.parametrize("lstm", [rnnfast.LSTM, nn.LSTM])
def test_a_batch_is_its_rows(lstm):
    model = small(lstm=lstm)
    prompts = ["the cat", "o", "on the mat;", "cat", "s"]
    together = model.generate(prompts, 30, greedy=True)
    assert together == [model.generate(prompt, 30, greedy=True) for prompt in prompts]
    tokens = torch.stack([VOCABULARY.encode(text) for text in ("the", "cat")])
    rows = [model.generate(row, 9, greedy=True) for row in tokens]
    assert torch.equal(model.generate(tokens, 9, greedy=True), torch.stack(rows))


def test_both_classes_of_layers_choose_the_same():
    ours, theirs = small(), small(lstm=nn.LSTM)
    theirs.load_state_dict(ours.state_dict())
    for options in (
        {"greedy": True},
        {"seed": 1},
        {"seed": 2, "top_k": 3},
        {"top_p": 0.5, "seed": 3},
    ):
        assert ours.generate("the", 60, **options) == theirs.generate("the", 60, **options)


def test_seeds_and_generators():
    model = small()
    seeded = model.generate("the", 40, seed=1)
    assert seeded == model.generate("the", 40, seed=1)
    assert seeded != model.generate("the", 40, seed=2)
    assert seeded == model.generate("the", 40, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(1)
    assert seeded == model.generate("the", 40)
    assert seeded != model.generate("the", 40)


def test_low_temperatures_approach_the_likeliest():
    model = small()
    greedy = model.generate("the ", 30, greedy=True)
    assert model.generate("the ", 30, 1e-4, seed=0) == greedy
    assert model.generate("the ", 30, top_k=1, seed=0) == greedy
    assert model.generate("the ", 30, top_p=1e-9, seed=0) == greedy
    assert model.generate("the ", 30, 50.0, seed=0) != greedy


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 200])
def test_pieces_are_the_whole(length):
    model, pieces, tokens = small(), [], []
    text = model.generate("the", length, seed=1, callback=pieces.append)
    assert "".join(pieces) == text == model.generate("the", length, seed=1)
    assert len(text) == length
    assert len(pieces) == math.ceil(length / 32)
    prompt = VOCABULARY.encode("the")
    whole = model.generate(prompt, length, seed=1, callback=tokens.append)
    assert torch.equal(torch.cat([*tokens, prompt[:0]]), whole)
    assert VOCABULARY.decode(whole) == text


def test_a_callback_of_several_prompts():
    model, pieces = small(), []
    texts = model.generate(["the", "a cat"], 70, seed=1, callback=pieces.append)
    assert ["".join(parts) for parts in zip(*pieces, strict=True)] == texts


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("at", [0, 7, 30, 31, 63, 90])
def test_stop(at, size):
    model = small()
    whole = model.generate("the", 100, 2.0, seed=4)
    stop = whole[at : at + size]
    expected, pieces = whole[: whole.index(stop)], []
    text = model.generate("the", 100, 2.0, seed=4, stop=stop, callback=pieces.append)
    assert text == expected
    assert "".join(pieces) == expected


def test_a_stop_that_does_not_come_or_only_begins_to():
    model = small()
    whole = model.generate("the", 50, seed=4)
    for stop in ("mmmmm", whole[-3:] + "mmmmm"):
        assert stop not in whole
        pieces = []
        assert model.generate("the", 50, seed=4, stop=stop, callback=pieces.append) == whole
        assert "".join(pieces) == whole


def test_every_prompt_stops_by_itself():
    model = small()
    prompts = ["the", "a cat", "on"]
    whole = model.generate(prompts, 90, 2.0, seed=5)
    stop = whole[1][40:42]
    expected = [text[: text.index(stop)] if stop in text else text for text in whole]
    assert model.generate(prompts, 90, 2.0, seed=5, stop=stop) == expected


# ---- words ----

WORDS = WordVocabulary("the cat sat on a mat, and slept.", unknown="<unk>", special=("<end>",))


def of_words():
    model = CharLSTM(len(WORDS), 32, embedding_size=16, vocabulary=WORDS)
    with torch.no_grad():
        model.head.weight.mul_(6)
    return model


@pytest.mark.parametrize("length", [0, 1, 2, 31, 32, 33, 64, 100])
def test_pieces_of_words_are_the_text_that_the_vocabulary_writes(length):
    model, pieces = of_words(), []
    text = model.generate("the cat", length, seed=1, callback=pieces.append)
    tokens = model.generate(WORDS.encode("the cat"), length, seed=1)
    assert "".join(pieces) == text == WORDS.decode(tokens)
    assert text == model.generate("the cat", length, seed=1)
    assert len(text.split()) == length
    assert len(pieces) == math.ceil(length / 32)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("at", [0, 7, 30, 31, 32, 63, 90])
def test_stop_at_words(at, size):
    model, pieces = of_words(), []
    words = model.generate("the cat", 100, 2.0, seed=4).split()
    stop = " ".join(words[at : at + size])
    whole = " ".join(words)
    expected = whole[: whole.index(stop)]
    found = model.generate("the cat", 100, 2.0, seed=4, stop=stop, callback=pieces.append)
    assert found == "".join(pieces) == expected


def test_several_texts_of_words_stop_by_themselves():
    model, pieces, prompts = of_words(), [], ["the cat", "a mat", "slept"]
    whole = model.generate(prompts, 90, 2.0, seed=5)
    expected = [text.split(" mat")[0] for text in whole]
    assert len({len(text) for text in expected}) > 1
    found = model.generate(prompts, 90, 2.0, seed=5, stop=" mat", callback=pieces.append)
    assert found == expected == ["".join(parts) for parts in zip(*pieces, strict=True)]


def test_a_stop_may_be_a_special_symbol():
    model = of_words()
    whole = model.generate("the", 100, 3.0, seed=1)
    assert "<end>" in whole
    assert model.generate("the", 100, 3.0, seed=1, stop="<end>") == whole.split("<end>")[0]


@pytest.mark.parametrize(
    ("stop", "written"),
    [("mat,", "mat ,"), ("the  cat", "the cat"), ("\n", ""), ("dog", "<unk>")],
)
def test_a_stop_that_the_vocabulary_never_writes(stop, written):
    words = re.escape(
        f"the stop {stop!r} cannot occur: the vocabulary writes {stop!r} as {written!r}"
    )
    with pytest.raises(TextError, match=words):
        of_words().generate("the", 3, stop=stop)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_and_nothing_is_dropped(training):
    model = small(dropout=0.5).train(training)
    assert model.generate("the", 20, seed=1) == model.generate("the", 20, seed=1)
    assert model.training is model.lstm.training is training

    def fail(_):
        raise KeyError

    with pytest.raises(KeyError):
        model.generate("the", 20, callback=fail)
    assert model.training is model.lstm.training is training


def test_parts_keep_their_own_mode():
    model = small(dropout=0.5)
    model.embedding.eval()
    model.generate("the", 3)
    assert model.training
    assert not model.embedding.training


def test_autocast():
    model = small()
    with torch.autocast("cpu", torch.bfloat16):
        assert len(model.generate(["the cat", "o"], 9, seed=1)[0]) == 9


def test_generated_tokens_can_be_trained_on():
    model = small()
    tokens = model.generate(torch.tensor([[1, 2]]), 4)
    model(tokens)[0].sum().backward()
    assert model.embedding.weight.grad is not None


def test_tied_weights():
    model = small(embedding_size=None, tied_weights=True)
    assert model.embedding.weight is model.head.weight
    assert len(list(model.parameters())) == 2 + 8
    tokens = VOCABULARY.encode("the cat").unsqueeze(0)
    model(tokens)[0].sum().backward()
    assert model.embedding.weight.grad.abs().sum() > 0
    y, _ = model.lstm(F.embedding(tokens, model.head.weight))
    torch.testing.assert_close(model(tokens)[0], F.linear(y, model.head.weight, model.head.bias))
    with pytest.raises(ValueError, match="tied_weights needs embedding_size to be hidden_size"):
        small(tied_weights=True)


@pytest.mark.parametrize(
    ("prompt", "length", "options", "words"),
    [
        ("", 1, {}, "at least one token"),
        (["the", ""], 1, {}, "at least one token"),
        ([], 1, {}, "at least one token"),
        (torch.zeros(2, 0, dtype=torch.int64), 1, {}, "at least one token"),
        (torch.zeros(1, 1, 1, dtype=torch.int64), 1, {}, "shape"),
        (torch.tensor(3), 1, {}, "shape"),
        ("the", -1, {}, "length must not be negative"),
        ("the", 1, {"temperature": 0.0}, "greater than zero and finite, got 0.0; .*greedy"),
        ("the", 1, {"temperature": -0.1}, "greater than zero"),
        ("the", 1, {"temperature": math.nan}, "greater than zero"),
        ("the", 1, {"temperature": math.inf}, "greater than zero"),
        ("the", 1, {"top_k": 0}, "top_k must be at least 1, got 0"),
        ("the", 1, {"top_p": 0.0}, "top_p must be above 0"),
        ("the", 1, {"top_p": 1.5}, "at most 1, got 1.5"),
        ("the", 1, {"greedy": True, "top_k": 2}, "say nothing"),
        ("the", 1, {"seed": 1, "generator": torch.Generator()}, "expected one of them"),
        ("the", 1, {"stop": ""}, "at least one character"),
        (torch.tensor([1]), 1, {"stop": "a"}, "stop must be a text"),
        ("the", 1, {"stop": "A"}, "lacks 'A'"),
        ("THE", 1, {}, "lacks 'E', 'H', 'T'"),
    ],
)
def test_refusals(prompt, length, options, words):
    with pytest.raises(ValueError, match=words) as refusal:
        small().generate(prompt, length, **options)
    assert isinstance(refusal.value, TextError) is ("lacks" in words)


def test_numbers_that_are_no_integers():
    with pytest.raises(TypeError):
        small().generate("the", 1, top_k=2.5)
    with pytest.raises(TypeError, match=r"integers, got torch\.float32"):
        small().generate(torch.tensor([1.0]), 1)
    model, tokens = small(), torch.tensor([1, 2])
    assert torch.equal(
        model.generate(tokens.int(), 5, greedy=True), model.generate(tokens, 5, greedy=True)
    )
    small().generate("the", 1, top_k=10**30)


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("prompt", [[1, 99], [99], [-1]])
def test_tokens_that_do_not_exist(backend, prompt):
    with pytest.raises(IndexError, match="index out of range"):
        small(backend=backend).generate(torch.tensor(prompt), 3)


def test_a_model_without_a_vocabulary_continues_tokens_only():
    model = small(vocabulary=None)
    assert model.generate(torch.tensor([1]), 3).shape == (3,)
    with pytest.raises(ValueError, match="without a vocabulary"):
        model.generate("the", 3)
