"""Times whole models before and after `rnnfast.accelerate`: `python -m benchmarks.programs --help`.

The models step through time in Python, with cells of torch.nn between other modules:

tagger  The encoder of a part-of-speech tagger: two bidirectional layers of LSTMCell with recurrent
        dropout, one training step on 10 sentences of 25 words.
rssm    The recurrent state-space model of Dreamer: one training step on 16 sequences of 50 steps.
vad     A voice activity detector as Silero VAD 5: 100 chunks of 32 ms of sound, one at a time,
        without gradients.

Outputs and gradients are compared first. Then both are timed in turn, in several new processes. A
ratio is the time with torch.nn's cells divided by the time with rnnfast's. For programs without
gradients, the share is the part of the time that the model with rnnfast's cells spends in them.
"""

import argparse
import copy
import itertools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rnnfast
from benchmarks import machine
from benchmarks.suite import verdict
from benchmarks.timing import time_in_turn

Row = dict[str, Any]


class Tagger(nn.Module):
    """Two bidirectional layers of LSTMCell, whose h is dropped by one mask for all steps.

    The mask is that of Gal and Ghahramani, arXiv:1512.05287. The sizes are those of the tagger of
    Stanza (Qi et al., arXiv:2003.07082): 200 units, batches of about 250 words.
    """

    def __init__(self, input_size: int = 300, hidden_size: int = 200, dropout: float = 0.3) -> None:
        super().__init__()
        self.hidden_size, self.dropout = hidden_size, dropout
        sizes = (input_size, 2 * hidden_size)
        self.cells = nn.ModuleList(
            nn.ModuleList(nn.LSTMCell(size, hidden_size) for _ in range(2)) for size in sizes
        )

    def forward(self, words: Tensor) -> Tensor:
        """Takes words (T, B, input_size), and returns states (T, B, 2 * hidden_size)."""
        x = words
        for pair in self.cells:
            x = torch.cat(
                [
                    self.run(pair[0], x.unbind()),
                    self.run(pair[1], x.flip(0).unbind()).flip(0),
                ],
                -1,
            )
        return x

    def run(self, cell: nn.Module, steps: tuple[Tensor, ...]) -> Tensor:
        h = c = steps[0].new_zeros(len(steps[0]), self.hidden_size)
        mask = F.dropout(torch.ones_like(h), self.dropout, self.training)
        states = []
        for x in steps:
            h, c = cell(x, (h * mask, c))
            states.append(h)
        return torch.stack(states)


