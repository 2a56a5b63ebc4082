"""What `import rnnfast` and the command line import, and what they import only when needed."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rnnfast

PACKAGE = Path(rnnfast.__file__).parent
MAP = Path(__file__).resolve().parents[1] / "rnnfast/README.md"
SYSTEMS = {"models", "text", "explain", "cli"}
"""The subpackages that the core must not need."""

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
    assert not {f"rnnfast.{name}" for name in {*SYSTEMS, "custom"}} & set(found)


IMPORT_SECONDS = """
import time, torch
start = time.process_time()
import rnnfast
print(time.process_time() - start)
"""


def test_importing_is_quick():
    """Under 50 ms beyond torch; the bound allows for a machine at half its speed."""
    assert any(float(run(IMPORT_SECONDS)) < 0.1 for _ in range(5))


def imported_names(path: Path) -> Iterator[str]:
    """The modules that a file imports when it runs, with the names that it takes from them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = f"rnnfast.{node.module or ''}".rstrip(".") if node.level else node.module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant))


def test_the_core_imports_none_of_the_systems_built_on_it():
    """Neither when it is imported nor in any function; __main__ is the command line's."""
    core = [path for path in PACKAGE.glob("*.py") if path.name != "__main__.py"]
    found = {path.name: set(imported_names(path)) for path in core}
    assert "rnnfast.reference.CELLS" in found["backend.py"]
    assert {name.split(".")[1] for name in imported_names(PACKAGE / "__main__.py")} == {"cli"}
    systems = tuple(f"rnnfast.{name}" for name in SYSTEMS)
    assert {
        file: wrong
        for file, names in found.items()
        if (wrong := [name for name in names if name.startswith(systems)])
    } == {}


WITHOUT_NUMPY = """
import sys
sys.modules["numpy"] = None  # its import then fails
import torch, rnnfast
from torch.nn.utils.rnn import pack_sequence
from rnnfast import functional, generation, onnx

torch.manual_seed(0)
x, tokens = torch.randn(5, 3, 8), torch.randint(8, (5, 3))
for name in ("RNN", "GRU", "LSTM"):
    theirs = getattr(torch.nn, name)(8, 16, num_layers=2, bidirectional=True)
    ours = getattr(rnnfast, name)(8, 16, num_layers=2, bidirectional=True)
    ours.load_state_dict(theirs.state_dict())
    for layer in (ours, rnnfast.accelerate(torch.nn.Sequential(theirs))[0]):
        y = layer(x)[0]
        y.sum().backward()
        torch.testing.assert_close(y, theirs(x)[0])
    ours(pack_sequence([x[:, 0], x[:2, 1]], enforce_sorted=False))
    ours(x, lengths=[5, 2, 3], reset=torch.zeros(5, 3, dtype=torch.bool))
    getattr(rnnfast, name + "Cell")(8, 16)(x[0])
    getattr(rnnfast, name)(8, 16, tokens=True)(tokens)
    getattr(functional, name.lower())
with rnnfast.patch():
    torch.nn.LSTM(8, 16)(x)
model = rnnfast.LSTM(8, 16)
torch.func.vmap(lambda x: model(x)[0])(x.expand(2, 5, 3, 8))
torch.func.jvp(lambda x: model(x)[0], (x,), (x,))
print(rnnfast.doctor())
rnnfast.release_memory()
try:
    import rnnfast.text
except ModuleNotFoundError as error:
    print(error.name)
"""


def test_the_core_runs_without_numpy():
    assert run(WITHOUT_NUMPY).splitlines()[-1] == "numpy"


@pytest.mark.parametrize("arguments", [["doctor"], ["train", "--help"], ["train"]], ids=str)
def test_the_command_line_without_its_extras(arguments):
    """Reports and help work; a command that needs a package names it and the extra."""
    blocked = "import sys; sys.modules |= dict.fromkeys(['numpy', 'tqdm', 'safetensors']); "
    call = f"from rnnfast.cli import main; sys.exit(main({arguments}))"
    found = subprocess.run([sys.executable, "-c", blocked + call], capture_output=True, text=True)
    if arguments == ["train"]:
        assert found.returncode == 2
        assert "this command needs" in found.stderr
        assert "extra cli" in found.stderr
    else:
        assert found.returncode == 0, found.stderr
    assert "Traceback" not in found.stderr


def test_the_command_line_knows_all_schedules():
    from rnnfast.cli.parsers import train
    from rnnfast.models import schedule

    assert train.SCHEDULES == schedule.SCHEDULES


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], pytest.param(["--version"], marks=pytest.mark.full)],
    ids=str,
)
def test_help_is_quick(arguments):
    *_, modules, seconds = run(COMMAND_LINE, *arguments).splitlines()
    assert not foreign(modules.split())
    assert not [name for name in modules.split() if name.startswith("torch._dynamo")]
    assert float(seconds) < 0.3


def submodules():
    """Returns the modules that the map in rnnfast/README.md lists."""
    listing = MAP.read_text(encoding="utf-8").split("\n\n")[1]
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
