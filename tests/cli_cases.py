"""What the tests of the command line share: a text, an untrained model, and calls."""

import re

import pytest

from rnnfast.cli import main
from rnnfast.models import CharLSTM, checkpoint
from rnnfast.text import CharVocabulary

TEXT = "the cat sat on the mat; “purr” ° " * 60
SMALL = [
    *("--hidden", 32, "--embedding", 16, "--dropout", 0),
    *("--batch-size", 8, "--seq-length", 24, "--lr", 0.02),
]


def written(path):
    """The file, with the text."""
    path.write_text(TEXT, encoding="utf-8")
    return path


def with_model(folder):
    """The folder, with an untrained model whose vocabulary has the characters of TEXT."""
    vocabulary = CharVocabulary(TEXT)
    model = CharLSTM(len(vocabulary), 8, 1, vocabulary=vocabulary)
    checkpoint.save(model, folder / checkpoint.FILE_NAME)
    return folder


def train(text_file, out, *more):
    arguments = ["train", "--text", text_file, "--out", out, *SMALL, *more]
    return main([str(argument) for argument in arguments])


def resume(out, *more):
    return main(["train", "--resume", "--out", str(out), *map(str, more)])


def held_out_bits(output):
    """The three figures that the training prints, by name."""
    lines = output.split("held-out text\n")[1].splitlines()[:3]
    matches = [re.match(r"  (\w+ \w+) +([0-9.]+)", line) for line in lines]
    return {match[1]: float(match[2]) for match in matches}


def refusal(arguments, capsys):
    """The error message for invalid arguments."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    assert stop.value.code == 2
    assert output.out == ""
    assert output.err.startswith("rnnfast")
    assert output.err.endswith("\n")
    assert output.err.count("\n") == 1
    return output.err


def log_of(folder):
    """The lines of the log, without the seconds."""
    return [line.rsplit(",", 1)[0] for line in (folder / "log.csv").read_text().splitlines()]