class StateSpaceModel(nn.Module):
    """The RSSM of Hafner et al., arXiv:1811.04551, with the sizes of Dreamer, arXiv:1912.01603.

    The deterministic state has 200 units and the random state 30. An embedded image has 1024
    values and an action 6.
    """

    def __init__(self, hidden: int = 200, random: int = 30, image: int = 1024) -> None:
        super().__init__()
        self.hidden, self.random = hidden, random
        self.before = nn.Linear(random + 6, hidden)
        self.cell = nn.GRUCell(hidden, hidden)
        self.prior = nn.Sequential(
            nn.Linear(hidden, hidden), nn.ELU(), nn.Linear(hidden, 2 * random)
        )
        self.posterior = nn.Sequential(
            nn.Linear(hidden + image, hidden), nn.ELU(), nn.Linear(hidden, 2 * random)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Takes images and actions (T, B, 1024 + 6); returns states and distributions by step."""
        images, actions = inputs[..., :-6], inputs[..., -6:]
        h = images.new_zeros(images.shape[1], self.hidden)
        s = images.new_zeros(images.shape[1], self.random)
        results = []
        for image, action in zip(images, actions, strict=True):
            h = self.cell(F.elu(self.before(torch.cat([s, action], -1))), h)
            prior, posterior = self.prior(h), self.posterior(torch.cat([h, image], -1))
            mean, deviation = posterior.chunk(2, -1)
            s = mean + (F.softplus(deviation) + 0.1) * torch.randn_like(mean)
            results.append(torch.cat([h, s, prior, posterior], -1))
        return torch.stack(results)


class VoiceDetector(nn.Module):
    """The layers of Silero VAD 5 at 16 kHz: a spectrum, four convolutions, LSTMCell, and a decoder.

    Its input is a chunk of 512 samples after the last 64 of the chunk before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        sizes = ((129, 128, 1), (128, 64, 2), (64, 64, 2), (64, 128, 1))
        self.encoder = nn.Sequential(
            *(
                layer
                for i, o, stride in sizes
                for layer in (nn.Conv1d(i, o, 3, stride, padding=1), nn.ReLU())
            )
        )
        self.cell = nn.LSTMCell(128, 128)
        self.decoder = nn.Sequential(nn.ReLU(), nn.Linear(128, 1), nn.Sigmoid())

    def forward(self, chunks: Tensor) -> Tensor:
        """Takes chunks (T, B, 576), and returns probabilities of speech (T, B, 1)."""
        h = c = chunks.new_zeros(chunks.shape[1], 128)
        results = []
        for chunk in chunks:
            padded = F.pad(chunk.unsqueeze(1), (0, 64), "reflect")
            real, imaginary = self.spectrum(padded).chunk(2, 1)
            h, c = self.cell(self.encoder((real**2 + imaginary**2).sqrt())[..., 0], (h, c))
            results.append(self.decoder(h))
        return torch.stack(results)


class Program(NamedTuple):
    """A model, the shape of its input, and whether a call is a step of training."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    trains: bool


PROGRAMS = {
    "tagger": Program(Tagger, (25, 10, 300), trains=True),
    "rssm": Program(StateSpaceModel, (50, 16, 1030), trains=True),
    "vad": Program(VoiceDetector, (100, 1, 576), trains=False),
}


def steps_of(program: Program) -> tuple[dict[str, nn.Module], dict[str, Callable[[], Tensor]]]:
    """Returns the models and the calls to time, by the names "torch" and "rnnfast"."""
    torch.manual_seed(0)
    model = program.make()
    models = {"torch": model, "rnnfast": copy.deepcopy(model)}
    rnnfast.accelerate(models["rnnfast"], backend="fused")
    x = torch.randn(program.shape)

    def train(model: nn.Module) -> Tensor:
        model.zero_grad()
        y = model(x)
        y.square().mean().backward()
        return y.detach()

    @torch.inference_mode()
    def infer(model: nn.Module) -> Tensor:
        return model(x)

    call = train if program.trains else infer
    return models, {name: (lambda model=model: call(model)) for name, model in models.items()}


def assert_same(models: dict[str, nn.Module], steps: dict[str, Callable[[], Tensor]]) -> None:
    """Compares the outputs and the gradients of the parameters.

    Raises:
        AssertionError: A difference is more than 1e-4 of the tensor's largest value.
    """
    results = []
    for name, step in steps.items():
        torch.manual_seed(1)  # for dropout and random states
        results.append([step(), *(p.grad for p in models[name].parameters())])
    for theirs, ours in zip(*results, strict=True):
        if theirs is None:  # no gradients are asked for
            continue
        error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        if not error <= 1e-4:
            raise AssertionError(f"the results differ by {error:.2g} of the largest value")


def share_of_cells(model: nn.Module, step: Callable[[], object], repeats: int) -> float:
    """The part of the time that a step without gradients spends in cells: the median of repeats."""
    spent = [0.0]

    def start(*_: object) -> None:
        spent[0] -= time.perf_counter()

    def end(*_: object) -> None:
        spent[0] += time.perf_counter()

    hooks = [
        handle
        for module in model.modules()
        if isinstance(module, nn.RNNCellBase)
        for handle in (module.register_forward_pre_hook(start), module.register_forward_hook(end))
    ]
    shares = []
    for _ in range(repeats):
        spent[0], begin = 0.0, time.perf_counter()
        step()
        shares.append(spent[0] / (time.perf_counter() - begin))
    for handle in hooks:
        handle.remove()
    return statistics.median(shares)


def measure(name: str, threads: int, min_time: float, repeats: int) -> Row:
    torch.set_num_threads(threads)
    program = PROGRAMS[name]
    models, steps = steps_of(program)
    assert_same(models, steps)
    timings = time_in_turn(steps, lambda: None, min_time, repeats)
    row: Row = {"program": name, "threads": threads}
    for key, timing in timings.items():
        row |= {f"{key}_{field}": value for field, value in timing._asdict().items()}
    for field in ("min", "median"):
        row[f"ratio_{field}"] = row[f"torch_{field}"] / row[f"rnnfast_{field}"]
    if not program.trains:  # the backward of cells is not seen by hooks
        row["share"] = share_of_cells(models["rnnfast"], steps["rnnfast"], max(repeats, 5))
    return row


def runs_of(processes: int, *arguments: Any) -> Iterator[Row]:
    """What `measure` returns in each of several new processes, or in this one."""
    if processes == 1:
        yield measure(*arguments)
        return
    for _ in range(processes):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield pool.submit(measure, *arguments).result()


def merged(rows: list[Row]) -> Row:
    """Medians over the processes, all ratios, and the verdict."""
    medians = {
        key: statistics.median(row[key] for row in rows)
        for key in rows[0]
        if key.endswith(("_min", "_median")) or key == "share"
    }
    ratios = [row["ratio_min"] for row in rows]
    return rows[0] | medians | {"ratios": ratios, "verdict": verdict(ratios)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.programs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=[*PROGRAMS])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--min-time", type=float, default=1.0, help="seconds for each model")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds, at least")
    parser.add_argument("--processes", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    args = parser.parse_args(argv)
    rows = []
    for name, threads in itertools.product(args.only, args.threads):
        row = merged([*runs_of(args.processes, name, threads, args.min_time, args.repeats)])
        rows.append(row)
        ratios = ", ".join(f"{ratio:.2f}" for ratio in row["ratios"])
        share = f", cells take {row['share']:.0%}" if "share" in row else ""
        print(
            f"{name}, {threads} threads: torch.nn {1e3 * row['torch_min']:.3g} ms, rnnfast "
            f"{1e3 * row['rnnfast_min']:.3g} ms, ratio {row['ratio_min']:.2f} ({ratios}), by "
            f"median {row['ratio_median']:.2f}: {row['verdict']}{share}",
            flush=True,
        )
    if args.json:
        command = "python -m benchmarks.programs " + " ".join(
            sys.argv[1:] if argv is None else argv
        )
        where = machine.describe("cpu") | {"threads": max(args.threads)}
        content = {"machine": where, "command": command, "rows": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
