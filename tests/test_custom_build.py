"""How the kernels of users' cells are compiled and kept.

Each program is a process of its own. It runs a small cell with a cache folder that a test chooses.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_layers import Written

import rnnfast
from rnnfast.custom import build, cache_folder

ROOT = Path(__file__).resolve().parents[1]

PROGRAM = """
import sys, time, warnings
import torch, rnnfast

@rnnfast.cell(gates=1)
def small(x, h, state):
    return 0.5 * state.h + torch.tanh(x[0] + h[0])

x = torch.ones(4, 2, 2, dtype=torch.float64)
names = None, "reference", "fused"
layers = [rnnfast.Layer(small, 2, 3, dtype=x.dtype, backend=name) for name in names]
for layer in layers[1:]:
    layer.load_state_dict(layers[0].state_dict())
start = time.perf_counter()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        output = layers[0](x)[0]
print(f"the first calls took {time.perf_counter() - start:.1f} s", file=sys.stderr)
torch.testing.assert_close(output, layers[1](x)[0])
for one in caught:
    print("warning:", " ".join(str(one.message).split()))
try:
    torch.testing.assert_close(layers[2](x)[0], output)
    print("fused")
except RuntimeError as error:
    print("RuntimeError:", " ".join(str(error).split()))
"""
NO_COMPILER = {"CXX": "/nonexistent", "PATH": "/nonexistent"}


def start(cache: Path | str, **variables: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "RNNFAST_CELL_CACHE": str(cache)} | variables
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines_of(process: subprocess.Popen[str]) -> list[str]:
    output, errors = process.communicate(timeout=300)
    print(errors)  # pytest shows it after a failure
    assert process.returncode == 0, errors
    return output.splitlines()


def run(cache: Path | str, **variables: str) -> list[str]:
    return lines_of(start(cache, **variables))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a cache folder, in which two processes compiled the cell at the same time."""
    cache = tmp_path_factory.mktemp("cells") / "a folder's name"
    for process in [start(cache), start(cache)]:
        assert lines_of(process) == ["fused"]
    (file,) = cache.iterdir()  # nothing else is left
    return file


def test_a_file_of_the_cache_needs_no_compiler(compiled: Path) -> None:
    before = compiled.stat().st_mtime_ns
    assert compiled.name.startswith("small-")
    assert run(compiled.parent, **NO_COMPILER) == ["fused"]
    assert compiled.stat().st_mtime_ns == before


def shortened(data: bytes) -> bytes:
    return data[: len(data) // 2]


def emptied(data: bytes) -> bytes:
    return data[:4096] + bytes(len(data) - 4096)


def another(data: bytes) -> bytes:
    whole = Path(torch._C.__file__).read_bytes()
    return whole + hashlib.sha256(whole).digest()[:31]


@pytest.mark.parametrize(
    "change",
    [
        shortened,
        *(pytest.param(change, marks=pytest.mark.full) for change in (emptied, another)),
    ],
)
def test_a_damaged_file_is_made_again(change: Callable[[bytes], bytes], compiled: Path) -> None:
    whole = compiled.read_bytes()
    compiled.unlink()  # it may be in use
    compiled.write_bytes(change(whole))
    assert run(compiled.parent) == ["fused"]
    assert build._is_whole(compiled)
    assert list(compiled.parent.iterdir()) == [compiled]


def failing_compiler(folder: Path) -> dict[str, str]:
    file = folder / "compiler"
    file.write_text('#!/bin/sh\ncase "$*" in *version*|-v) exec c++ "$@";; esac\nexit 1\n')
    file.chmod(0o755)
    return {"CXX": str(file)}


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        (lambda folder: NO_COMPILER, "there is no C++ compiler"),
        pytest.param(
            lambda folder: {"CXX": "false"}, "the C++ compiler failed", marks=pytest.mark.full
        ),
        pytest.param(failing_compiler, "the C++ compiler failed", marks=pytest.mark.full),
    ],
    ids=["none", "false", "failing"],
)
def test_without_a_compiler_plain_pytorch_runs(
    compiler: Callable[[Path], dict[str, str]], words: str, tmp_path: Path
) -> None:
    warning, error = run(tmp_path / "cache", **compiler(tmp_path))
    assert warning.startswith("warning: rnnfast: the cell small runs in plain PyTorch:")
    assert words in warning
    assert error.startswith("RuntimeError: rnnfast: backend 'fused' cannot run:")
    assert words in error
    left = tmp_path / "cache"
    assert not left.exists() or not list(left.iterdir())


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    warning, fused = run(tmp_path / "file" / "cells")
    assert warning.startswith("warning: compiled cells cannot be kept in")
    assert "RNNFAST_CELL_CACHE names another folder" in warning
    assert fused == "fused"


