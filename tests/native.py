"""Compiles the C++ of tests/native/ on first use, and registers its targets with the extension.

Compiled files are kept in build/tests/ until a source changes.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from rnnfast import backend

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "tests" / "native"
OUTPUT = ROOT / "build" / "tests"
COMPILER = shlex.split(os.environ.get("CXX") or "c++")
FLAGS = ["-O1", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden"]
FLAGS += ["-ffp-contract=off", "-fno-math-errno", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}"]

CAPABILITIES = [] if backend.EXTENSION is None else backend.EXTENSION.cpu_capabilities()
BASES = {"amx_emulation": "avx512_bf16", "avx2_vnni_emulation": "avx2"}
"""Emulated instruction sets, and what else they need."""
COMPLETE_EMULATIONS = [name for name in ["amx_emulation"] if BASES[name] in CAPABILITIES]
"""Emulated targets with kernels for every case; cuda_emulation has them only for plain cases."""
VNNI_EMULATIONS = [name for name in ["avx2_vnni_emulation"] if BASES[name] in CAPABILITIES]
"""Emulated targets with kernels of their own only for frozen weights of int8."""


@cache
def load(name: str) -> ctypes.CDLL:
    """Loads the shared object of tests/native/<name>.cpp; compiles it first if necessary."""
    command = [*COMPILER, *FLAGS, "-Wno-psabi"]
    key = hashlib.sha256(repr(command).encode())
    included = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc" / "cpu" / "kernels").glob("*.cpp")]
    for path in sorted([*included, *SOURCES.iterdir()]):
        key.update(path.read_bytes())
    library = OUTPUT / f"{name}-{key.hexdigest()[:16]}.so"
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with open(OUTPUT / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes wait here, and then find it compiled
        if not library.exists():
            for outdated in OUTPUT.glob(f"{name}-*.so"):
                outdated.unlink()
            with tempfile.TemporaryDirectory(dir=OUTPUT) as folder:
                made = Path(folder, library.name)
                command += [str(SOURCES / f"{name}.cpp"), "-o", str(made)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode != 0:
                    raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")
                made.rename(library)
        return ctypes.CDLL(str(library))


@cache
def plug_in(target: str) -> None:
    """Registers a target with the extension if it is an emulated one."""
    if target == "cuda_emulation":
        function = load(target).rnnfast_engine
        function.restype = ctypes.c_void_p
        backend.EXTENSION.add_engine(target, function())
    if target in BASES:
        function = load(target).rnnfast_change
        address = ctypes.cast(function, ctypes.c_void_p).value
        backend.EXTENSION.add_target(target, BASES[target], address)
