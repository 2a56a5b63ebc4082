"""Times whole models in plain PyTorch and with rnnfast: `python -m benchmarks.programs --help`.

In three of them, steps through time in Python call cells of torch.nn between other modules:

tagger  The encoder of a part-of-speech tagger: two bidirectional layers of LSTMCell with recurrent
        dropout, one training step on 10 sentences of 25 words.
rssm    The recurrent state-space model of Dreamer: one training step on 16 sequences of 50 steps.
vad     A voice activity detector as Silero VAD 5: 100 chunks of 32 ms of sound, one at a time,
        without gradients.

One has layers of torch.nn, whose weights change with every call:

awd     The AWD-LSTM language model: one training step on 20 texts of 70 words.

Two have cells of their own, written in PyTorch:

dreamer The world model of Dreamer 2 and 3, whose GRU normalises its gates: one training step on 16
        sequences of 64 steps.
ligru   A speech encoder: four bidirectional layers of the light GRU, on 8 sentences of 200 frames,
        without gradients.

`rnnfast.accelerate` replaces the layers of torch.nn, and what `REPLACEMENTS` says the others; the
rest stays as it is. Outputs and gradients are compared first. Then both are timed in turn, in
several new processes. A ratio is the time without rnnfast divided by the time with it. For programs
without gradients, the share is the part of the time that the model with rnnfast spends in layers
and cells.
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
from rnnfast.custom import library

Row = dict[str, Any]
Models = dict[str, nn.Module]
Steps = dict[str, Callable[[], Tensor]]


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


class WeightDrop(nn.Module):
    """A layer of torch.nn whose W_hh is dropped in part, by a new mask for each call.

    Like that of Merity, Keskar and Socher's program, it keeps the weights under another name, and
    sets the attribute that the layer reads to what is left of them.
    """

    def __init__(self, layer: nn.RNNBase, dropout: float) -> None:
        super().__init__()
        self.layer, self.dropout = layer, dropout
        layer.flatten_parameters = lambda: None  # the weights do not stay where they are
        weight = layer._parameters.pop("weight_hh_l0")
        layer.register_parameter("weight_hh_l0_raw", weight)

    def forward(self, x: Tensor) -> Tensor:
        raw = self.layer.weight_hh_l0_raw
        self.layer.weight_hh_l0 = F.dropout(raw, self.dropout, self.training)
        return self.layer(x)[0]


def locked_dropout(x: Tensor, dropout: float, training: bool) -> Tensor:
    """Drops elements of x (T, B, features) by one mask for all steps."""
    return x * F.dropout(torch.ones_like(x[:1]), dropout, training)


class LanguageModel(nn.Module):
    """The AWD-LSTM of Merity, Keskar, Socher, arXiv:1708.02182, with its sizes for Penn Treebank.

    Of their regularisation it has the dropped weights and units, and the tied embeddings.
    """

    def __init__(self, words: int = 10000, embedding: int = 400, hidden: int = 1150) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, embedding)
        sizes = (embedding, hidden, hidden, embedding)
        self.layers = nn.ModuleList(
            WeightDrop(nn.LSTM(i, o), 0.5) for i, o in itertools.pairwise(sizes)
        )
        self.decoder = nn.Linear(embedding, words)
        self.decoder.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        """Takes words (T, B), and returns the losses of the words after the first."""
        kept = F.dropout(torch.ones_like(self.embedding.weight[:, :1]), 0.1, self.training)
        x = F.embedding(words[:-1], self.embedding.weight * kept)
        x = locked_dropout(x, 0.4, self.training)
        for layer, dropout in zip(self.layers, (0.25, 0.25, 0.4), strict=True):
            x = locked_dropout(layer(x), dropout, self.training)
        return F.cross_entropy(self.decoder(x).mT, words[1:], reduction="none")


class NormGRUCell(nn.Module):
    """The GRU cell of Dreamer 2: one matrix for input and state, and normalised gates."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_size + hidden_size, 3 * hidden_size, bias=False)
        self.norm = nn.LayerNorm(3 * hidden_size, eps=1e-3)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        parts = self.norm(self.linear(torch.cat([x, h], -1)))
        reset, candidate, update = parts.chunk(3, -1)
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        update = torch.sigmoid(update - 1)
        return update * candidate + (1 - update) * h


