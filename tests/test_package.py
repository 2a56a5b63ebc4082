"""The package: what an sdist and a wheel hold and require, and what happens with another torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path
from shutil import copytree, ignore_patterns
from types import SimpleNamespace

import pytest
import torch

import rnnfast
from rnnfast import backend, extension

ROOT = Path(__file__).resolve().parents[1]
GENERAL = ["torch<2.15,>=2.11"]
MINOR = ".".join(torch.__version__.split(".")[:2])
PINNED = [f"torch=={MINOR}.*"]
SMOKE = """
import torch, rnnfast
torch.manual_seed(0)
x, theirs = torch.randn(5, 3, 8), torch.nn.LSTM(8, 16)
ours = rnnfast.LSTM(8, 16, backend="fused")
ours.load_state_dict(theirs.state_dict())
torch.testing.assert_close(ours(x), theirs(x))
print(rnnfast.__file__, rnnfast.__version__)
"""


def run(*command: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command without this tree's path, which would hide what is installed."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
    )


def succeed(*command: object, cwd: Path = ROOT, **environment: str) -> str:
    done = run(*command, cwd=cwd, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


SETUP = """
import runpy, sys
{first}
sys.argv = ["setup.py", *sys.argv[1:]]
runpy.run_path("setup.py", run_name="__main__")
"""


FAKE_TORCH = "sys.modules['torch'] = type(sys)('torch'); sys.modules['torch'].__version__ = {!r}"


def refusal(first: str) -> str:
    """What setup.py prints when it fails; ``first`` is run before it."""
    done = run(sys.executable, "-c", SETUP.format(first=first), "dist_info")
    assert done.returncode != 0
    return done.stderr


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    no_torch = SETUP.format(first="sys.modules['torch'] = None")
    # an egg-info of its own: setuptools would add the files that an earlier one lists
    commands = ["-q", "egg_info", "--egg-base", folder, "sdist", "--dist-dir", folder]
    succeed(sys.executable, "-c", no_torch, *commands)
    (path,) = folder.glob("*.tar.gz")
    return path


def unpack(sdist: Path, folder: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / sdist.name.removesuffix(".tar.gz")


def requirements(metadata: Message) -> list[str]:
    """Those that no extra asks for."""
    return [text for text in metadata.get_all("Requires-Dist", []) if "extra ==" not in text]


def test_the_version_has_one_source(sdist: Path) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", rnnfast.__version__)
    assert sdist.name == f"rnnfast-{rnnfast.__version__}.tar.gz"
    assert rnnfast.doctor().startswith(f"rnnfast {rnnfast.__version__}, torch")
    assert f"## {rnnfast.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_an_sdist_has_all_that_a_build_and_the_tests_need(sdist: Path, tmp_path: Path) -> None:
    """It is made where torch cannot be imported, as in a build environment of pip's."""
    source = unpack(sdist, tmp_path)
    packed = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    needed = {Path(name) for name in ("LICENSE", "Makefile", "README.md", "pyproject.toml")}
    for name in (".ci", "benchmarks", "csrc", "rnnfast", "tests"):
        needed |= {path.relative_to(ROOT) for path in (ROOT / name).rglob("*") if path.is_file()}
    needed = {path for path in needed if "__pycache__" not in path.parts and not is_built(path)}
    assert Path("csrc/cpu/cell.h") in needed
    assert sorted(needed - packed) == []
    assert [path for path in packed if is_built(path)] == []


def is_built(path: Path) -> bool:
    return path.suffix in (".so", ".pyc") or path.match("rnnfast/_C*.json")


def test_an_sdist_requires_the_range_of_torch(sdist: Path, tmp_path: Path) -> None:
    text = (unpack(sdist, tmp_path) / "PKG-INFO").read_text(encoding="utf-8")
    assert requirements(message_from_string(text)) == GENERAL


@pytest.mark.parametrize(
    ("compiler", "required"), [("echo __GNUC__", PINNED), ("no-such-c++", GENERAL)]
)
def test_a_wheel_requires_the_torch_that_it_was_built_with(
    compiler: str, required: list[str], tmp_path: Path
) -> None:
    """One without a compiled module runs with every torch of the range."""
    command = [sys.executable, "setup.py", "-q", "dist_info", "--output-dir", tmp_path]
    succeed(*command, CXX=compiler, RNNFAST_CUDA="0")
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    assert requirements(message_from_string(metadata.read_text(encoding="utf-8"))) == required


