"""Compiles the kernels of a user's cell and keeps them on disk.

A file of the cache holds the kernels of one cell for one instruction set and one type of tensors.
Its name has a digest of all that it was compiled from, so a file is never out of date. Processes
may compile the same cell at the same time: each one compiles in a folder of its own, and puts the
finished file in its place in one step.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Final

import torch

CACHE_VARIABLE: Final = "RNNFAST_CELL_CACHE"
FLAGS: Final = [
    *("-O3", "-g0", "-std=c++20", "-fno-math-errno", "-ffp-contract=off"),
    *("-fvisibility=hidden", "-w"),
]
_STORAGE: Final = {
    torch.float64: "double",
    torch.float32: "float",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
}
DTYPES: Final = tuple(_STORAGE)
"""The types of tensors in the order of the extension's numbers for them."""

_lock = threading.Lock()
_libraries: dict[str, ctypes.CDLL] = {}
"""What has been loaded, by the names of files. Libraries are never unloaded."""


def _begin_child() -> None:
    """Makes a new lock in a forked child, where no thread lives that could release the old one."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_begin_child)


class CompileError(RuntimeError):
    """The kernels of a cell cannot be compiled on this machine."""


def cache_folder() -> Path:
    """Where compiled cells are kept.

    The environment variable ``RNNFAST_CELL_CACHE`` names it. The default is ``rnnfast/cells`` in
    ``XDG_CACHE_HOME``, or in ``~/.cache``.
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base).absolute() / "rnnfast" / "cells"


def load(name: str, struct: str, header: str, target: str, dtype: torch.dtype) -> int:
    """Loads the kernels of a cell, and compiles them if the cache lacks them.

    Args:
        name: The name of the cell, for names of files.
        struct: The name of the C++ struct that ``header`` defines.
        header: The C++ of the cell.
        target: The namespace of the instruction set, a file of csrc/cpu/kernels/isa.
        dtype: The type of tensors.

    Returns:
        The address of the ``CellFunctions`` of csrc/cpu/cell.h. It is valid for good.

    Raises:
        CompileError: There is no compiler, or it fails.
    """
    source = _source(struct, target, dtype)
    key = hashlib.sha256("\0".join((header, source, *FLAGS, _headers_digest())).encode())
    file = f"{name[:64]}-{target}-{_STORAGE[dtype]}-{key.hexdigest()[:16]}.so"
    with _lock:
        if file not in _libraries:
            _libraries[file] = _open(file, header, source)
        return ctypes.addressof(ctypes.c_char.in_dll(_libraries[file], "rnnfast_cell"))


def _open(file: str, header: str, source: str) -> ctypes.CDLL:
    path = cache_folder() / file
    if _is_whole(path):
        with suppress(OSError):  # it may be gone by now, or not be allowed to run
            return ctypes.CDLL(str(path))
    with _folder_to_compile_in(path.parent) as folder:
        built = _compile(Path(folder), header, source)
        try:
            with built.open("rb+") as whole:
                digest = hashlib.sha256(whole.read()).digest()
                whole.write(digest)  # the linker does not mind what follows its file
            os.replace(built, path)
        except OSError as error:
            if Path(folder).parent == path.parent:  # else it has been said already
                _warn_of_cache(path.parent, error)
            return ctypes.CDLL(str(built))
        return ctypes.CDLL(str(path))


def _is_whole(path: Path) -> bool:
    """Whether a file of the cache is there as it was written. A damaged one could end the process.

    The last bytes of the file are the digest of those before.
    """
    try:
        data = path.read_bytes()
    except OSError:
        return False
    size = hashlib.sha256().digest_size
    return hashlib.sha256(data[:-size]).digest() == data[-size:]


def _warn_of_cache(folder: Path, error: OSError) -> None:
    warnings.warn(
        f"compiled cells cannot be kept in {folder} ({error.strerror}), so every process "
        f"compiles them again; {CACHE_VARIABLE} names another folder",
        stacklevel=2,
    )


