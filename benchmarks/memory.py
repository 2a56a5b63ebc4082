"""Peak memory of training an LSTM layer of rnnfast and torch.nn: `python -m benchmarks.memory`.

Each layer runs in a new process. The result is how much the peak of resident memory rises during
three steps of forward and backward, after the parameters, x and grad_y have been allocated.
`rnnfast recompute` is rnnfast.LSTM with ``recompute=True``.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

import rnnfast
from benchmarks import machine

LAYERS: dict[str, tuple[type[torch.nn.Module], dict[str, object]]] = {
    "rnnfast": (rnnfast.LSTM, {"backend": "fused"}),
    "rnnfast recompute": (rnnfast.LSTM, {"backend": "fused", "recompute": True}),
    "torch": (torch.nn.LSTM, {}),
}


def peak_mib() -> float:
    """Returns this program's peak resident memory. (getrusage would include that before exec.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def training_mib(name: str, T: int, B: int, H: int) -> float:
    """Returns how much the peak rises in this process, in MiB."""

    def step(layer: torch.nn.Module, x: torch.Tensor, grad_y: torch.Tensor) -> None:
        layer.zero_grad(set_to_none=True)
        layer(x)[0].backward(grad_y)

    cls, options = LAYERS[name]
    step(cls(8, 8, **options), torch.ones(2, 2, 8), torch.ones(2, 2, 8))  # loads code into memory
    layer = cls(H, H, **options)
    x, grad_y = torch.randn(T, B, H), torch.randn(T, B, H)
    before = peak_mib()
    for _ in range(3):
        step(layer, x, grad_y)
    return peak_mib() - before


def measure(name: str, T: int, B: int, H: int) -> float:
    """Runs `training_mib` in a new process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--only", name]
    command += ["--size", f"{T},{B},{H}"]
    return float(subprocess.check_output(command, text=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", nargs="+", default=["100,64,512"], metavar="T,B,H")
    parser.add_argument("--only", choices=LAYERS, help="measure one layer, in this process")
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    args = parser.parse_args()
    rows = []
    for text in args.size:
        size = tuple(map(int, text.split(",")))
        if args.only:
            print(f"{training_mib(args.only, *size):.1f}")
            continue
        found = {name: measure(name, *size) for name in LAYERS}
        rows.append({"size": text, "mib": found})
        for name, mib in found.items():
            part = mib / found["torch"]
            print(f"{text:12} {name:18} {mib:8.1f} MiB  {part:5.2f} of torch.nn's")
    if args.json:
        command = "python -m benchmarks.memory --size " + " ".join(args.size)
        content = {"machine": machine.describe("cpu"), "command": command, "rows": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