def test_a_build_without_torch_says_what_to_type() -> None:
    words = refusal("sys.modules['torch'] = None")
    assert "rnnfast: torch cannot be imported" in words
    assert "pip install --no-build-isolation ." in words


def test_a_build_with_an_old_setuptools_says_what_to_type() -> None:
    words = refusal("import setuptools; setuptools.__version__ = '65.5.0'")
    assert "setuptools 65.5.0 is installed, and 77 or newer is needed" in words
    assert "pip install 'setuptools>=77'" in words


@pytest.mark.parametrize("version", ["2.10.1+cpu", "2.15.0"])
def test_a_build_with_a_torch_out_of_range_says_what_to_type(version: str) -> None:
    words = refusal(FAKE_TORCH.format(version))
    assert f"torch {version} is installed, and rnnfast needs torch>=2.11,<2.15" in words
    assert "pip install 'torch>=2.11,<2.15'" in words


@pytest.fixture
def installed_copy(tmp_path: Path) -> Path:
    """The Python sources in a folder of their own, with a module that cannot be loaded."""
    copytree(ROOT / "rnnfast", tmp_path / "rnnfast", ignore=ignore_patterns("_C*", "__pycache__"))
    module = tmp_path / "rnnfast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    module.write_bytes(b"not a shared object")
    return tmp_path


def import_copy(folder: Path, built_with: str | None, script: str) -> str:
    """Runs a script that imports the copy, as it was built with a version of torch."""
    module = folder / "rnnfast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if built_with is not None:
        module.with_suffix(".json").write_text(json.dumps({"torch": built_with}))
    path = os.pathsep.join([str(folder), str(Path(torch.__file__).parents[1])])
    file = folder / "script.py"
    file.write_text(script)
    # -S: without it an editable install of this package may come first
    return succeed(sys.executable, "-S", file, cwd=folder, PYTHONPATH=path, RNNFAST_BACKEND="auto")


MISMATCH = """
import warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import rnnfast  # line 6
    torch.manual_seed(0)
    x, theirs = torch.randn(5, 3, 8), torch.nn.LSTM(8, 16)
    ours = rnnfast.LSTM(8, 16)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
(warning,) = caught
print(warning.filename, warning.lineno, warning.message)
try:
    rnnfast.LSTM(8, 16, backend="fused")(x)
except RuntimeError as error:
    print("fused:", error)
print(rnnfast.doctor())
"""


def test_another_torch_than_that_of_the_build_is_said_once(installed_copy: Path) -> None:
    """Torch's own kernels run then, and the module is not loaded."""
    warning, fused, *doctor = import_copy(installed_copy, "2.1.2+cu121", MISMATCH).splitlines()
    cause = f"rnnfast was built with torch 2.1.2+cu121, but torch {torch.__version__} is installed"
    assert warning.startswith(f"{installed_copy / 'script.py'} 6 {cause}. torch's own kernels run")
    assert "`pip install --no-build-isolation .`" in warning
    assert "`pip install 'torch==2.1.*'`" in warning
    assert fused.startswith("fused: rnnfast: backend 'fused' cannot run")
    assert cause in fused
    assert any(line.startswith("extension") and cause in line for line in doctor)


@pytest.mark.parametrize("built_with", [None, f"{MINOR}.99+cu130"])
def test_a_module_for_this_minor_version_is_loaded(
    installed_copy: Path, built_with: str | None
) -> None:
    """Whatever the patch level and the local version; also if its facts were not copied along."""
    script = "import rnnfast; print(rnnfast.backend.IMPORT_ERROR)"
    assert "file too short" in import_copy(installed_copy, built_with, script)


@pytest.mark.parametrize("content", ["", "{}", "[]"])
def test_damaged_facts_are_ignored(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "_C.json").write_text(content)
    found = SimpleNamespace(origin=str(tmp_path / "_C.so"))
    monkeypatch.setattr(extension, "find_spec", lambda name: found)
    assert extension.built_with() is None


