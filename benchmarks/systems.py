"""Compares tokens, generation and Jordan networks with the usual ways.

Run it with `python -m benchmarks.systems`. It compares:

tokens      a layer that reads tokens (``tokens=True``) with one-hot vectors; and a layer that is
            given an embedding (``embedding=``) with the embedding followed by the layer, of rnnfast
            or torch.nn. Tokens follow Zipf's law, as words do, or are uniform.
generation  CharLSTM.generate with a loop of embedding, nn.LSTM, linear, softmax and multinomial.
jordan      JordanRNN, which runs as an Elman layer, with a loop over its definition.

Results are compared first. Times are the minimum of calls timed in turn.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rnnfast
from benchmarks import machine
from benchmarks.steps import MODES
from benchmarks.timing import time_in_turn
from rnnfast.models import CharLSTM, JordanRNN

Functions = dict[str, Callable[[], Any]]
TOKENS = ((100, "zipf"), (10_000, "zipf"), (10_000, "uniform"))
JORDAN = ((100, 1, 64, 64, 10), (100, 16, 64, 64, 10), (100, 32, 128, 256, 256))  # T, B, I, H, O
GREEDY = 200  # number of greedy tokens that are compared


def draw_tokens(vocabulary: int, law: str, T: int, B: int) -> Tensor:
    ranks = torch.arange(1, vocabulary + 1, dtype=torch.float64)
    weights = 1 / ranks if law == "zipf" else torch.ones_like(ranks)
    return torch.multinomial(weights, T * B, replacement=True).view(T, B)


def in_mode(call: Callable[[], Tensor], modules: list[nn.Module], mode: str) -> Callable[[], Any]:
    if mode == "inference":
        return torch.inference_mode()(call)

    def train() -> None:
        for module in modules:
            module.zero_grad(set_to_none=True)
        y = call()
        y.backward(torch.ones_like(y))

    return train


def assert_same(calls: dict[str, Callable[[], Tensor]]) -> None:
    first, *others = (call().detach() for call in calls.values())
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-3, atol=1e-4)


def token_rows(T: int, B: int, H: int) -> Iterator[tuple[str, Functions, dict[str, str]]]:
    """Yields for each case its name, the functions to time, and the ratios {numerator: divisor}."""
    for vocabulary, law in TOKENS:
        torch.manual_seed(0)
        tokens = draw_tokens(vocabulary, law, T, B)
        reader = rnnfast.LSTM(vocabulary, H, tokens=True, backend="fused")
        vectors = rnnfast.LSTM(vocabulary, H, backend="fused")
        vectors.load_state_dict(reader.state_dict())
        embedding, theirs = nn.Embedding(vocabulary, H), nn.LSTM(H, H)
        ours = rnnfast.LSTM(H, H, backend="fused")
        ours.load_state_dict(theirs.state_dict())
        one_hot: dict[str, Callable[[], Tensor]] = {
            "one-hot": lambda vectors=vectors, tokens=tokens, vocabulary=vocabulary: vectors(
                F.one_hot(tokens, vocabulary).float()
            )[0],
            "tokens": lambda reader=reader, tokens=tokens: reader(tokens)[0],
        }
        embedded: dict[str, Callable[[], Tensor]] = {
            "nn.Embedding, nn.LSTM": lambda e=embedding, l=theirs, tokens=tokens: l(e(tokens))[0],
            "nn.Embedding, rnnfast": lambda e=embedding, l=ours, tokens=tokens: l(e(tokens))[0],
            "embedding=": lambda e=embedding, l=ours, tokens=tokens: l(tokens, embedding=e)[0],
        }
        assert_same(one_hot)
        assert_same(embedded)
        modules = [reader, vectors, embedding, theirs, ours]
        for mode in MODES:
            functions = {
                name: in_mode(call, modules, mode) for name, call in (one_hot | embedded).items()
            }
            ratios = {
                "one-hot": "tokens",
                "nn.Embedding, nn.LSTM": "embedding=",
                "nn.Embedding, rnnfast": "embedding=",
            }
            yield f"tokens {mode} V={vocabulary} {law} {T},{B},{H}", functions, ratios


class PlainLoop:
    """Generates one character at a time in Python, with torch.nn's layers."""

    def __init__(self, model: CharLSTM) -> None:
        self.embedding, self.head = model.embedding, model.head
        config = model.config
        sizes = (config.embedding_size, config.hidden_size, config.num_layers)
        self.lstm = nn.LSTM(*sizes, batch_first=True)
        self.lstm.load_state_dict(model.lstm.state_dict())

    @torch.no_grad()
    def __call__(self, start: int, length: int, greedy: bool = False) -> list[int]:
        token, state, tokens = torch.tensor([[start]]), None, []
        for _ in range(length):
            y, state = self.lstm(self.embedding(token), state)
            scores = self.head(y[:, -1])
            if greedy:
                token = scores.argmax(1, keepdim=True)
            else:
                token = torch.multinomial(scores.softmax(1), 1)
            tokens.append(token.item())
        return tokens


