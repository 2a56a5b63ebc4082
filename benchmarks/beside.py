"""Measures how much layers of rnnfast and torch.nn slow down beside busy processes.

    python -m benchmarks.beside [--seconds 2] [--rounds 3] [--json FILE]

Each layer runs alone, beside one and two processes that spin, and beside a second copy of itself. A
slow-down is the mean time of a call there divided by the mean time alone (median over the rounds);
lower is better. The last column is rnnfast's slow-down divided by torch.nn's.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import rnnfast

LAYERS = {
    "LSTM 100,1,256,256 inference": ("LSTM", (100, 1, 256, 256), False),
    "LSTM 50,64,512,512 inference": ("LSTM", (50, 64, 512, 512), False),
    "GRU 100,16,128,128 training": ("GRU", (100, 16, 128, 128), True),
    "LSTM 100,32,256,256 training": ("LSTM", (100, 32, 256, 256), True),
}
SETTINGS = ("alone", "one spinner", "two spinners", "two copies")
SPIN = "while True: pass"


def mean_time(library: str, layer: str, seconds: float, threads: int) -> float:
    """Returns the mean time of a call, measured for `seconds`."""
    kind, (T, B, I, H), training = LAYERS[layer]
    torch.set_num_threads(threads)
    module = (
        getattr(rnnfast, kind)(I, H, backend="fused")
        if library == "rnnfast"
        else getattr(torch.nn, kind)(I, H)
    )
    x = torch.randn(T, B, I)

    def call() -> None:
        if training:
            module(x)[0].sum().backward()
        else:
            with torch.no_grad():
                module(x)

    for _ in range(3):
        call()
    calls, start = 0, time.perf_counter()
    while time.perf_counter() < start + seconds:
        call()
        calls += 1
    return (time.perf_counter() - start) / calls


def start(library: str, layer: str, args: argparse.Namespace) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.beside", "--worker", library, layer]
    command += ["--seconds", str(args.seconds), "--threads", str(args.threads)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def time_of(process: subprocess.Popen[str]) -> float:
    output, _ = process.communicate()
    assert process.returncode == 0
    return float(output)


def run(library: str, layer: str, setting: str, args: argparse.Namespace) -> float:
    """Returns the mean time of a call, measured in a new process (two for "two copies")."""
    count = {"one spinner": 1, "two spinners": 2}.get(setting, 0)
    spinners = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        copies = 2 if setting == "two copies" else 1
        return statistics.mean(
            [time_of(p) for p in [start(library, layer, args) for _ in range(copies)]]
        )
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(mean_time(*args.worker, args.seconds, args.threads))
        return
    rows = []
    print(f"{'layer':30}{'beside':14}{'rnnfast':>9}{'torch.nn':>9}{'ratio':>7}")
    for layer in LAYERS:
        times: dict[tuple[str, str], list[float]] = {}
        for _ in range(args.rounds):
            for setting in SETTINGS:
                for library in ("rnnfast", "torch.nn"):
                    found = run(library, layer, setting, args)
                    times.setdefault((library, setting), []).append(found)
        medians = {key: statistics.median(values) for key, values in times.items()}
        for setting in SETTINGS[1:]:
            ours, theirs = (
                medians[library, setting] / medians[library, "alone"]
                for library in ("rnnfast", "torch.nn")
            )
            print(f"{layer:30}{setting:14}{ours:9.2f}{theirs:9.2f}{ours / theirs:7.2f}", flush=True)
            rows.append({"layer": layer, "beside": setting, "rnnfast": ours, "torch.nn": theirs})
    if args.json:
        facts = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        args.json.write_text(json.dumps({**facts, "threads": args.threads, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
