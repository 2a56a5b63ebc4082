"""Describes the hardware and software of a measurement, for every results file."""

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from rnnfast import _C


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def commit() -> str:
    git = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe(device: str) -> dict[str, object]:
    """Hardware, versions and date (UTC), ready for JSON."""
    facts: dict[str, object] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": {
            "rnnfast": _C.get_cpu_capability(),
            "torch": torch.backends.cpu.get_cpu_capability(),
        },
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rnnfast": version(),
        "commit": commit(),
        "built_with": _C.built_with(),
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        facts["gpu"] = gpu.name
        facts["gpu_capability"] = f"{gpu.major}.{gpu.minor}"
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()
        # Reading `cudnn.allow_tf32` raises an error if recurrent layers and convolutions differ.
        facts["cudnn_rnn_fp32_precision"] = torch.backends.cudnn.rnn.fp32_precision
    return facts


def version() -> str:
    try:
        return metadata.version("rnnfast")
    except metadata.PackageNotFoundError:
        return "built in place"
