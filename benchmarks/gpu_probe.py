"""Measures the costs of the parts of a recurrent step on this GPU: the first stage of gpu-check.

Compiles probe.cu with nvcc and makes each of its measurements in a new process, so that a failure
does not affect the others. Then, in torch, it measures the two ceilings (copies and products) and
cuDNN's layers. It does not use rnnfast.
"""

import argparse
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .lines import emit, parse, reported

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "benchmarks" / "probe.cu"
MEASUREMENTS = ("launch", "grid_sync", "flags", "cluster_barrier", "st_async", "clusters")
COMPILE_SECONDS, MEASURE_SECONDS = 120, 15
COPIED = 1 << 28  # floats to copy: 1 GiB, larger than any cache
NO_GPU = "no GPU: a dry run"


def cuda_tool(name: str) -> str | None:
    """Returns the path of a program of the CUDA toolkit, or None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(f"{home}/bin/{name}") or shutil.which(name)


def compile_probe(arch: str) -> Path:
    """Compiles probe.cu unless that is done; raises RuntimeError if it cannot be compiled."""
    nvcc = cuda_tool("nvcc")
    if nvcc is None:
        raise RuntimeError("no nvcc in CUDA_HOME or PATH")
    program = ROOT / "build" / f"gpu-probe-{arch}"
    if program.exists() and program.stat().st_mtime > SOURCE.stat().st_mtime:
        return program
    program.parent.mkdir(exist_ok=True)
    command = [nvcc, "-O3", "-std=c++20", f"-arch={arch}", "-o", str(program), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc failed: {done.stderr[-2000:]}")
    return program


def run_probe(program: Path, name: str) -> None:
    """Makes one measurement and prints its lines; raises RuntimeError if it fails."""
    command = [str(program), name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=MEASURE_SECONDS)
    for line in done.stdout.splitlines():
        if facts := parse(line):
            emit(**facts)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-500:] or f"exit code {done.returncode}")


def seconds(call: Callable[[], object], repeats: int = 7, calls: int = 3) -> float:
    """Returns the median time of a call, by the GPU's clock; NaN if there is no GPU."""
    if not torch.cuda.is_available():
        call()
        return math.nan
    times = []
    for run in range(-2, repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        if run >= 0:
            times.append(begin.elapsed_time(end) * 1e-3 / calls)
    return statistics.median(times)


def without_nan(facts: dict[str, object]) -> dict[str, object]:
    """Replaces times that are NaN by the reason: there is no GPU."""
    if not math.isnan(facts["seconds"]):
        return facts
    times = ("seconds", "us_per_step")
    return {k: v for k, v in facts.items() if k not in times} | {"not_measured": NO_GPU}


def ceilings(device: str, elements: int, size: int) -> Iterator[dict[str, object]]:
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    taken = seconds(lambda: target.copy_(source))
    moved = 2 * elements * source.element_size()
    yield {"probe": "copy", "bytes": moved, "seconds": taken}
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    taken = seconds(lambda: torch.mm(a, b))
    yield {"probe": "product", "dtype": "bfloat16", "flops": 2 * size**3, "seconds": taken}


def torch_layer(
    device: str, dtype: torch.dtype, T: int, B: int, H: int
) -> Iterator[dict[str, object]]:
    """Times torch.nn.LSTM: the forward alone, then forward and backward."""
    where = {"probe": "nn.LSTM", "dtype": str(dtype).removeprefix("torch."), "T": T, "B": B, "H": H}
    layer = torch.nn.LSTM(H, H, device=device, dtype=dtype)
    x = torch.randn(T, B, H, device=device, dtype=dtype)

    def train() -> None:
        layer.zero_grad()
        y, _ = layer(x)
        y.backward(x)

    with torch.inference_mode():
        taken = seconds(lambda: layer(x))
    yield where | {"mode": "inference", "seconds": taken, "us_per_step": taken / T * 1e6}
    taken = seconds(train)
    yield where | {"mode": "training", "seconds": taken, "us_per_step": taken / T * 1e6}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_probe", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="compile, and measure nothing")
    dry = parser.parse_args(argv).dry_run
    major, minor = (9, 0) if dry else torch.cuda.get_device_capability()
    program = None
    if dry and cuda_tool("nvcc") is None:
        emit(probe="compile", not_measured="no nvcc")
        return 0
    with reported(probe="compile"):
        program = compile_probe(f"sm_{major}{minor}")
        emit(probe="compile", arch=f"sm_{major}{minor}")
    measured = 0
    for name in MEASUREMENTS if program else ():
        with reported(probe=name):
            if dry:
                emit(probe=name, not_measured=NO_GPU)
            else:
                run_probe(program, name)
            measured += 1
    device, elements, size, sizes = "cuda", COPIED, 8192, (1024, 16, 768)
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)
    if dry:
        device, elements, size, sizes, dtypes = "cpu", 1000, 64, (3, 2, 8), (torch.float32,)
    with reported(probe="ceilings"):
        for facts in ceilings(device, elements, size):
            emit(**without_nan(facts))
    for dtype in dtypes:
        with reported(probe="nn.LSTM", dtype=str(dtype)):
            for facts in torch_layer(device, dtype, *sizes):
                emit(**without_nan(facts))
    return 0 if measured == len(MEASUREMENTS) else 1


if __name__ == "__main__":
    sys.exit(main())
