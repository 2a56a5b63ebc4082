"""The build: what is compiled, and what happens if something is missing."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from covering import quick_values

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted([*(ROOT / "csrc" / "cuda").glob("*.cu"), *(ROOT / "benchmarks").glob("*.cu")])
CUDA_BIN = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=CUDA_BIN)
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
SPILL = re.compile(r"\b(\d+) bytes spill (stores|loads)")


@pytest.mark.skipif(NVCC is None, reason="nvcc was not found")
@quick_values(kernel=KERNELS, arch=["sm_80", "sm_90"])
def test_kernels_compile_alone_and_spill_no_registers(tmp_path, kernel, arch):
    command = [NVCC, "-O3", "-std=c++20", "-cubin", f"-arch={arch}", "-Xptxas", "-v"]
    command += ["-I", ROOT / "csrc", "-o", tmp_path / "kernel.cubin", kernel]
    done = subprocess.run(command, capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    entry, spills = "", []
    for line in report.splitlines():
        if "Function properties for" in line:
            entry = line.rsplit(" ", 1)[1]
        if any(int(count) for count, _ in SPILL.findall(line)):
            spills.append(f"{entry}: {line.strip()}")
    assert SPILL.search(report), f"ptxas said nothing of registers: {report}"
    assert not spills


@pytest.fixture
def source_copy(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("rnnfast", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    return tmp_path


def run_python(*args, cwd, **environment):
    command = [sys.executable, *map(str, args)]
    environment = os.environ | environment
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("macros", "outcome"),
    [
        ("#define __GNUC__ 4\n#define __clang__ 1", "is not GCC"),
        pytest.param("#define _MSC_VER 1", "is not GCC", marks=pytest.mark.full),
    ],
)
def test_other_compilers_are_not_tried(macros, outcome, source_copy, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\ncat <<END\n{macros}\nEND\n")
    compiler.chmod(0o755)
    built = run_python("setup.py", "--version", cwd=source_copy, CXX=str(compiler))
    assert built.returncode == 0, built.stderr
    assert outcome in built.stdout


def test_a_malformed_compiler_is_an_error(source_copy):
    built = run_python("setup.py", "--version", cwd=source_copy, CXX='"g++')
    assert built.returncode == 1
    assert "No closing quotation" in built.stderr


def test_without_a_compiler_the_package_installs_and_works(source_copy, tmp_path):
    lib = tmp_path / "installed"
    built = run_python("setup.py", "build", "--build-lib", lib, cwd=source_copy, CXX="no-such-c++")
    assert built.returncode == 0, built.stdout + built.stderr
    assert "rnnfast: nothing compiled" in built.stdout
    assert "no C++ compiler" in built.stdout
    script = """
import torch, rnnfast
print(rnnfast.__file__)
print(rnnfast.doctor())
x = torch.randn(3, 2, 4)
rnnfast.LSTM(4, 5)(x)[0].sum().backward()
try:
    rnnfast.LSTM(4, 5, backend="fused")(x)
except RuntimeError as error:
    print("refused:", error)
"""
    # -S: otherwise an editable install of this package would supply its compiled module.
    path = os.pathsep.join([str(lib), str(Path(torch.__file__).parents[1])])
    used = run_python("-S", "-c", script, cwd=lib, PYTHONPATH=path, RNNFAST_BACKEND="auto")
    assert used.returncode == 0, used.stdout + used.stderr
    assert str(lib) in used.stdout.splitlines()[0]
    assert "refused:" in used.stdout


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"RNNFAST_CUDA": "0"}, "RNNFAST_CUDA=0"),
        pytest.param({"CXX": "no-such-c++"}, "no C++ compiler", marks=pytest.mark.full),
    ],
)
def test_force_cuda_fails_loudly(source_copy, environment, reason):
    asked = run_python("setup.py", "build", cwd=source_copy, FORCE_CUDA="1", **environment)
    assert asked.returncode != 0
    assert reason in asked.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build")
def test_force_cuda_needs_a_cuda_torch(source_copy):
    asked = run_python("setup.py", "build", cwd=source_copy, FORCE_CUDA="1")
    assert asked.returncode != 0
    assert "is not a CUDA build" in asked.stderr


WHAT_IS_COMPILED = """
import json, runpy, setuptools
setuptools.setup = lambda ext_modules, **_: print(json.dumps(
    [[ext.sources, [name for name, _ in ext.define_macros]] for ext in ext_modules]
))
runpy.run_path("setup.py")
"""


@pytest.mark.parametrize(("targets", "kernels"), [("", 7), ("portable", 1)])
def test_cpu_targets(targets, kernels):
    environment = {"RNNFAST_CUDA": "0", "RNNFAST_CPU_TARGETS": targets}
    done = run_python("-c", WHAT_IS_COMPILED, cwd=ROOT, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    sources, macros = json.loads(done.stdout.splitlines()[-1])[0]
    assert sum("cpu/kernels/" in source for source in sources) == kernels
    assert "csrc/cpu/kernels/portable.cpp" in sources
    assert macros == ["RNNFAST_PORTABLE_ONLY"] * (targets == "portable")
    assert ("portable only" in done.stdout) == (targets == "portable")


def test_unknown_cpu_targets_are_refused():
    done = run_python("setup.py", "build", cwd=ROOT, RNNFAST_CPU_TARGETS="avx2")
    assert done.returncode != 0
    assert "RNNFAST_CPU_TARGETS should be all or portable, got: 'avx2'" in done.stderr


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize(("macros", "targets"), [([], 7), (["-DRNNFAST_PORTABLE_ONLY"], 1)])
def test_what_is_dispatched_to(tmp_path, macros, targets):
    """The available instruction sets are exactly those that were compiled."""
    if platform.machine() != "x86_64":
        targets = 1
    source, assembly = ROOT / "csrc" / "cpu" / "dispatch.cpp", tmp_path / "dispatch.s"
    flags = ["-std=c++20", "-O1", "-fopenmp", "-Wall", "-Wextra", "-Werror", "-S"]
    command = [COMPILER, *flags, *macros, "-I", ROOT / "csrc", "-o", assembly, source]
    subprocess.run(command, check=True)
    symbol = r"7rnnfast3cpu\d{1,2}(k[A-Z]\w*?|add_amx)(?:E|RNS)"
    tables = set(re.findall(symbol, assembly.read_text()))
    assert "kPortable" in tables
    assert len(tables) == targets


BUILD_EDITABLE = "from setuptools import build_meta; build_meta.build_editable('wheels')"


@pytest.mark.full
def test_an_editable_install_is_a_path_that_type_checkers_follow(source_copy):
    """An import hook instead of a path would work in Python only."""
    built = run_python("-c", BUILD_EDITABLE, cwd=source_copy, CXX="no-such-c++")
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (source_copy / "wheels").glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        (path,) = (name for name in files.namelist() if name.endswith(".pth"))
        assert files.read(path).decode().splitlines() == [str(source_copy)]
    assert (source_copy / "rnnfast" / "py.typed").exists()
