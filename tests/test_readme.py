"""The README's Python runs as it is printed, each block by itself."""

import os
import re
import shutil
from pathlib import Path

import pytest

from rnnfast.backend import EXTENSION

README = Path(__file__).resolve().parents[1] / "README.md"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
BUILT = EXTENSION is not None or os.environ.get("RNNFAST_EXPECT_EXTENSION") != "0"
pytestmark = pytest.mark.skipif(
    not (BUILT and COMPILER), reason="exports need the extension, and compiling ahead a compiler"
)
BLOCK = re.compile(r"^## (?P<section>[^\n]+)$|^```python\n(?P<code>.*?)^```$", re.M | re.S)


def blocks():
    """The code of each block, at its lines of the README, by section and place in it."""
    text, section, found = README.read_text(encoding="utf-8"), "", []
    for match in BLOCK.finditer(text):
        section = match["section"] or section
        if match["code"] is not None:
            lines = text.count("\n", 0, match.start("code"))
            long = pytest.mark.full if "aoti_compile" in match["code"] else ()
            code = "\n" * lines + match["code"]
            found.append(pytest.param(code, id=f"{section}-{lines + 1}", marks=long))
    return found


def test_no_block_is_overlooked():
    fences = README.read_text(encoding="utf-8").count("```python")
    assert len(blocks()) == fences >= 8


@pytest.mark.parametrize("code", blocks())
def test_a_block_runs_as_printed(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    exec(compile(code, README, "exec"), {"__name__": "__main__"})
