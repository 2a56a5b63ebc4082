"""A default device or dtype other than the model's has no effect: tensors name their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from test_modules import EXPECT_FUSED, LAYERS, pair, random_state
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.overrides import TorchFunctionMode

import rnnfast
from rnnfast import explain, models, sequences, text
from rnnfast.models import checkpoint, translation

CELLS = [(mode, "Cell") for mode in LAYERS]
BACKENDS = [None, "aten", "reference"]
ON_CPU: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}


@contextmanager
def defaults(device: str) -> Iterator[None]:
    """Sets torch's default device and dtype for this block only."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def flat(results: Any) -> list[Tensor]:
    """Returns the tensors in nested tuples, lists, dictionaries and packed sequences."""
    if isinstance(results, dict):
        results = list(results.values())
    if isinstance(results, tuple | list):
        return [tensor for result in results for tensor in flat(result)]
    return [results] if isinstance(results, Tensor) else []


def assert_unchanged(call: Callable[[], Any]) -> None:
    found = []
    for device in (None, "meta"):
        torch.manual_seed(0)
        if device is None:
            found.append(call())
        else:
            with defaults(device):
                found.append(call())
    plain, under = (flat(results) for results in found)
    assert plain or found[0] == found[1]
    for expected, actual in zip(plain, under, strict=True):
        assert actual.device.type == "cpu"
        assert actual.dtype is expected.dtype
        assert torch.equal(actual.detach(), expected.detach())


def with_gradients(module: nn.Module, call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> list[Tensor]:
        results = [result for result in flat(call()) if result.is_floating_point()]
        loss = sum(result.sin().sum() for result in results)
        return [*results, *torch.autograd.grad(loss, [*module.parameters()])]

    return run


EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lengths": {"lengths": [3, 5]},
    "lengths as array": {"lengths": np.array([3, 5])},
    "lengths as tensor": {"lengths": torch.tensor([3, 5])},
    "reset": {"reset": [[False, True]] * 5},
    "reset as tensor": {"reset": torch.tensor([[False, True]] * 5)},
}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    ("backend", "extras"),
    [
        (backend, extras)
        for backend in BACKENDS
        for extras in EXTRAS
        if backend != "aten" or "reset" not in extras  # torch's kernels have no resets
    ],
)
@pytest.mark.parametrize("mode", LAYERS)
def test_layers(mode: str, backend: str | None, extras: str, given: bool) -> None:
    options = {"num_layers": 2, "bidirectional": True}
    _, module = pair(mode, backend=backend, dtype=torch.float32, **options)
    x = torch.randn(5, 2, 3)
    hx = random_state(mode, 4, 2, 4, dtype=torch.float32) if given else None
    assert_unchanged(with_gradients(module, lambda: module(x, hx, **EXTRAS[extras])))


@pytest.mark.parametrize("reset", [[False, True, False], torch.tensor([False, True, False])])
@pytest.mark.parametrize("mode", LAYERS)
def test_single_sequences(mode: str, reset: Any) -> None:
    _, module = pair(mode, dtype=torch.float32)
    x = torch.randn(3, 3)
    assert_unchanged(with_gradients(module, lambda: module(x, reset=reset)))


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", LAYERS)
def test_packed(mode: str, backend: str | None, enforce_sorted: bool) -> None:
    _, module = pair(mode, backend=backend, dtype=torch.float32)
    packed = pack_sequence([torch.randn(n, 3) for n in (5, 2)], enforce_sorted)
    assert_unchanged(with_gradients(module, lambda: module(packed)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("mode", "suffix"), CELLS)
def test_cells(mode: str, suffix: str, backend: str | None) -> None:
    _, module = pair(mode, suffix, backend=backend, dtype=torch.float32)
    for x in (torch.randn(2, 3), torch.randn(3)):
        assert_unchanged(with_gradients(module, lambda x=x: module(x)))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [20, 150])
def test_tokens(backend: str | None, count: int, packed: bool) -> None:
    tokens = torch.randint(7, (count, 2))
    given: Any = pack_sequence([tokens[:, 0], tokens[:5, 1]]) if packed else tokens
    extras: dict[str, Any] = {} if packed else {"lengths": [count, 5]}
    one_hot = rnnfast.LSTM(7, 4, tokens=True, backend=backend, **ON_CPU)
    assert_unchanged(with_gradients(one_hot, lambda: one_hot(given, **extras)))
    embedding, layer = nn.Embedding(7, 3, **ON_CPU), rnnfast.GRU(3, 4, backend=backend, **ON_CPU)
    call = lambda: layer(given, embedding=embedding, **extras)  # noqa: E731
    assert_unchanged(with_gradients(layer, call))


