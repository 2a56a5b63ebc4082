"""Steps of single streams and of many: `python -m benchmarks.streams --help`.

The program is voice activity detection on synthetic features of sound. A frame of 10 ms has 40
bands. A detector, LSTM(40, 64) and a linear layer, is trained for some seconds and says for each
frame whether somebody speaks. Then the LSTM, frozen in float32 and int8, is timed in two ways:

latency     One stream, frame by frame: the time of each step by itself. `Stream.step` runs beside
            calls of the frozen module, torch.nn.LSTMCell, and ONNX Runtime with IO binding. The
            time includes 0.1 us for reading the clock, and for ONNX Runtime the copy of the frame
            into its memory.
throughput  Many streams: `StreamBatch.step` on some of them at a time, of any slots or of
            consecutive ones, beside one call of `Stream.step` or of the frozen module for each
            stream. The frames of a call lie ready in one tensor.

Outputs are compared first. Then all run in turn, in several new processes. Numbers are medians over
the processes. The linear layer is not timed: it may follow for a block of frames.
"""

import argparse
import itertools
import json
import multiprocessing
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import rnnfast
from rnnfast.cli.timing import gc_disabled

from . import machine
from .peers import onnx_model
from .steps import Problem
from .timing import pause
from .voice import BANDS, HIDDEN, WEIGHTS, accuracies, synthetic, trained

Row = dict[str, Any]
TOLERANCES = {"float32": 1e-6, "int8": 0.01}
"""The allowed root-mean-square errors of outputs, which are between -1 and 1."""
ONE_CALL_EACH = ("Stream.step", "frozen module")
"""The ways to run many streams with which batches are compared."""
TAIL = [10 ** (-k / 10) for k in range(1, 41)]
"""Shares of steps: for each, the time that so many steps take at least is kept for the plot."""


class Single(NamedTuple):
    """One way to run a single stream. Each makes its states, and keeps them between steps."""

    convert: Callable[[Tensor], Any]
    """A frame (40) as `step` takes it."""
    step: Callable[[Any], Any]
    """Returns h, a tensor or an array."""


def stream_of(frozen: nn.Module) -> Single:
    return Single(lambda x: x, rnnfast.Stream(frozen).step)


def module_of(frozen: nn.Module) -> Single:
    state = None

    def step(x: Tensor) -> Tensor:
        nonlocal state
        y, state = frozen(x, state)
        return y

    return Single(lambda x: x.view(1, 1, -1), step)


def cell_of(lstm: nn.LSTM) -> nn.LSTMCell:
    cell = nn.LSTMCell(lstm.input_size, lstm.hidden_size)
    cell.load_state_dict({name[:-3]: value for name, value in lstm.state_dict().items()})
    return cell


def torch_cell_of(lstm: nn.LSTM) -> Single:
    cell, state = cell_of(lstm), None

    def step(x: Tensor) -> Tensor:
        nonlocal state
        state = cell(x, state)
        return state[0]

    return Single(lambda x: x.view(1, -1), step)


