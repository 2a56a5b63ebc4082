"""Everything that needs a GPU, in under 10 minutes and with no network: `make gpu-check`.

Compiles in place, runs the tests marked `cuda`, looks for memory errors with compute-sanitizer, and
sets rnnfast beside torch.nn (cuDNN). Goes on after a failure, so that one visit to a GPU tells all.
"""

import datetime
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TOTAL_SECONDS = 570
CASES = [f"128,{B},{H},{H}" for H, B in itertools.product((128, 256, 512, 1024), (1, 16, 64, 256))]
DTYPES = ["float32", "bfloat16", "float16"]
STARTED = time.monotonic()


def seconds_left() -> float:
    return TOTAL_SECONDS - (time.monotonic() - STARTED)


def run(title: str, command: list[str], at_most: float, **environment: str) -> str:
    """Runs one part and returns how it ended: "passed", or what was wrong."""
    print(f"== {title}: {' '.join(command)}", flush=True)
    limit = max(1.0, min(at_most, seconds_left()))
    try:
        done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    return "passed" if done.returncode == 0 else f"failed with exit code {done.returncode}"


def sanitizer() -> str | None:
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which(f"{cuda}/bin/compute-sanitizer")


def main() -> int:
    if not torch.cuda.is_available():
        print(f"no CUDA device: torch {torch.__version__} (CUDA {torch.version.cuda}) sees none")
        return 1
    python = sys.executable
    build = [python, "setup.py", "-q", "build_ext", "--inplace"]
    checks = {"build": run("build", build, 300, FORCE_CUDA="1")}
    if checks["build"] == "passed":
        checks["tests"] = run("tests", [python, "-m", "pytest", "-q", "-m", "cuda", "tests"], 240)
        if tool := sanitizer():
            command = [tool, "--tool", "memcheck", "--error-exitcode", "1", python]
            command += ["-m", "benchmarks.tiny_cuda"]
            checks["memcheck"] = run("memcheck", command, 90, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        else:
            checks["memcheck"] = "not run: compute-sanitizer was not found"

        gpu = re.sub(r"\W+", "-", torch.cuda.get_device_name(0))
        today = datetime.datetime.now(datetime.timezone.utc).date()
        file = RESULTS / f"{gpu}-{today}.json"
        command = [python, "-m", "benchmarks.compare", "--device", "cuda", "--dtype", *DTYPES]
        command += ["--case", *CASES, "--min-time", "0.1", "--json", str(file)]
        command += ["--time-limit", f"{seconds_left() - 30:.0f}"]
        file.unlink(missing_ok=True)
        checks["benchmark"] = run("benchmark", command, seconds_left())
        if file.exists():
            file.write_text(json.dumps({"checks": checks} | json.loads(file.read_text()), indent=1))
            print(f"numbers: {file}")
    for name, outcome in checks.items():
        print(f"{name:10} {outcome}")
    print(f"took {time.monotonic() - STARTED:.0f} s")
    fine = all(outcome.startswith(("passed", "not run")) for outcome in checks.values())
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