@contextmanager
def _folder_to_compile_in(wanted: Path) -> Iterator[str]:
    """A new folder in the cache or, if nothing can be written there, one for temporary files.

    Raises:
        CompileError: Neither can be made.
    """
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=wanted, prefix="compiling-")
    except OSError as error:
        _warn_of_cache(wanted, error)
        try:
            folder = tempfile.mkdtemp(prefix="rnnfast-cell-")
        except OSError as none:
            raise CompileError(f"no folder can be written to ({none})") from none
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _source(struct: str, target: str, dtype: torch.dtype) -> str:
    """The C++ that makes the kernels of the cell in ``cell.h``."""
    pairs = target == "avx512_bf16"  # compiled for bfloat16 alone
    selection = "baseline" if target == "portable" else f"isa/{target}"
    headers = [selection, *(["bf16_pairs"] if pairs else []), "cell_functions"]
    storage = _STORAGE[dtype]
    arithmetic = "double" if dtype is torch.float64 else "float"
    space = f"rnnfast::cpu::{target}"
    operand = f"{space}::PairOperand" if pairs else f"{space}::DenseOperand<{arithmetic}>"
    storage = storage if storage in ("double", "float") else f"rnnfast::{storage}"
    return "".join(
        (
            *(f'#include "cpu/kernels/{header}.h"\n' for header in headers),
            '#include "cell.h"\n\n',
            'extern "C" __attribute__((visibility("default")))\n',
            "const rnnfast::cpu::CellFunctions rnnfast_cell;\n",
            "const rnnfast::cpu::CellFunctions rnnfast_cell =\n",
            f"    {space}::make_cell<rnnfast::{struct}, {storage}, {operand}>();\n",
        )
    )


def _compile(folder: Path, header: str, source: str) -> Path:
    """Compiles a cell in a folder and returns the library.

    Raises:
        CompileError: There is no compiler, or it fails.
    """
    try:
        from torch.utils import cpp_extension  # it imports much
    except ImportError as error:  # it needs setuptools
        raise CompileError(f"torch.utils.cpp_extension cannot be imported ({error})") from error

    (folder / "cell.h").write_text(header, encoding="utf-8")
    (folder / "cell.cpp").write_text(source, encoding="utf-8")
    compiler = os.environ.get("CXX", "").split() or ["c++"]
    if shutil.which(compiler[0]) is None:
        raise CompileError(f"there is no C++ compiler (CXX, or {compiler[0]} on PATH)")
    with _ninja_on_path():
        try:
            library = cpp_extension.load(
                name=f"rnnfast_cell_{hashlib.sha256(source.encode()).hexdigest()[:16]}",
                sources=[str(folder / "cell.cpp")],
                extra_cflags=FLAGS,
                extra_include_paths=[str(folder), str(_headers())],
                build_directory=str(folder),
                with_cuda=False,
                is_python_module=False,
            )
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            raise CompileError(f"the C++ compiler failed: {str(error).strip('. ')}") from error
    return Path(library)


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Lets torch find the ninja that is installed just beside this Python."""
    before = os.environ.get("PATH")
    known = os.defpath if before is None else before
    os.environ["PATH"] = known + os.pathsep + str(Path(sys.executable).parent)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PATH"]
        else:
            os.environ["PATH"] = before


def _headers() -> Path:
    """The folder of the package's C++ headers, which is csrc/ where rnnfast lies in its source.

    Raises:
        CompileError: They are missing.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "headers", package.parent / "csrc"):
        if (folder / "cpu/kernels/cell_functions.h").exists():
            return folder
    raise CompileError(f"the C++ headers of rnnfast are missing in {package / 'headers'}")


@cache
def _headers_digest() -> str:
    folder = _headers()
    digest = hashlib.sha256()
    for pattern in ("arguments.h", "cells/*.h", "cpu/*.h", "cpu/kernels/**/*.h"):
        for path in sorted(folder.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()