def generation_row(
    vocabulary: int, H: int, layers: int, ours: int, theirs: int
) -> tuple[str, Functions, dict[str, str]]:
    """Returns a row like `token_rows`.

    `ours` and `theirs` are the numbers of tokens in a timed call; `main` divides by them.
    """
    torch.manual_seed(0)
    model = CharLSTM(vocabulary, H, layers).eval()
    loop, start = PlainLoop(model), torch.tensor([1])
    expected = loop(1, GREEDY, greedy=True)
    if model.generate(start, GREEDY, greedy=True).tolist() != expected:
        raise AssertionError("the greedy tokens are not those of the plain loop")
    functions: Functions = {
        "loop": lambda: loop(1, theirs),
        "generate": lambda: model.generate(start, ours),
    }
    return f"generation V={vocabulary} H={H} layers={layers}", functions, {"loop": "generate"}


def jordan_rows() -> Iterator[tuple[str, Functions, dict[str, str]]]:
    for T, B, I, H, O in JORDAN:
        torch.manual_seed(0)
        model, x = JordanRNN(I, H, O, backend="fused"), torch.randn(B, T, I)

        def loop(model: JordanRNN = model, x: Tensor = x) -> Tensor:
            y, outputs = model.init_hidden(len(x)), []
            for x_t in x.unbind(1):
                y = model.h2o(torch.tanh(model.i2h(x_t) + model.o2h(y)))
                outputs.append(y)
            return torch.stack(outputs, 1)

        def folded(model: JordanRNN = model, x: Tensor = x) -> Tensor:
            return model(x)[0]

        calls = {"loop": loop, "folded": folded}
        assert_same(calls)
        for mode in MODES:
            functions = {name: in_mode(call, [model], mode) for name, call in calls.items()}
            yield f"jordan {mode} {T},{B},{I},{H},{O}", functions, {"loop": "folded"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("tokens", "generation", "jordan"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--min-time", type=float, default=1.0, help="seconds per call and case")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds, at least")
    parser.add_argument(
        "--size", default="100,32,256", metavar="T,B,H", help="of the layers that read tokens"
    )
    parser.add_argument("--generate-hidden", type=int, default=512, metavar="H")
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    per_call = {"loop": 20, "generate": 1000}

    def cases() -> Iterator[tuple[str, Functions, dict[str, str]]]:
        if args.only in (None, "tokens"):
            yield from token_rows(*map(int, args.size.split(",")))
        if args.only in (None, "generation"):
            H, ours, theirs = args.generate_hidden, per_call["generate"], per_call["loop"]
            yield generation_row(100, H, 2, ours, theirs)
        if args.only in (None, "jordan"):
            yield from jordan_rows()

    rows = []
    for name, functions, divided in cases():
        timings = time_in_turn(functions, lambda: None, args.min_time, args.repeats)
        generates = name.startswith("generation")
        seconds = {
            each: timing.min / (per_call[each] if generates else 1)
            for each, timing in timings.items()
        }
        ratios = {f"{a} / {b}": seconds[a] / seconds[b] for a, b in divided.items()}
        rows.append({"case": name, "seconds": seconds, "ratios": ratios})
        print(name + (", seconds per token" if generates else ""))
        print("  ", "  ".join(f"{each} {1e3 * value:.4g} ms" for each, value in seconds.items()))
        print("  ", "  ".join(f"{each} {value:.2f}" for each, value in ratios.items()), flush=True)
    if args.json:
        command = "python -m benchmarks.systems " + " ".join(argv or sys.argv[1:])
        content = {"machine": machine.describe("cpu"), "command": command, "rows": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