def test_the_folder_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RNNFAST_CELL_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RNNFAST_CELL_CACHE", "here")
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("RNNFAST_CELL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "rnnfast" / "cells"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "rnnfast" / "cells"


def define(factor: float, name: str = "small") -> rnnfast.Layer:
    def step(x, h, state):
        return factor * state.h + torch.tanh(x[0] + h[0])

    step.__name__ = name
    return Written(step, 1).layer(2, 3)


@pytest.mark.full
@pytest.mark.parametrize("variable", ["PATH", "CXX"])
def test_variables_are_as_before(
    variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RNNFAST_CELL_CACHE", str(tmp_path))
    monkeypatch.delenv(variable, raising=False)
    before = dict(os.environ)
    layer = define(0.25 if variable == "PATH" else 0.125, "n" * 300)
    layer(torch.ones(4, 2, 2))
    assert dict(os.environ) == before
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("n" * 64 + "-")


def test_threads_compile_at_the_same_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RNNFAST_CELL_CACHE", str(tmp_path))
    layers = [define(factor) for factor in (0.75, 0.875, 0.75, 0.875)]
    x = torch.ones(4, 2, 2)
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda layer: layer(x)[0], layers))
    assert len(list(tmp_path.iterdir())) == 2
    for layer, output in zip(layers, outputs, strict=True):
        layer.backend = "reference"
        torch.testing.assert_close(output, layer(x)[0])


@pytest.mark.full
def test_a_child_of_a_process_that_compiles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RNNFAST_CELL_CACHE", str(tmp_path))
    layer, x = define(0.3125), torch.ones(4, 2, 2)
    import_module("torch.utils.cpp_extension")  # Python cannot fork during an import
    context = torch.multiprocessing.get_context("fork")
    with ThreadPoolExecutor(1) as pool:
        compiling = pool.submit(layer, x)
        while not list(tmp_path.glob("compiling-*")):
            assert not compiling.done()
            time.sleep(0.01)
        child = context.Process(target=layer, args=(x,))
        child.start()
        child.join(60)
        child.kill()
        assert child.exitcode == 0
        compiling.result()


class Samples(torch.utils.data.Dataset[Any]):
    """Samples that a layer makes in the processes of a DataLoader."""

    def __init__(self) -> None:
        self.layer = define(0.375)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> torch.Tensor:
        with torch.no_grad():
            return self.layer(torch.full((3, 1, 2), float(i)))[0]


@pytest.mark.parametrize(
    "before",
    [pytest.param(True, marks=pytest.mark.full, id="compiled before"), False],
)
def test_forked_workers(before: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RNNFAST_CELL_CACHE", str(tmp_path))
    samples = Samples()
    if before:
        samples[0]
    context = torch.multiprocessing.get_context("fork")
    loader = torch.utils.data.DataLoader(samples, num_workers=2, multiprocessing_context=context)
    found = torch.cat(list(loader))
    torch.testing.assert_close(found, torch.stack([samples[i] for i in range(4)]))
