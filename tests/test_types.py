"""What a type checker knows of a program that uses this package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("typed_program.py")
ROOT = PROGRAM.parents[1]

MISTAKES = {
    "lstm(x, h)": "No overload variant",  # the state is a pair
    "gru(x, (h, h))": "No overload variant",
    "gru(x, return_cells=True)": "No overload variant",
    "lstm(packed, lengths=[1])": "No overload variant",
    "cell(x, h)": 'has incompatible type "Tensor"; expected "tuple[Tensor, Tensor] | None"',
    "lstm(x)[0].no_method()": '"Tensor" has no attribute "no_method"',
    "rnnfast.functional.lstm(x, h, [])": "No overload variant",
    "rnnfast.use_backend(3)": 'has incompatible type "int"; expected "str | None"',
}
BEGINNING = """\
import torch, rnnfast
from torch.nn.utils.rnn import pack_padded_sequence
x, h = torch.zeros(1, 1, 3), torch.zeros(1, 1, 4)
packed = pack_padded_sequence(x, torch.tensor([1]))
lstm, gru, cell = rnnfast.LSTM(3, 4), rnnfast.GRU(3, 4), rnnfast.LSTMCell(3, 4)
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What mypy finds in strict mode in the program and in one full of mistakes.

    This package is looked at as an installed one is: for its types, not for its errors.
    """
    pytest.importorskip("mypy")
    mistaken = tmp_path_factory.mktemp("types") / "mistaken.py"
    mistaken.write_text(BEGINNING + "\n".join(MISTAKES))
    options = ["--strict", "--follow-imports=silent", "--config-file="]
    # Its own: with other options mypy reads all of torch again, which takes half a minute.
    options += [f"--cache-dir={ROOT / 'build' / 'tests' / 'mypy'}"]
    command = [sys.executable, "-m", "mypy", *options, str(PROGRAM), str(mistaken)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1, result.stdout + result.stderr
    return result.stdout.splitlines()


def test_a_program_has_the_types_it_asserts(report: list[str]) -> None:
    assert report[-1] == f"Found {len(MISTAKES)} errors in 1 file (checked 2 source files)"
    assert not [line for line in report if PROGRAM.name in line]


def test_mistakes_are_found(report: list[str]) -> None:
    first = BEGINNING.count("\n") + 1
    for number, words in enumerate(MISTAKES.values(), start=first):
        found = [line for line in report if f"mistaken.py:{number}: error" in line]
        assert len(found) == 1, report
        assert words in found[0]


def test_the_program_runs() -> None:
    result = subprocess.run([sys.executable, PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "torch.Size([2, 5, 2])\n"