class WorldModel(nn.Module):
    """The RSSM of Dreamer 2, arXiv:2010.02193, with the layers and sizes of small ports of 3.

    The deterministic state has 512 units, and the random state 32 variables of 32 classes. An
    embedded image has 4096 values and an action 6. Classes are relaxed (Jang, Gu, Poole,
    arXiv:1611.01144) where Dreamer draws them, since rounding may change which one is drawn.
    """

    def __init__(self, hidden: int = 512, classes: int = 32, image: int = 4096) -> None:
        super().__init__()
        self.hidden, self.classes, random = hidden, classes, classes * classes

        def block(input_size: int) -> list[nn.Module]:
            linear = nn.Linear(input_size, hidden, bias=False)
            return [linear, nn.LayerNorm(hidden, eps=1e-3), nn.SiLU()]

        self.before = nn.Sequential(*block(random + 6))
        self.cell = NormGRUCell(hidden, hidden)
        self.prior = nn.Sequential(*block(hidden), nn.Linear(hidden, random))
        self.posterior = nn.Sequential(*block(hidden + image), nn.Linear(hidden, random))

    def forward(self, inputs: Tensor) -> Tensor:
        """Takes images and actions (T, B, 4096 + 6); returns states and logits by step."""
        images, actions = inputs[..., :-6], inputs[..., -6:]
        h = images.new_zeros(images.shape[1], self.hidden)
        s = images.new_zeros(images.shape[1], self.classes**2)
        results = []
        for image, action in zip(images, actions, strict=True):
            h = self.cell(self.before(torch.cat([s, action], -1)), h)
            prior, posterior = self.prior(h), self.posterior(torch.cat([h, image], -1))
            logits = posterior.unflatten(-1, (self.classes, self.classes))
            s = F.gumbel_softmax(logits).flatten(-2)
            results.append(torch.cat([h, s, prior, posterior], -1))
        return torch.stack(results)


class LightGRU(nn.Module):
    """A layer of the light GRU as SpeechBrain has it: relu, and the input's part normalised."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.w = nn.Linear(input_size, 2 * hidden_size, bias=False)
        self.u = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.norm = nn.BatchNorm1d(2 * hidden_size, momentum=0.05)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Takes x (T, B, I); returns the h of each step (T, B, H) and the last one."""
        h, states = x.new_zeros(x.shape[1], self.u.in_features), []
        for part in self.norm(self.w(x).flatten(0, 1)).unflatten(0, x.shape[:2]):
            a, z = (part + self.u(h)).chunk(2, -1)
            z = torch.sigmoid(z)
            h = z * h + (1 - z) * torch.relu(a)
            states.append(h)
        return torch.stack(states), h


class SpeechEncoder(nn.Module):
    """Bidirectional layers of the light GRU, Ravanelli et al., arXiv:1803.10225.

    The sizes are those of SpeechBrain's recipe for TIMIT: four layers of 512 units. As there, both
    directions of a layer have the same weights, and run as one batch.
    """

    def __init__(self, input_size: int = 80, hidden_size: int = 512, layers: int = 4) -> None:
        super().__init__()
        sizes = [input_size] + [2 * hidden_size] * (layers - 1)
        self.layers = nn.ModuleList(LightGRU(size, hidden_size) for size in sizes)

    def forward(self, frames: Tensor) -> Tensor:
        """Takes frames (T, B, input_size), and returns states (T, B, 2 * hidden_size)."""
        x = frames
        for layer in self.layers:
            forward, backward = layer(torch.cat([x, x.flip(0)], 1))[0].chunk(2, 1)
            x = torch.cat([forward, backward.flip(0)], -1)
        return x


def trained_encoder() -> nn.Module:
    """An encoder for use, that has seen data: its batch norms do not have mean 0 and variance 1."""
    model = SpeechEncoder()
    model(2 * torch.randn(20, 4, 80) + 1)
    return model.eval()


