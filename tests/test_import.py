"""What `import rnnfast` and the command line import, and what they import only when needed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import rnnfast

README = Path(__file__).resolve().parents[1] / "README.md"

IMPORT = """
import sys, torch
before = set(sys.modules)
import rnnfast
print(*sorted(set(sys.modules) - before))
"""
# Only processor time counts, since the machine may be busy.
COMMAND_LINE = """
import sys, torch, time
before, start = set(sys.modules), time.process_time()
from rnnfast.cli import main
try:
    main(sys.argv[1:])
except SystemExit as error:
    seconds = time.process_time() - start
    assert error.code == 0
print("\\n", *sorted(set(sys.modules) - before))
print(seconds)
"""


def run(program, *arguments):
    """Returns what a new interpreter prints."""
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def foreign(modules):
    """Returns the modules that belong to neither this package, torch, nor Python."""
    own = {"rnnfast", "torch", *sys.stdlib_module_names, *sys.builtin_module_names}
    return [name for name in modules if name.partition(".")[0] not in own]


def test_importing_takes_nothing_that_torch_has_not_imported():
    found = run(IMPORT).split()
    assert "rnnfast.modules" in found
    assert not foreign(found)
    assert not [name for name in found if name.startswith("torch.")]
    unneeded = {"rnnfast.models", "rnnfast.text", "rnnfast.explain", "rnnfast.cli"}
    assert not unneeded & set(found)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"]], ids=str)
def test_help_is_quick(arguments):
    *_, modules, seconds = run(COMMAND_LINE, *arguments).splitlines()
    assert not foreign(modules.split())
    assert not [name for name in modules.split() if name.startswith("torch._dynamo")]
    assert float(seconds) < 0.3


def submodules():
    """Returns the modules that README lists under "How it works"."""
    listing = README.read_text(encoding="utf-8").split("## How it works")[1].split("\n\n")[1]
    return re.findall(r"\brnnfast\.(\w+)", re.sub(r"torch\.ops\.\S+", "", listing))


USE = """
import sys, rnnfast
for name in sys.argv[1:]:
    assert name in dir(rnnfast), name
    print(getattr(rnnfast, name).__name__)
"""


def test_submodules_need_no_import_of_their_own():
    names = submodules()
    assert {"models", "text", "onnx", "explain", "generation", "cli"} <= set(names)
    names.reverse()  # modules that import others come last
    assert run(USE, *names).split() == [f"rnnfast.{name}" for name in names]


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="module 'rnnfast' has no attribute 'LSTN'"):
        _ = rnnfast.LSTN
    assert not hasattr(rnnfast, "model")
