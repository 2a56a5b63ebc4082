"""The linker must not mix code of different instruction sets: checks of the object files.

Of several inline functions with the same name the linker keeps one. If that were compiled for a
newer instruction set, every processor would run it.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from rnnfast import backend

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "csrc" / "cpu" / "kernels"
NEWER = sorted(path.stem for path in KERNELS.glob("avx*.cpp"))
BUILDS = f"{sys.implementation.cache_tag}-torch-{torch.__version__}"
"""The prefixes of the build folders in which setup.py keeps objects for this Python and torch."""
SHARED = re.compile(r"^[0-9a-f]+ [WVu] (\S+)$", re.MULTILINE)
"""A weak definition, of which the linker keeps one, in the output of nm."""
BEYOND_BASELINE = re.compile(r"%[yz]mm\d|%k[0-7]\b|%tmm\d|\tv[a-z0-9]+ +.*%xmm")

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="one instruction set is all there is here"
)


@cache
def objects() -> list[Path]:
    """Returns the objects of all builds whose sources still exist, except CUDA's."""
    found = [
        path
        for build in (ROOT / "build").glob(f"{BUILDS}*")
        for source in sorted((ROOT / "csrc").rglob("*.cpp"))
        if (path := build / source.relative_to(ROOT).with_suffix(".o")).exists()
    ]
    if found:
        return found
    built_here = backend.EXTENSION is not None and backend.EXTENSION.__file__ is not None
    if built_here and Path(backend.EXTENSION.__file__).parent == ROOT / "rnnfast":
        pytest.fail(f"{ROOT / 'rnnfast'} has a compiled module, but build/{BUILDS} no objects")
    if backend.EXTENSION is None and os.environ.get("RNNFAST_EXPECT_EXTENSION") != "0":
        pytest.fail(f"rnnfast._C did not build or load: {backend.IMPORT_ERROR}")
    pytest.skip("this checkout has no objects: it has built no compiled module")


def output_of(tool: str, *arguments: object) -> str:
    path = shutil.which(tool)
    assert path is not None, f"{tool} was not found, which comes with the compiler (binutils)"
    command = [path, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("target", NEWER)
def test_inline_functions_have_names_of_their_own(target: str) -> None:
    """Every definition that other objects may have too is in its instruction set's namespace."""
    paths = [path for path in objects() if path.stem == target]
    if not paths:
        assert "-portable" in str(objects()[0]), f"no object of {target}"
        pytest.skip("the build has the portable kernels only")
    for path in paths:
        text = output_of("nm", path)
        # as part of a mangled name: of the function itself, or of a type in its signature
        namespace = f"7rnnfast3cpu{len(target)}{target}"
        assert [name for name in SHARED.findall(text) if namespace not in name] == []


def test_shared_definitions_are_found() -> None:
    """Otherwise the test above could not fail."""
    names = [
        name
        for path in objects()
        if path.parent.name == "drivers"
        for name in SHARED.findall(output_of("nm", path))
    ]
    assert any("7rnnfast3cpu" in name for name in names)


def test_other_objects_run_on_any_processor() -> None:
    """Registers and encodings of AVX and later occur only in the objects of instruction sets."""
    others = [path for path in objects() if path.stem not in NEWER]
    assert any(path.stem == "portable" for path in others)
    for path in others:
        code = output_of("objdump", "-d", "--no-show-raw-insn", path)
        assert BEYOND_BASELINE.findall(code) == [], path
    for path in objects():
        if path.stem in NEWER:
            assert BEYOND_BASELINE.search(output_of("objdump", "-d", "--no-show-raw-insn", path))
