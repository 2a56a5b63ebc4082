"""The command line, in this process and once in its own."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import rnnfast
from rnnfast.cli import main
from rnnfast.cli.speed import compare_speed
from rnnfast.models import CharLSTM, checkpoint
from rnnfast.models.training import TrainingOptions
from rnnfast.text import CharVocabulary

TEXT = "the cat sat on the mat; “purr” ° " * 60
SMALL = [
    *("--hidden", 32, "--embedding", 16, "--dropout", 0),
    *("--batch-size", 8, "--seq-length", 24, "--lr", 0.02),
]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "cat.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    """A folder with an untrained model that knows the characters of TEXT."""
    vocabulary = CharVocabulary(TEXT)
    model = CharLSTM(len(vocabulary), 8, 1, vocabulary=vocabulary)
    checkpoint.save(model, tmp_path / checkpoint.FILE_NAME)
    return tmp_path


def train(text_file, out, *more):
    arguments = ["train", "--text", text_file, "--out", out, *SMALL, *more]
    return main([str(argument) for argument in arguments])


def held_out_bits(output):
    """The three figures that the training prints, by name."""
    lines = output.split("held-out text\n")[1].splitlines()[:3]
    return {name.strip(): float(bits) for name, bits in (line.rsplit("  ", 1) for line in lines)}


def refusal(arguments, capsys):
    """What the command line says to arguments that it must refuse."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    assert stop.value.code == 2
    assert output.out == ""
    assert output.err.startswith("rnnfast")
    assert output.err.endswith("\n")
    assert output.err.count("\n") == 1
    return output.err


def test_train_then_generate(text_file, tmp_path, capsys):
    assert train(text_file, tmp_path / "new" / "run", "--epochs", 25, "--prompt", "the cat ") == 0
    output = capsys.readouterr()
    bits = held_out_bits(output.out)
    assert bits["after training"] < 0.2 < bits["bigram model"] < bits["before training"]
    assert "the cat sat on the mat; “purr” ° the" in output.out
    assert "torch.nn.LSTM" in output.out
    assert "rnnfast.LSTM (" in output.out
    assert "char/s" in output.err
    assert "bits/char" in output.err
    assert (tmp_path / "new" / "run" / "loss.png").read_bytes().startswith(PNG)

    model = str(tmp_path / "new" / "run")
    arguments = ["generate", "--model", model, "--prompt", "on the", "--temperature", "0"]
    assert main([*arguments, "--length", "33"]) == 0
    assert capsys.readouterr().out == "on the mat; “purr” ° the cat sat on the\n"


def test_train_is_repeatable(text_file, tmp_path, capsys):
    outputs = []
    for run in "ab":
        assert train(text_file, tmp_path / run, "--epochs", 1, "--seed", 3) == 0
        outputs.append(capsys.readouterr().out.split("\ntraining speed")[0])
    assert outputs[0] == outputs[1]
    assert "time limit" not in outputs[0]
    weights = [(tmp_path / run / checkpoint.FILE_NAME).read_bytes() for run in "ab"]
    assert weights[0] == weights[1]


def test_train_says_when_its_time_is_over(text_file, tmp_path, capsys):
    assert train(text_file, tmp_path, "--epochs", 10**6, "--max-seconds", 0.3) == 0
    assert "the time limit of 0.3 s ended the training" in capsys.readouterr().out


def test_generate_follows_its_seed(folder, capsys):
    def generate(*more):
        assert main(["generate", "--model", str(folder), "--prompt", "the", *more]) == 0
        return capsys.readouterr().out

    assert generate("--seed", "1") == generate("--seed", "1") != generate("--seed", "2")
    assert generate() != generate()


@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_backends_agree(folder, backend, capsys):
    arguments = ["generate", "--model", str(folder), "--prompt", "the", "--temperature", "0"]
    assert main([*arguments, "--backend", backend]) == 0
    forced = capsys.readouterr().out
    assert main(arguments) == 0
    assert capsys.readouterr().out == forced