def test_second_derivatives_and_cells_of_every_step() -> None:
    module = rnnfast.LSTM(3, 4, **ON_CPU)
    x = torch.randn(5, 2, 3, requires_grad=True)

    def call() -> tuple[Tensor, ...]:
        y, _, cells = module(x, return_cells=True)
        (first,) = torch.autograd.grad(y.sin().sum() + cells.sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), list(module.parameters()))

    assert_unchanged(call)


def vocabulary() -> text.CharVocabulary:
    return text.CharVocabulary("abcd ", padding="<pad>")


def char_lstm() -> models.CharLSTM:
    torch.manual_seed(1)
    return models.CharLSTM(6, 8, 16, vocabulary=vocabulary(), **ON_CPU)


def seq2seq() -> models.Seq2SeqLSTM:
    torch.manual_seed(1)
    return models.Seq2SeqLSTM(5, 6, 8, **ON_CPU)


def decoded(beam_size: int) -> Any:
    source = torch.tensor([[1, 2, 3], [3, 4, 0]], device="cpu")
    lengths = torch.tensor([3, 2], device="cpu")
    return seq2seq().decode(source, lengths, max_length=4, beam_size=beam_size)


def gates(layer: nn.Module, **extras: Any) -> list[Any]:
    with explain.record_gates(layer) as record:
        layer(torch.ones(5, 2, 3, **ON_CPU), **extras)
    return list(record.values())


def generated_on(backend: str) -> str:
    with rnnfast.use_backend(backend):
        return char_lstm().generate("ab", 20, seed=3)


def saved_and_loaded() -> list[Tensor]:
    with TemporaryDirectory() as folder:
        checkpoint.save(char_lstm(), Path(folder, "model.safetensors"))
        return list(checkpoint.load(folder).parameters())


def translated() -> list[str]:
    pairs = [("ab", "ba"), ("cd", "dc")]
    torch.manual_seed(1)
    translator = translation.Translator.for_pairs(pairs, 16, **ON_CPU)
    return translator.translate(["ab", "abcd"], beam_size=2)


MODELS: dict[str, Callable[[], Any]] = {
    "generation": lambda: char_lstm().generate("ab", 20, seed=3),
    "generation of several": lambda: char_lstm().generate(["ab", "cab"], 70, top_k=3, seed=3),
    "greedy generation": lambda: char_lstm().generate("ab", 5, greedy=True, callback=print),
    "generation on aten": lambda: generated_on("aten"),
    "CharLSTM": lambda: char_lstm()(torch.tensor([[1, 2, 3]], device="cpu")),
    "decoding": lambda: decoded(1),
    "beam search": lambda: decoded(3),
    "checkpoint": saved_and_loaded,
    "translation": translated,
    "gates": lambda: gates(rnnfast.LSTM(3, 4, **ON_CPU), lengths=[5, 2]),
    "gates with resets": lambda: gates(rnnfast.GRU(3, 4, **ON_CPU), reset=[[False, True]] * 5),
    "gradients": lambda: explain.compare_gradients(5, hidden_size=4),
    "hashed": lambda: text.hash_tokens(["a", "b"], 5),
    "encoded": lambda: vocabulary().encode("abc"),
    "padded": lambda: vocabulary().pad([[1, 2], [1]]),
    "one-hot": lambda: text.one_hot(vocabulary().encode("abc"), 6),
    "co-occurrences": lambda: text.cooccurrence(vocabulary().encode("abcab"), 6, 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_and_text(name: str) -> None:
    assert_unchanged(MODELS[name])


@pytest.mark.skipif(not EXPECT_FUSED, reason="a build without the extension has no short path")
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("suffix", ["", "Cell"])
@pytest.mark.parametrize("mode", LAYERS)
def test_calls_take_the_short_path(
    mode: str, suffix: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, module = pair(mode, suffix, dtype=torch.float32)
    for general in ("run_sequence", "run_step"):
        monkeypatch.delattr(sequences, general)
    x = torch.randn((2, 3) if suffix else (5, 2, 3))
    with torch.device(device):
        module(x)


def test_other_function_modes_are_asked() -> None:
    seen = []

    class Recorder(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    module, x = rnnfast.GRUCell(3, 4, backend="fused" if EXPECT_FUSED else None), torch.zeros(1, 3)
    for first, second in ((torch.device("cpu"), Recorder()), (Recorder(), torch.device("cpu"))):
        seen.clear()
        with first, second:
            module(x)
        assert any("gru" in str(function) for function in seen)
