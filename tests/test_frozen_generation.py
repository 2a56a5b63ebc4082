"""Frozen language models and sequence-to-sequence models: what they write."""

from __future__ import annotations

import copy
import math
from itertools import product
from typing import Any

import pytest
import torch
from covering import quick_pairs
from frozen_cases import bound_of, every_type
from targets import FROZEN, check_on, running_on
from torch import Tensor, nn

import rnnfast
from rnnfast import backend, generation
from rnnfast.frozen import TYPES, FrozenLayers
from rnnfast.generation import Sampling, continue_tokens
from rnnfast.models import CharLSTM
from rnnfast.models.seq2seq import Seq2SeqLSTM
from rnnfast.text import CharVocabulary

VOCABULARY = CharVocabulary("the cat sat on the mat; ")
CHOICES = [Sampling(0.0), Sampling(), Sampling(1.3, 6, 0.8)]
SHAPES: dict[str, dict[str, Any]] = {
    "small": {"vocabulary": 7, "hidden": 3},
    "odd": {"vocabulary": 33, "hidden": 21, "num_layers": 2},
    "no biases": {"vocabulary": 12, "hidden": 40, "bias": False},
    "tokens": {"vocabulary": 20, "hidden": 17, "embedded": False, "num_layers": 3},
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
KINDS = ["RNN", "GRU", "LSTM"]
kinds = pytest.mark.parametrize("kind", KINDS)


class Model(nn.Module):
    """Layers, head and embedding with logits so different that rounding changes no choice."""

    def __init__(
        self, kind: str, vocabulary: int, hidden: int, *, embedded: bool = True, **options: Any
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 5) if embedded else None
        inputs = 5 if embedded else vocabulary
        layers = getattr(rnnfast, kind)
        self.layers = layers(inputs, hidden, tokens=not embedded, batch_first=True, **options)
        self.head = nn.Linear(hidden, vocabulary)
        with torch.no_grad():
            for weight in self.layers.parameters():
                weight.mul_(3)
            self.head.weight.mul_(12)
        self.eval().requires_grad_(False)


def run(model: Any, prompts: list[Tensor], choice: Sampling, chunks: list[int]) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    parts = (model.layers, model.head, model.embedding)
    return torch.cat(list(continue_tokens(*parts, prompts, choice, generator, chunks)), 1)


def fused_run(model: Any, prompts: list[Tensor], choice: Sampling, chunks: list[int]) -> Tensor:
    """The same in the extension on any target, as `continue_tokens` does on those of this CPU."""
    layers, embedding = model.layers, model.embedding
    states = generation._read_prompts(layers, embedding, prompts)
    fused = generation._Fused(layers, model.head, embedding, states, choice)
    latest = torch.stack([prompt[-1] for prompt in prompts])
    generator, found = torch.Generator().manual_seed(3), []
    for count in chunks:
        uniforms = torch.rand(count, len(prompts), dtype=torch.float64, generator=generator)
        found.append(fused(latest, uniforms))
        latest = found[-1][:, -1]
    return torch.cat(found, 1)


def loop(model: Any, prompts: list[Tensor], choice: Sampling, count: int) -> Tensor:
    """The choices after calls of the frozen layers, one for each step and sequence."""
    layers, uniforms = (
        model.layers,
        torch.rand(
            count, len(prompts), dtype=torch.float64, generator=torch.Generator().manual_seed(3)
        ),
    )
    rows = []
    for b, prompt in enumerate(prompts):
        text, state = prompt.tolist(), None
        for token in text:
            y, state = step(model, layers, token, state)
        for n in range(count):
            scores = model.head(y)
            chosen = generation.sample(scores, choice, uniforms[n, b : b + 1]).item()
            text.append(chosen)
            y, state = step(model, layers, chosen, state)
        rows.append(text[len(prompt) :])
    return torch.tensor(rows)


def step(model: Any, layers: Any, token: int, state: Any) -> tuple[Tensor, Any]:
    x = torch.tensor([[token]])
    y, state = layers(x if model.embedding is None else model.embedding(x), state)
    return y[:, -1], state


def prompts_for(vocabulary: int) -> list[Tensor]:
    return [torch.randint(vocabulary, (n,)) for n in (3, 1, 5, 3)]


@quick_pairs(kind=KINDS, shape=[*SHAPES], weights=[*TYPES])
def test_runs_equal_a_loop_of_steps(kind: str, shape: str, weights: str) -> None:
    """Greedy, and sampled with given uniforms, in one call and in several."""
    sizes = SHAPES[shape]
    model, prompts = Model(kind, **sizes), prompts_for(sizes["vocabulary"])

    def check(_: str) -> None:
        frozen = rnnfast.freeze(model, weights)
        for choice in CHOICES:
            expected = loop(frozen, prompts, choice, 12)
            assert len(expected.unique()) > 1
            for chunks in ([12], [1, 4, 7]):
                assert torch.equal(run(frozen, prompts, choice, chunks), expected)
                assert torch.equal(fused_run(frozen, prompts, choice, chunks), expected)

    check_on(FROZEN, check)


@every_type
@kinds
def test_scores_are_those_of_the_rounded_weights(kind: str, weights: str) -> None:
    """Every choice has the highest score of torch.nn's layers in float64, or nearly so."""
    model = Model(kind, 40, 37, num_layers=2)
    prompts = [torch.randint(40, (4,)) for _ in range(11)]

    def check(_: str) -> None:
        frozen = rnnfast.freeze(model, weights)
        exact = getattr(nn, kind)(5, 37, 2, batch_first=True)
        exact.load_state_dict(
            {n: each.dense() for n, each in frozen.layers.unpacked().items()}
            | {n: value for n, value in model.layers.state_dict().items() if "bias" in n}
        )
        exact, head = exact.double(), copy.deepcopy(model.head).double()
        # two scores, each with the errors of all h
        bound = 2 * bound_of(weights) * head.weight.abs().sum(1).max()
        with torch.no_grad():
            for prompt, row in zip(
                prompts, fused_run(frozen, prompts, CHOICES[0], [8]), strict=True
            ):
                y, _ = exact(model.embedding(torch.cat([prompt, row])[None, :-1]).double())
                scores = head(y)[0, len(prompt) - 1 :]
                reached = scores.gather(1, row.unsqueeze(1)).squeeze(1)
                assert (scores.max(1).values - reached).max() <= bound
                assert scores.std() > 1

    check_on(FROZEN, check)


@shapes
def test_float32_writes_what_the_model_writes(shape: dict[str, Any]) -> None:
    model, prompts = Model("LSTM", **shape), prompts_for(shape["vocabulary"])
    frozen = rnnfast.freeze(model)
    for choice in CHOICES:
        assert torch.equal(run(frozen, prompts, choice, [20]), run(model, prompts, choice, [20]))


@every_type
@pytest.mark.parametrize("batch", [1, 13])
def test_threads_agree(batch: int, weights: str, threads: None) -> None:
    model = rnnfast.freeze(Model("LSTM", 50, 150, num_layers=2), weights)
    prompts, results = [torch.randint(50, (2,)) for _ in range(batch)], []
    for number in (1, 2, 3, 7):
        torch.set_num_threads(number)
        results.append(fused_run(model, prompts, Sampling(), [9, 11]))
    assert all(torch.equal(one, results[0]) for one in results)


def test_a_run_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in SHAPES.values():
        model = rnnfast.freeze(Model("GRU", **shape), "int8")
        expected = run(model, [torch.tensor([1])], Sampling(), [30])
        with monkeypatch.context() as changed:
            changed.setattr(nn.Linear, "forward", None)
            changed.setattr(FrozenLayers, "forward", None)
            assert torch.equal(run(model, [torch.tensor([1])], Sampling(), [30]), expected)


def test_what_only_a_loop_can_run() -> None:
    """Hooks, a head of another type, and autocast."""
    model, prompts = rnnfast.freeze(Model("LSTM", 20, 16), "int8"), [torch.tensor([1])]
    fifth = torch.tensor(4)
    hook = model.head.register_forward_hook(lambda *a: a[-1].index_fill(1, fifth, 1e4))
    assert (run(model, prompts, Sampling(), [9]) == fifth).all()
    hook.remove()
    model.layers.register_forward_hook(lambda *a: (0 * a[-1][0], a[-1][1]))
    assert len(run(model, prompts, Sampling(0.0), [9]).unique()) == 1
    model = rnnfast.freeze(Model("LSTM", 20, 16), "int8")
    with torch.autocast("cpu", torch.bfloat16):
        assert run(model, prompts, Sampling(), [9]).shape == (1, 9)


def test_errors() -> None:
    model, prompts = rnnfast.freeze(Model("GRU", 20, 16), "int8"), [torch.tensor([1])]
    with pytest.raises(IndexError, match="index out of range"):
        run(model, [torch.tensor([1, 20])], Sampling(), [3])
    with pytest.raises(IndexError, match="index out of range"):
        run(model, [torch.tensor([20])], Sampling(), [3])
    model.head.bias[3] = math.nan
    with pytest.raises(ValueError, match="scores are not finite"):
        run(model, prompts, Sampling(), [3])


def test_weights_that_do_not_fit_are_refused() -> None:
    extension: Any = backend.EXTENSION
    reads = rnnfast.freeze(Model("GRU", 20, 16, embedded=False, num_layers=2), "int8").layers
    vectors = rnnfast.freeze(Model("GRU", 20, 16), "int8").layers
    good, states, head = reads._blocks(), [torch.zeros(2, 1, 16)], torch.zeros(20, 16)
    gru = backend.CELL_KINDS["gru"]

    def make(weights: list[Tensor], biases: bool = False, head: Tensor = head, **more: Any) -> None:
        given = more.get("states", states)
        extension.Generation(gru, weights, biases, given, head, None, 1.0, 0, 1.0)

    make(good)
    doubles = [torch.zeros(2, 1, 16, dtype=torch.float64)]
    for call, words in (
        (lambda: make([vectors._blocks()[0], *good[1:]]), "as a table of tokens, got"),
        (lambda: make([*good[:2], good[0], good[3]]), "expected weights of shape"),
        (lambda: make(good, head=torch.zeros(21, 16)), r"expected weights of shape \(3\*16, 21\)"),
        (lambda: make(good, True), "no biases beside packed weights|expected 4 tensors"),
        (lambda: make(good, states=doubles), "expected float32 states with packed weights"),
        (lambda: make([*good[:2], good[2][:-1].clone(), good[3]]), "damaged"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=words):
            call()


# ---- models ----


def char_lstm(**options: Any) -> CharLSTM:
    options = {"embedding_size": 16, "vocabulary": VOCABULARY, **options}
    model = CharLSTM(len(VOCABULARY), 32, **options)
    with torch.no_grad():
        model.head.weight.mul_(6)
    return model


@every_type
def test_char_lstm(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({}, {"embedding_size": None, "tied_weights": True}, {"lstm": nn.LSTM}):
        model: Any = rnnfast.freeze(char_lstm(**options), weights)
        prompts = ["the cat", "o", "on the mat;"]
        for choice in ({"greedy": True}, {"seed": 1}, {"seed": 2, "top_k": 3}):
            texts = model.generate(prompts, 50, **choice)
            with monkeypatch.context() as changed:
                changed.setattr(generation, "_fuses", lambda *_: False)
                assert model.generate(prompts, 50, **choice) == texts
        pieces: list[str] = []
        text = model.generate("the", 100, seed=4, stop="at", callback=pieces.append)
        assert "".join(pieces) == text
        tokens = torch.stack([VOCABULARY.encode("the cat")] * 40)
        logits, (h, c) = model(tokens)
        expected, _ = model.lstm(model.embedding(tokens))
        assert torch.equal(logits, model.head(expected))
        assert h.shape == c.shape == (2, 40, 32)


def test_float32_char_lstm_writes_the_same_text() -> None:
    model: Any = char_lstm()
    frozen: Any = rnnfast.freeze(model)
    for options in ({"greedy": True}, {"seed": 1}, {"top_p": 0.5, "seed": 3}):
        assert frozen.generate("the", 60, **options) == model.generate("the", 60, **options)


def test_char_lstm_that_is_frozen_in_place() -> None:
    model = char_lstm()
    before, expected = model.generate("the", 40, seed=1), rnnfast.freeze(model, "int8")
    rnnfast.accelerate(model, weights="int8", keep_float=True)
    assert model.generate("the", 40, seed=1) == expected.generate("the", 40, seed=1)
    assert model.training
    rnnfast.restore(model)
    assert model.generate("the", 40, seed=1) == before


@every_type
def test_seq2seq(weights: str) -> None:
    model = Seq2SeqLSTM(7, 6, 20, num_layers=2, reverse_source=True)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    source, lengths = torch.randint(7, (50, 12)), torch.randint(1, 13, (50,))

    def check(_: str) -> None:
        frozen: Any = rnnfast.freeze(model, weights)
        plain = Seq2SeqLSTM(7, 6, 20, num_layers=2, reverse_source=True)
        rounded = {
            f"{name}.{n}": each.dense()
            for name in ("encoder", "decoder")
            for n, each in getattr(frozen, name).unpacked().items()
        }
        plain.load_state_dict({**model.state_dict(), **rounded})
        bound = 1e-4 if weights != "int8" else 0.5
        for beam_size in (1, 3):
            found = frozen.decode(source, lengths, max_length=9, beam_size=beam_size)
            expected = plain.decode(source, lengths, max_length=9, beam_size=beam_size)
            if weights == "int8":  # what is rounded may tip the scales
                assert (found.scores - expected.scores).abs().median() < bound
            else:
                assert torch.equal(found.tokens, expected.tokens)
                torch.testing.assert_close(found.scores, expected.scores, rtol=bound, atol=bound)
        with torch.no_grad():
            target = torch.randint(6, (50, 5))
            found, expected = (m(source, target, lengths) for m in (frozen, plain.eval()))
            assert (found - expected).abs().mean() < bound
            step_by_step = frozen(source, target, lengths, teacher_forcing_ratio=0.5)
            assert step_by_step.shape == (50, 5, 6)

    check_on(FROZEN, check)


def test_seq2seq_steps_are_the_sequence() -> None:
    """The decoder's steps have the bits of one call for all symbols."""
    model: Any = rnnfast.freeze(Seq2SeqLSTM(7, 6, 20, num_layers=2), "int8")
    source, target = torch.randint(7, (50, 12)), torch.randint(6, (50, 5))
    state = model.encode(source)
    whole, _ = model._write(target, state)
    for t in range(5):
        part, state = model._write(target[:, t : t + 1], state)
        torch.testing.assert_close(part, whole[:, t : t + 1], rtol=1e-6, atol=1e-6)


def test_generation_on_other_instruction_sets_than_at_freezing() -> None:
    model = Model("LSTM", 20, 17, embedded=False, num_layers=2)
    prompts = prompts_for(20)
    for weights, (one, other) in product(TYPES, product(FROZEN, FROZEN)):
        with running_on(one):
            frozen = rnnfast.freeze(model, weights)
        with running_on(other):
            expected = fused_run(rnnfast.freeze(model, weights), prompts, Sampling(), [9])
            assert torch.equal(fused_run(frozen, prompts, Sampling(), [9]), expected)