def onnxruntime_of(lstm: nn.LSTM) -> Single:
    """Binds two runs: each reads the states that the other one wrote.

    Raises:
        ImportError: onnx or onnxruntime is not installed.
    """
    import numpy as np
    import onnxruntime

    zeros = torch.zeros(1, HIDDEN)
    problem = Problem(
        cell_of(lstm), torch.zeros(1, 1, BANDS), zeros, "inference", state=(zeros, zeros)
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        onnx_model(problem), options, providers=["CPUExecutionProvider"]
    )
    given, results = (
        [value.name for value in values] for values in (session.get_inputs(), session.get_outputs())
    )
    frame = np.zeros((1, 1, BANDS), np.float32)
    states = np.zeros((2, 2, 1, 1, HIDDEN), np.float32)  # of both runs h and c
    bindings = [session.io_binding() for _ in states]
    for k, binding in enumerate(bindings):
        for bind, names, arrays in (
            (binding.bind_input, given, (frame, *states[k])),
            (binding.bind_output, results[1:], states[1 - k]),
        ):
            for name, array in zip(names, arrays, strict=True):
                bind(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
    turn = 0

    def step(x: Any) -> Any:
        nonlocal turn
        frame[:] = x
        session.run_with_iobinding(bindings[turn])
        turn = 1 - turn
        return states[turn, 0]

    return Single(lambda x: x.numpy(), step)


def singles_of(lstm: nn.LSTM, threads: int) -> dict[tuple[str, str], Single]:
    """Returns the ways to run a single stream, by name and type of weights."""
    found = {}
    for weights in WEIGHTS:
        frozen = rnnfast.freeze(lstm, weights)
        found["Stream.step", weights] = stream_of(frozen)
        found["frozen module", weights] = module_of(frozen)
    found["torch.nn.LSTMCell", "float32"] = torch_cell_of(lstm)
    try:
        found["ONNX Runtime", "float32"] = onnxruntime_of(lstm)
    except ImportError as missing:
        print(f"ONNX Runtime is left out: {missing}")
    return found


def assert_near(name: str, weights: str, h: Tensor, exact: Tensor) -> None:
    """Raises AssertionError if outputs are further from float64 than rounding explains."""
    error = (h.double() - exact).square().mean().sqrt().item()
    if not error <= TOLERANCES[weights]:
        raise AssertionError(f"{name}, {weights}: the outputs are off by {error:.2g}")


def quantile(samples: Tensor, share: float) -> float:
    return samples.quantile(share).item()


@torch.inference_mode()
def latencies(lstm: nn.LSTM, frames: int, rounds: int) -> Iterator[Row]:
    """Yields a row for each way to run a single stream, with times in seconds."""
    x = synthetic(frames, 1, seed=-2)[0][:, 0]
    exact = doubled(lstm)(x.double().unsqueeze(1))[0].squeeze(1)
    singles = singles_of(lstm, torch.get_num_threads())
    inputs = {}
    for (name, weights), single in singles.items():
        inputs[name, weights] = [single.convert(x_t) for x_t in x]
        # The outputs may lie in memory that the next step overwrites.
        steps = (torch.as_tensor(single.step(x_t)) for x_t in inputs[name, weights])
        h = torch.stack([h_t.reshape(-1).clone() for h_t in steps])
        assert_near(name, weights, h, exact)
    samples: dict[tuple[str, str], list[int]] = {key: [] for key in singles}
    clock = time.perf_counter_ns
    with gc_disabled():
        for _, (key, single) in itertools.product(range(rounds), singles.items()):
            step, times = single.step, samples[key]
            pause()
            for x_t in inputs[key][:100]:
                step(x_t)
            for x_t in inputs[key]:
                begin = clock()
                step(x_t)
                times.append(clock() - begin)
    for (name, weights), times in samples.items():
        seconds = torch.tensor(times, dtype=torch.float64) * 1e-9
        shares = {"median": 0.5, "99%": 0.99, "99.9%": 0.999}
        row = {"name": name, "weights": weights, "steps": len(times)}
        row |= {key: quantile(seconds, share) for key, share in shares.items()}
        yield row | {"tail": [quantile(seconds, 1 - share) for share in TAIL]}


def doubled(lstm: nn.LSTM) -> nn.LSTM:
    twin = nn.LSTM(BANDS, HIDDEN, dtype=torch.float64)
    twin.load_state_dict(lstm.state_dict())
    return twin


class Many(NamedTuple):
    """One way to run all streams by one step each."""

    name: str
    batch: int
    """The streams of a call."""
    run: Callable[[], list[int]]
    """Runs the step; returns the time of each call in ns, or that of all calls as one number."""
    outputs: Callable[[], Tensor]
    """Runs the step; returns the outputs by stream."""


def batched(frozen: nn.Module, x: Tensor, batch: int, order: Tensor, name: str) -> Many:
    """Calls `StreamBatch.step` on `batch` streams at a time, in an order of their slots."""
    streams = rnnfast.StreamBatch(frozen, len(x))
    for _ in x:
        streams.join()
    slots = [*order[: len(x) // batch * batch].split(batch)]
    inputs, clock = [x[each] for each in slots], time.perf_counter_ns

    def run() -> list[int]:
        times, step = [], streams.step
        for each, x_t in zip(slots, inputs, strict=True):
            begin = clock()
            step(each, x_t)
            times.append(clock() - begin)
        return times

    def outputs() -> Tensor:
        y = torch.full((len(x), HIDDEN), torch.nan)
        for each, x_t in zip(slots, inputs, strict=True):
            y[each] = streams.step(each, x_t)
        return y

    return Many(name, batch, run, outputs)


def looped(frozen: nn.Module, x: Tensor, make: Callable[[nn.Module], Single], name: str) -> Many:
    """Calls the step of each stream by itself."""
    singles = [make(frozen) for _ in x]
    calls = [(single.step, single.convert(x_t)) for single, x_t in zip(singles, x, strict=True)]

    def run() -> list[int]:
        begin = time.perf_counter_ns()
        for step, x_t in calls:
            step(x_t)
        return [time.perf_counter_ns() - begin]

    def outputs() -> Tensor:
        return torch.stack([step(x_t).reshape(-1).clone() for step, x_t in calls])

    return Many(name, 1, run, outputs)


def ways_of(frozen: nn.Module, x: Tensor, batches: list[int]) -> Iterator[Many]:
    mixed = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    for batch in batches:
        yield batched(frozen, x, batch, mixed, "StreamBatch")
        yield batched(frozen, x, batch, torch.arange(len(x)), "StreamBatch, consecutive")
    yield looped(frozen, x, stream_of, "Stream.step")
    yield looped(frozen, x, module_of, "frozen module")


@torch.inference_mode()
def throughputs(lstm: nn.LSTM, streams: int, batches: list[int], rounds: int) -> Iterator[Row]:
    """Yields a row for each way and type of weights, with times in seconds.

    "min" and "median" are the times of a stream's step, times the number of cores.
    """
    x, cores = synthetic(1, streams, seed=-3)[0][0], torch.get_num_threads()
    for weights in WEIGHTS:
        ways = [*ways_of(rnnfast.freeze(lstm, weights), x, batches)]
        for _ in range(2):
            expected = ways[-1].outputs()
            for way in ways[:-1]:
                y = way.outputs()
                ran = ~y.isnan().any(1)  # all but what is left of the last batch
                if not torch.equal(y[ran], expected[ran]) or ran.sum() <= streams - way.batch:
                    raise AssertionError(f"{way.name}, {weights}: not the bits of the module")
        samples: list[list[list[int]]] = [[] for _ in ways]
        with gc_disabled():
            for _, (way, times) in itertools.product(
                range(rounds), zip(ways, samples, strict=True)
            ):
                pause()
                way.run()
                times.append(way.run())
        for way, times in zip(ways, samples, strict=True):
            steps = streams // way.batch * way.batch
            seconds = [1e-9 * cores * sum(each) / steps for each in times]
            row = {"name": way.name, "weights": weights, "batch": way.batch}
            row |= {"min": min(seconds), "median": statistics.median(seconds)}
            if way.name.startswith("StreamBatch"):
                calls = 1e-9 * torch.tensor([*itertools.chain(*times)], dtype=torch.float64)
                row |= {"call 50%": quantile(calls, 0.5), "call 99%": quantile(calls, 0.99)}
            yield row


def measure(args: argparse.Namespace) -> Row:
    """What each process does."""
    torch.set_num_threads(args.threads)
    detector = trained(args.training)
    lstm = detector.lstm
    return {
        "accuracy": accuracies(detector, 500, 32),
        "latency": [*latencies(lstm, args.frames, args.rounds)],
        "throughput": [*throughputs(lstm, args.streams, args.batch, args.rounds)],
    }


def runs_of(args: argparse.Namespace) -> Iterator[Row]:
    """What `measure` returns in each of several new processes, or in this one."""
    if args.processes == 1:
        yield measure(args)
        return
    for _ in range(args.processes):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield pool.submit(measure, args).result()


def merged(values: list[Any]) -> Any:
    """Medians over the processes of all numbers in equal structures."""
    first = values[0]
    if isinstance(first, dict):
        return {key: merged([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [merged([*each]) for each in zip(*values, strict=True)]
    return statistics.median(values) if isinstance(first, float) else first


def with_ratios(rows: list[Row]) -> list[Row]:
    """Adds how many times the steps a second of one call for each stream a row reaches."""
    alone = {(row["name"], row["weights"]): row["min"] for row in rows}
    return [
        row | {f"over {name}": alone[name, row["weights"]] / row["min"] for name in ONE_CALL_EACH}
        for row in rows
    ]


def format_latency(row: Row) -> str:
    times = "".join(f"{1e6 * row[key]:11.2f}" for key in ("median", "99%", "99.9%"))
    return f"{row['name']:26}{row['weights']:9}{times}"


def format_throughput(row: Row) -> str:
    line = f"{row['name']:26}{row['weights']:9}{row['batch']:6}{1 / row['min']:14,.0f}"
    line += "".join(f"{row[f'over {name}']:9.2f}" for name in ONE_CALL_EACH)
    if "call 50%" in row:
        line += "".join(f"{1e6 * row[key]:11.1f}" for key in ("call 50%", "call 99%"))
    return line


def show(found: Row) -> None:
    accuracy = ", ".join(f"{name} {share:.1%}" for name, share in found["accuracy"].items())
    print(f"frames judged rightly: {accuracy}\n")
    print(f"{'one stream, us a step':35}{'median':>11}{'99 %':>11}{'99.9 %':>11}")
    for row in found["latency"]:
        print(format_latency(row))
    columns = f"{'steps/s, core':>14}{'/ Stream':>9}{'/ module':>9}{'us 50 %':>11}{'us 99 %':>11}"
    print(f"\n{'many streams':35}{'batch':>6}{columns}")
    for row in found["throughput"]:
        print(format_throughput(row))


def draw(content: Row, path: Path) -> None:
    """Draws which share of the steps of a single stream takes longer than a time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    colours = {"Stream.step": "#000000", "frozen module": "#E69F00"}
    colours |= {"torch.nn.LSTMCell": "#D55E00", "ONNX Runtime": "#0072B2"}
    for row in content["latency"]:
        axes.plot(
            [1e6 * seconds for seconds in row["tail"]],
            TAIL,
            color=colours[row["name"]],
            linestyle="--" if row["weights"] == "int8" else "-",
            label=f"{row['name']}, {row['weights']}",
        )
    axes.set(xscale="log", yscale="log", xlabel="time of a step, us")
    axes.set_ylabel("share of the steps that take longer")
    axes.grid(which="both", color="#dddddd", linewidth=0.6)
    axes.legend()
    where = content["machine"]
    axes.set_title(
        f"Steps of one stream, LSTM({BANDS}, {HIDDEN})\n"
        f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.streams",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--streams", type=int, default=1000, help="(default: %(default)s)")
    add("--batch", type=int, nargs="+", default=[1, 8, 64, 256, 1000], help="streams of a call")
    add("--frames", type=int, default=2000, help="steps of the single stream in each round")
    add("--rounds", type=int, default=25, help="how often each block of calls is timed")
    add("--training", type=int, default=200, help="steps of training (default: %(default)s)")
    add("--threads", type=int, default=1, help="(default: %(default)s)")
    add("--processes", type=int, default=3, help="(default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="where to write all numbers")
    add("--png", type=Path, metavar="FILE", help="draw the latencies; needs matplotlib")
    args = parser.parse_args(argv)
    if not 1 <= min(args.batch) <= max(args.batch) <= args.streams:
        parser.error("--batch: sizes should be from 1 to the number of streams")
    found = merged([*runs_of(args)])
    found["throughput"] = with_ratios(found["throughput"])
    show(found)
    command = "python -m benchmarks.streams " + shlex.join(sys.argv[1:] if argv is None else argv)
    where = machine.describe("cpu") | {"threads": args.threads}
    content = {"machine": where, "command": command.strip(), **found}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    if args.png:
        draw(content, args.png)


if __name__ == "__main__":
    main()
