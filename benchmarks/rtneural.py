"""Compares steps of small LSTMs with RTNeural: `python -m benchmarks.rtneural --help`.

RTNeural is a library of C++ headers for audio. The sizes of its layers are fixed when they are
compiled. It has to be fetched before, with xsimd and Eigen, which are its back ends. The C library
of rnnfast runs beside it: 64 steps a call, one sequence, one thread, the two in turn. Outputs are
compared first. A ratio is the time of RTNeural's fastest variant divided by that of rnnfast.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import rnnfast

from . import machine

ROOT = Path(__file__).resolve().parents[1]
SIZES = [(1, 8), (1, 16), (1, 24), (1, 40), (64, 64)]
FLAGS = {"native": ["-march=native"], "AVX2": ["-mavx2", "-mfma"]}
TOLERANCE = 1e-4


def build(args: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """Compiles a program for each back end and set of flags."""
    programs = {}
    includes = [f"-I{path}" for path in (args.rtneural, args.xsimd / "include", args.eigen)]
    for backend, (name, flags) in itertools.product(["XSIMD", "EIGEN"], FLAGS.items()):
        program = folder / f"{backend}-{name}"
        macros = [f"-DRTNEURAL_USE_{backend}=1", "-DEIGEN_STACK_ALLOCATION_LIMIT=0"]
        bytes_of_vector = 64 if name == "native" and backend == "XSIMD" and has_avx512() else 32
        macros.append(f"-DRTNEURAL_DEFAULT_ALIGNMENT={bytes_of_vector}")
        command = ["c++", "-O3", "-std=c++20", "-w", *flags, *macros, *includes]
        command += [f"-I{ROOT / 'csrc'}", ROOT / "benchmarks/rtneural.cpp", args.library]
        command += [f"-Wl,-rpath,{args.library.resolve().parent}", "-o", program]
        subprocess.run(command, check=True)
        programs[f"{backend.lower()}, {name}"] = program
    return programs


def has_avx512() -> bool:
    return "avx512f" in Path("/proc/cpuinfo").read_text()


def measure(programs: dict[str, Path], folder: Path) -> list[dict[str, Any]]:
    """Returns a row for each size and type of weights, with the fastest variant of RTNeural."""
    rows = []
    for (I, H), weights in itertools.product(SIZES, ["float32", "int8"]):
        torch.manual_seed(0)
        lstm = torch.nn.LSTM(I, H).requires_grad_(False)
        model, floats = folder / "model", folder / "floats"
        rnnfast.freeze(lstm, weights).save(model)
        parts = [lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0 + lstm.bias_hh_l0]
        floats.write_bytes(torch.cat([part.flatten() for part in parts]).numpy().tobytes())
        found = {}
        for name, program in programs.items():
            command = [program, model, floats, str(I), str(H)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            difference, *times = map(float, done.stdout.split())
            if difference > (TOLERANCE if weights == "float32" else 0.05):
                raise AssertionError(f"RTNeural with {name} differs by {difference}")
            found[name] = times
        best = min(found, key=lambda name: found[name][2])
        ours = [min(times[i] for times in found.values()) for i in range(2)]
        rows.append(
            {
                "I": I,
                "H": H,
                "weights": weights,
                "variant": best,
                "rnnfast_min_us": ours[0],
                "rnnfast_median_us": ours[1],
                "rtneural_min_us": found[best][2],
                "rtneural_median_us": found[best][3],
                "ratio": found[best][2] / ours[0],
            }
        )
        row = rows[-1]
        times = f"{row['rnnfast_min_us']:8.3f} {row['rtneural_min_us']:9.3f} {row['ratio']:6.2f}"
        print(f"{I:4} {H:4} {weights:8} {times}  {best}", flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rtneural",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    for name in ("rtneural", "xsimd", "eigen"):
        add(f"--{name}", type=Path, required=True, metavar="FOLDER")
    library = ROOT / "build/c/librnnfast.so"
    add("--library", type=Path, default=library, help="what `make c-library` builds")
    add("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        programs = build(args, Path(folder))
        print(f"{'I':>4} {'H':>4} weights   rnnfast  RTNeural  ratio  (us a step, minimum)")
        rows = measure(programs, Path(folder))
    if args.json:
        folders = "--rtneural RTNeural --xsimd xsimd --eigen eigen"  # not where they were here
        command = f"python -m benchmarks.rtneural {folders} --json {args.json}"
        result = {"machine": machine.describe("cpu"), "command": command, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
