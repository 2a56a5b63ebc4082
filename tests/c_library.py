"""Links the C library for tests, and compiles the C program that uses it."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from native import COMPILER, ROOT
from test_symbols import objects

FOLDER = ROOT / "build" / "tests" / "c"
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", f"-I{ROOT / 'csrc'}"]
LINK = ["-shared", "-fopenmp", "-static-libstdc++", "-static-libgcc", "-Wl,-z,defs", "-Wl,-z,now"]
LINK += [f"-Wl,--version-script={ROOT / 'csrc/c/exports.map'}"]


@cache
def library() -> Path:
    """The library, as ``make c-library`` makes it.

    It is linked from the objects of the extension that do not know torch: they have the same
    sources, and compiling them again takes a minute.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    shared = [path for path in objects() if path.parts[path.parts.index("csrc") + 1] == "cpu"]
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        own = []
        for source in sorted((ROOT / "csrc/c").glob("*.cpp")):
            own.append(Path(folder, f"{source.stem}.o"))
            _run([*COMPILER, *FLAGS, "-c", source, "-o", own[-1]])
        made = Path(folder, "librnnfast.so")
        _run([*COMPILER, *LINK, *own, *shared, "-o", made])
        return made.rename(FOLDER / f"librnnfast-{os.getpid()}.so")


@cache
def program() -> Path:
    """tests/native/c_program.c, in C99 with the library."""
    made = FOLDER / f"c_program-{os.getpid()}"
    compiler = shlex.split(os.environ.get("CC") or "cc")
    warnings = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror"]
    source = ROOT / "tests/native/c_program.c"
    _run([*compiler, *warnings, f"-I{ROOT / 'csrc'}", source, library(), "-ldl", "-lm", "-o", made])
    return made


def _run(command: list[object]) -> None:
    words = [*map(str, command)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(words)}\n{done.stderr}")