@pytest.mark.skipif(backend.EXTENSION is None, reason="the extension was not built")
def test_the_build_wrote_the_version_of_torch_beside_the_module() -> None:
    assert backend.EXTENSION is not None
    facts = Path(str(backend.EXTENSION.__file__)).with_suffix(".json")
    built = backend.EXTENSION.built_with()["torch"]
    assert json.loads(facts.read_text())["torch"].partition("+")[0] == built.partition("+")[0]


def test_the_matrix_says_which_row_failed(tmp_path: Path) -> None:
    command = [sys.executable, ".ci/matrix.py", "--folder", tmp_path, "--rows", "9.9/2.13.0"]
    done = run(*command)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "| 9.9 | 2.13.0 | failed | no Python 9.9 was found |"


def test_contributing_names_targets_and_files_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"make ([a-z-]+)(?=[` \n])", text))
    assert {"build", "test", "lint", "wheel", "matrix", "bench"} <= targets
    assert [name for name in targets if not re.search(rf"^{name}:", makefile, re.M)] == []
    paths = set(re.findall(r"(?:\.ci|csrc|rnnfast|tests)/[\w./]*\w", text))
    assert "csrc/cells/common.h" in paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
    modules = set(re.findall(r"-m ((?:benchmarks|tests)\.\w+)", text))
    assert "benchmarks.compare" in modules
    assert [m for m in modules if not (ROOT / f"{m.replace('.', '/')}.py").exists()] == []


@pytest.fixture
def fresh_python(tmp_path: Path) -> Path:
    """The Python of a new environment, without any package."""
    venv.create(tmp_path / "fresh", with_pip=True)
    return tmp_path / "fresh" / "bin" / "python"


@pytest.mark.full
def test_a_build_in_isolation_says_what_to_type(
    sdist: Path, fresh_python: Path, tmp_path: Path
) -> None:
    source = unpack(sdist, tmp_path)
    done = run(fresh_python, "-m", "pip", "install", "--no-deps", source)
    assert done.returncode != 0
    assert "pip install --no-build-isolation ." in done.stdout + done.stderr


RELEASE = torch.__version__.partition("+")[0]


@pytest.mark.full
def test_an_sdist_builds_and_runs_in_a_fresh_environment(
    sdist: Path, fresh_python: Path, tmp_path: Path
) -> None:
    source = unpack(sdist, tmp_path)
    pip = [fresh_python, "-m", "pip", "install"]
    succeed(*pip, f"torch=={RELEASE}", "ninja")
    command = [*pip, "--no-build-isolation", source]
    succeed(*command, cwd=tmp_path, RNNFAST_CUDA="0", RNNFAST_CPU_TARGETS="portable")
    file, version = succeed(fresh_python, "-c", SMOKE, cwd=tmp_path).split()
    assert Path(file).is_relative_to(tmp_path / "fresh")
    assert version == rnnfast.__version__


@pytest.mark.full
def test_a_wheel_installs_and_runs_in_a_fresh_environment(
    fresh_python: Path, tmp_path: Path
) -> None:
    said = succeed(sys.executable, ".ci/wheel.py", tmp_path, RNNFAST_CUDA="0")
    (wheel,) = tmp_path.glob("*.whl")
    assert said.splitlines()[-1].startswith(f"{wheel}: ")
    assert re.search(r"-manylinux_2_\d+_\w+\.whl$", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        assert requirements(message_from_string(archive.read(metadata).decode())) == PINNED
        modules = [name for name in names if ".so" in name]
        assert [Path(name).parent for name in modules] == [Path("rnnfast")]  # no library of torch's
        facts = json.loads(archive.read(modules[0].removesuffix(".so") + ".json"))
        assert facts == {"torch": torch.__version__}
        assert "rnnfast/py.typed" in names
        assert any(name.endswith("/licenses/LICENSE") for name in names)
        others = [name for name in names if not name.startswith(("rnnfast/", "rnnfast-"))]
        assert others == []
    # PyPI may have torch of the same version from another build.
    succeed(fresh_python, "-m", "pip", "install", f"torch=={RELEASE}", wheel)
    file, version = succeed(fresh_python, "-c", SMOKE, cwd=tmp_path).split()
    assert Path(file).is_relative_to(tmp_path / "fresh")
    assert version == rnnfast.__version__