def test_doctor_prints_the_report(capsys):
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == rnnfast.doctor() + "\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"", "is empty"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"abc", "too short: 3 characters"),
        (b"abcd" * 50, "too short: 180 characters, but 8 streams of sequence length 24 need 193"),
    ],
)
def test_train_refuses_useless_texts(tmp_path, content, words, capsys):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    assert words in refusal(["train", "--text", path, "--out", tmp_path, *SMALL], capsys)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--prompt", "THE", "lacks 'E', 'H', 'T'"),
        ("--prompt", "", "at least one character"),
        ("--temperature", "-1", "expected a number zero or more, got '-1'"),
        ("--temperature", "nan", "zero or more"),
        ("--hidden", "0", "1 or more"),
        ("--layers", "1.5", "without fraction"),
        ("--lr", "fast", "above zero, got 'fast'"),
        ("--dropout", "1", "below 1"),
        ("--validation", "1", "between 0 and 1"),
        ("--validation", "1e-9", "too short"),
        ("--device", "abacus", "device 'abacus' cannot be used"),
        ("--backend", "warp", "invalid choice"),
        ("--out", __file__, "exists"),
        ("--nonsense", "1", "unrecognized arguments"),
    ],
)
def test_train_refuses_useless_options(text_file, tmp_path, option, value, words, capsys):
    arguments = ["train", "--text", text_file, "--out", tmp_path, *SMALL, option, value]
    assert words in refusal(arguments, capsys)


def test_train_says_when_it_diverges(text_file, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(text_file, tmp_path, "--epochs", 1, "--lr", "1e37")
    assert stop.value.code == 2
    assert "a lower learning rate may help" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--prompt", "THE", "lacks 'E', 'H', 'T'"),
        ("--prompt", "", "at least one character"),
        ("--temperature", "-0.5", "zero or more"),
        ("--length", "-3", "1 or more"),
        ("--model", "nowhere", "nowhere does not exist"),
    ],
)
def test_generate_refuses_useless_options(folder, option, value, words, capsys):
    arguments = ["generate", "--model", folder, "--prompt", "the", option, value]
    assert words in refusal(arguments, capsys)


@pytest.mark.parametrize("content", [b"", b"the cat sat on the mat", bytes(100), "truncated"])
def test_generate_refuses_damaged_files(folder, content, capsys):
    path = folder / checkpoint.FILE_NAME
    path.write_bytes(path.read_bytes()[:-100] if content == "truncated" else content)
    arguments = ["generate", "--model", path, "--prompt", "the"]
    assert "not an intact safetensors file" in refusal(arguments, capsys)


@pytest.mark.parametrize(
    ("description", "words"),
    [
        (None, "was not written by rnnfast"),
        ("{", "Expecting property name"),
        ("[]", "does not hold a whole CharLSTM"),
        ("{}", "characters"),
        ('{"characters": "ab", "config": {}}', "missing"),
        ('{"characters": "ab", "config": {"vocab_size": 3, "hidden_size": 8}}', "2 characters"),
        ('{"characters": null, "config": {"vocab_size": 3, "hidden_size": 8}}', "size mismatch"),
        ('{"characters": null, "config": {"vocab_size": 3, "hidden_size": -8}}', "zero"),
        ('{"characters": null, "config": {"vocab_size": "3", "hidden_size": 8}}', "whole"),
        ('{"characters": null, "config": {"flavour": "sweet"}}', "flavour"),
    ],
)
def test_generate_refuses_foreign_files(folder, description, words, capsys):
    path = folder / checkpoint.FILE_NAME
    weights = checkpoint.load(path).state_dict()
    save_file(weights, path, None if description is None else {"rnnfast.CharLSTM": description})
    assert words in refusal(["generate", "--model", path, "--prompt", "the"], capsys)


def test_a_missing_extra_is_named_with_its_remedy(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.delitem(sys.modules, "rnnfast.cli.train", raising=False)
    words = refusal(["train", "--out", folder], capsys)
    assert words == "rnnfast: error: this command needs tqdm: pip install 'rnnfast[cli]'\n"


@pytest.mark.parametrize("command", ["train", "generate", "doctor"])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith(f"usage: rnnfast {command}")
    assert "None" not in output


def test_the_module_is_the_command(folder):
    """In a process of its own, whose terminal knows no more than ASCII."""
    command = [sys.executable, "-m", "rnnfast", "generate", "--model", str(folder)]
    finished = subprocess.run(
        [*command, "--prompt", "the °", "--length", "3"],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (finished.returncode, finished.stdout[:8]) == (0, r"the \xb0")
    finished = subprocess.run(
        [*command, "--prompt", "THE"], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[-1].startswith("rnnfast: error: unknown characters")
    assert "Traceback" not in finished.stderr


def test_the_speed_is_measured_on_copies(folder):
    model = checkpoint.load(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = TrainingOptions(24, 8, epochs=1, max_seconds=1, learning_rate=0.1, clip=1.0)
    speeds = compare_speed(model, model.vocabulary.encode(TEXT), options, "reference")
    assert list(speeds) == ["rnnfast.LSTM (reference)", "torch.nn.LSTM"]
    assert min(speeds.values()) > 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_an_interruption_ends_without_a_traceback(monkeypatch, capsys):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("rnnfast.cli.doctor.run", interrupt)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
