"""Builds rnnfast and runs its tests with other versions of Python and torch.

    python .ci/matrix.py [--rows PYTHON/TORCH ...] [--folder FOLDER] [--keep] [-- PYTEST ARGUMENTS]

Each row gets a virtual environment and an unpacked sdist of the working tree, builds the extension
in it and runs pytest there, with the default tests if there are no arguments. A table in Markdown
is printed at the end. `make test` covers Python 3.11 with torch 2.13. Interpreters are looked for
on PATH and among pyenv's. On Linux PyPI's builds of torch need 5 GB of disk for each row.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS = (
    *("3.10/2.13.0", "3.12/2.13.0", "3.13/2.13.0"),
    *("3.11/2.11.0", "3.11/2.12.1", "3.11/2.14.1"),
)
OUTCOMES = "passed|failed|error|skipped|deselected|xfailed"
SUMMARY = re.compile(rf"^=* ?(\d+ (?:{OUTCOMES}).*?) ?=*$", re.MULTILINE)


class StepError(Exception):
    """A step of a row failed; the message says which, and names its log."""


def find_python(version: str) -> str:
    """A Python of this minor version that runs."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [
        shutil.which(f"python{version}"),
        *sorted(pyenv.glob(f"versions/{version}.*/bin/python")),
    ]
    for python in filter(None, found):
        probe = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        answer = subprocess.run(probe, capture_output=True, text=True)  # a shim of pyenv may fail
        if answer.stdout.strip() == version:
            return str(python)
    raise StepError(f"no Python {version} was found")


def requirements(torch: str) -> str:
    """The packages of `make`, but for the version of torch and what it says of setuptools."""
    lines = (ROOT / ".ci" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    own = [line for line in lines if not line.startswith(("torch==", "setuptools=="))]
    return "\n".join([f"torch=={torch}", "setuptools>=77", *own])


class Row:
    """One Python with one torch, in a folder of its own."""

    def __init__(self, name: str, folder: Path) -> None:
        self.version, self.torch = name.split("/")
        self.folder = folder / name.replace("/", "-torch-")
        self.python = self.folder / "venv" / "bin" / "python"
        self.source = self.folder / "source"

    def run(self, step: str, *command: str | Path, cwd: Path | None = None) -> str:
        """Runs a command, its output in a log, and returns the output."""
        log = self.folder / f"{step}.log"
        bin_first = f"{self.python.parent}:{os.environ['PATH']}"
        # PyPI's torch is a CUDA build; `make cuda-build` is what compiles for CUDA.
        environment = os.environ | {"PATH": bin_first, "RNNFAST_CUDA": "0", "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        with log.open("w", encoding="utf-8") as output:
            code = subprocess.run(
                command, cwd=cwd or self.source, env=environment, stdout=output, stderr=output
            ).returncode
        text = log.read_text(encoding="utf-8", errors="replace")
        if code != 0:
            found = SUMMARY.findall(text)
            raise StepError(f"{step}: {found[-1] if found else f'exit status {code}'} ({log})")
        return text

    def prepare(self, sdist: Path) -> None:
        """Makes the environment and unpacks the sdist."""
        shutil.rmtree(self.source, ignore_errors=True)
        with tarfile.open(sdist) as archive:
            archive.extractall(self.folder, filter="data")
        (self.folder / sdist.name.removesuffix(".tar.gz")).rename(self.source)
        if not self.python.exists():
            self.run("venv", find_python(self.version), "-m", "venv", self.folder / "venv")
        listed = self.folder / "requirements.txt"
        listed.write_text(requirements(self.torch), encoding="utf-8")
        self.run("install", self.python, "-m", "pip", "install", "--quiet", "-r", listed)

    def test(self, arguments: list[str]) -> str:
        """Builds, runs pytest, and returns the row of the table."""
        begin = time.monotonic()
        self.run(
            *("build", self.python, "-m", "pip", "install", "--verbose", "--no-deps"),
            *("--no-build-isolation", "--editable", "."),
        )
        seconds = time.monotonic() - begin
        facts = "import platform, torch; print(platform.python_version(), torch.__version__)"
        python, torch = self.run("facts", self.python, "-c", facts).split()[-2:]
        output = self.run("pytest", self.python, "-m", "pytest", "-q", *arguments)
        return f"| {python} | {torch} | {seconds:.0f} s | {SUMMARY.findall(output)[-1]} |"


def make_sdist(folder: Path) -> Path:
    """Packs the working tree; a list of files from an earlier run is not used."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    subprocess.run([*command, "sdist", "--dist-dir", str(folder)], cwd=ROOT, check=True)
    (sdist,) = folder.glob("*.tar.gz")
    return sdist


def main() -> int:
    """Runs the rows one after the other; 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="PYTHON/TORCH")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "matrix")
    parser.add_argument("--keep", action="store_true", help="keep the environments for a next run")
    parser.add_argument("arguments", nargs="*", metavar="PYTEST ARGUMENTS")
    options = parser.parse_args()
    folder = options.folder.resolve()
    sdist = make_sdist(folder / "sdist")
    table, failures = ["| Python | torch | build | tests |", "|---|---|---|---|"], 0
    for name in options.rows:
        row = Row(name, folder)
        try:
            row.prepare(sdist)
            table.append(row.test(options.arguments or ["-n", "auto", "--dist", "worksteal"]))
        except StepError as error:
            table.append(f"| {row.version} | {row.torch} | failed | {error} |")
            failures += 1
        print(table[-1], flush=True)
        if not options.keep:
            shutil.rmtree(row.folder / "venv", ignore_errors=True)
    print("\n".join(["", *table]))
    return failures != 0


if __name__ == "__main__":
    sys.exit(main())