@torch.no_grad()
def fused_norm_gru(cell: NormGRUCell) -> rnnfast.LayerCell:
    hidden = cell.linear.out_features // 3
    inputs = cell.linear.in_features - hidden
    options: dict[str, Any] = {"bias": False, "backend": "fused"}
    fused = rnnfast.LayerCell(library.layer_norm_gru, inputs, hidden, **options)
    fused.weight_ih.copy_(cell.linear.weight[:, :inputs])
    fused.weight_hh.copy_(cell.linear.weight[:, inputs:])
    fused.norm_weight.copy_(cell.norm.weight)
    fused.norm_bias.copy_(cell.norm.bias)
    return fused


@torch.no_grad()
def fused_light_gru(layer: LightGRU) -> rnnfast.Layer:
    """In evaluation, batch norm is a scale of the rows of W_ih and a bias."""
    norm = layer.norm
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    inputs, hidden = layer.w.in_features, layer.u.in_features
    fused = rnnfast.Layer(library.light_gru, inputs, hidden, backend="fused")
    fused.weight_ih_l0.copy_(scale.unsqueeze(1) * layer.w.weight)
    fused.weight_hh_l0.copy_(layer.u.weight)
    fused.bias_ih_l0.copy_(norm.bias - scale * norm.running_mean)
    fused.bias_hh_l0.zero_()
    return fused


REPLACEMENTS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    NormGRUCell: fused_norm_gru,
    LightGRU: fused_light_gru,
}
"""What makes a module of rnnfast of one that torch.nn does not have."""


def accelerate(model: nn.Module) -> None:
    """Replaces the recurrent layers and cells of a model, of torch.nn and of its own."""
    rnnfast.accelerate(model, backend="fused")
    for name, module in [*model.named_modules()]:
        if type(module) in REPLACEMENTS:
            model.set_submodule(name, REPLACEMENTS[type(module)](module))


class Program(NamedTuple):
    """A model, the shape of its input, and whether a call is a step of training."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    trains: bool
    words: int | None = None
    """If inputs are words, how many there are."""


PROGRAMS = {
    "tagger": Program(Tagger, (25, 10, 300), trains=True),
    "rssm": Program(StateSpaceModel, (50, 16, 1030), trains=True),
    "vad": Program(VoiceDetector, (100, 1, 576), trains=False),
    "awd": Program(LanguageModel, (71, 20), trains=True, words=10000),
    "dreamer": Program(WorldModel, (64, 16, 4102), trains=True),
    "ligru": Program(trained_encoder, (200, 8, 80), trains=False),
}


def steps_of(program: Program) -> tuple[Models, Steps]:
    """Returns the models and the calls to time, by the names "torch" and "rnnfast"."""
    torch.manual_seed(0)
    model = program.make()
    models = {"torch": model, "rnnfast": copy.deepcopy(model)}
    accelerate(models["rnnfast"])
    words, shape = program.words, program.shape
    x = torch.randn(shape) if words is None else torch.randint(words, shape)

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


def gradients(model: nn.Module) -> Iterator[Tensor]:
    """The gradients of the parameters, as the model in plain PyTorch has them."""
    for module in model.modules():
        own = {name: p.grad for name, p in module.named_parameters(recurse=False)}
        if isinstance(module, rnnfast.LayerCell):  # it stands for a NormGRUCell
            yield torch.cat([own.pop("weight_ih"), own.pop("weight_hh")], 1)
        yield from own.values()


def assert_same(program: Program, models: Models, steps: Steps) -> None:
    """Compares the outputs and the gradients of the parameters.

    Raises:
        AssertionError: A difference is more than 1e-4 of the tensor's largest value.
    """
    results = []
    for name, step in steps.items():
        torch.manual_seed(1)  # for dropout and random states
        results.append([step(), *(gradients(models[name]) if program.trains else ())])
    for theirs, ours in zip(*results, strict=True):
        error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        if not error <= 1e-4:
            raise AssertionError(f"the results differ by {error:.2g} of the largest value")


def share_of_cells(model: nn.Module, step: Callable[[], object], repeats: int) -> float:
    """The part of the time that a step without gradients spends in layers and cells: the median."""
    spent = [0.0]

    def start(*_: object) -> None:
        spent[0] -= time.perf_counter()

    def end(*_: object) -> None:
        spent[0] += time.perf_counter()

    hooks = [
        handle
        for module in model.modules()
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase))
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
    assert_same(program, models, steps)
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
            f"{name}, {threads} threads: torch {1e3 * row['torch_min']:.3g} ms, rnnfast "
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
