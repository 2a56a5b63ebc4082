"""The command line, mostly called in this process and sometimes in a separate one."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
from cli_cases import SMALL, refusal, with_model, written
from safetensors.torch import save_file

import rnnfast
from rnnfast.cli import main
from rnnfast.models import CharLSTMConfig, checkpoint
from rnnfast.text import CharVocabulary

AB = json.dumps(CharVocabulary("ab").state())


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    return written(tmp_path_factory.mktemp("text") / "cat.txt")


@pytest.fixture
def folder(tmp_path):
    return with_model(tmp_path)


def test_generate_follows_its_seed(folder, capsys):
    def generate(*more):
        assert main(["generate", "--model", str(folder), "--prompt", "the", *more]) == 0
        return capsys.readouterr().out

    assert generate("--seed", "1") == generate("--seed", "1") != generate("--seed", "2")
    assert generate() != generate()


@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_backends_agree(folder, backend, capsys):
    arguments = ["generate", "--model", str(folder), "--prompt", "the", "--greedy"]
    assert main([*arguments, "--backend", backend]) == 0
    forced = capsys.readouterr().out
    assert main(arguments) == 0
    assert capsys.readouterr().out == forced


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert (stop.value.code, capsys.readouterr().out) == (0, f"rnnfast {rnnfast.__version__}\n")


def test_doctor_prints_the_report(capsys):
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == rnnfast.doctor() + "\n"


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--prompt", "THE", "--prompt: unknown characters: the vocabulary of 17 lacks 'E', 'H'"),
        ("--stop", "THE", "--stop: unknown characters: the vocabulary of 17 lacks 'E', 'H'"),
        ("--prompt", "", "at least one character"),
        ("--model", "", "--model: expected the name of a file or folder, got an empty one"),
        ("--temperature", "-0.5", "above zero"),
        ("--length", "-3", "1 or more"),
        ("--model", "nowhere", "/nowhere does not exist; expected a file model.safetensors of"),
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
        (None, "holds no model of rnnfast train"),
        ("{", "Expecting property name"),
        ("[]", "does not hold a whole CharLSTM"),
        ("{}", "config"),
        (f'{{"vocabulary": {AB}, "config": {{}}}}', "missing"),
        (
            f'{{"vocabulary": {AB}, "config": {{"vocab_size": 3, "hidden_size": 8}}}}',
            "2 symbols",
        ),
        ('{"vocabulary": null, "config": {"vocab_size": 3, "hidden_size": 8}}', "size mismatch"),
        ('{"vocabulary": null, "config": {"vocab_size": 3, "hidden_size": -8}}', "zero"),
        ('{"vocabulary": null, "config": {"vocab_size": "3", "hidden_size": 8}}', "whole"),
        ('{"vocabulary": null, "config": {"flavour": "sweet"}}', "flavour"),
        ('{"vocabulary": null, "config": [3, 8]}', "expected a config of names and values"),
        ('{"vocabulary": null, "config": null}', "expected a config of names and values"),
        ('{"vocabulary": null, "config": 3}', "expected a config of names and values"),
        ("[" * 10**5, "does not hold a whole CharLSTM"),
    ],
)
def test_generate_refuses_foreign_files(folder, description, words, capsys):
    path = folder / checkpoint.FILE_NAME
    weights = checkpoint.load(path).state_dict()
    save_file(weights, path, None if description is None else {"rnnfast.CharLSTM": description})
    assert words in refusal(["generate", "--model", path, "--prompt", "the"], capsys)


@pytest.mark.parametrize("name", CharLSTMConfig._fields)
@pytest.mark.parametrize("value", [None, [], {}, "1", int("9" * 400), -(2.0**60), 1e999, math.nan])
def test_a_model_whose_config_is_of_other_types_is_refused(folder, name, value):
    path = folder / checkpoint.FILE_NAME
    model = checkpoint.load(path)
    description = {"config": model.config._asdict(), "vocabulary": model.vocabulary.state()}
    description["config"][name] = value
    save_file(model.state_dict(), path, {"rnnfast.CharLSTM": json.dumps(description)})
    with pytest.raises(checkpoint.CheckpointError, match=f"expected {name} to be (int|float|bool)"):
        checkpoint.load(path)


def test_a_missing_extra_is_named_with_its_remedy(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    for module in ("train", "progress"):
        monkeypatch.delitem(sys.modules, f"rnnfast.cli.{module}", raising=False)
    words = refusal(["train", "--out", folder / "new"], capsys)
    assert words.startswith(
        "rnnfast: error: this command needs tqdm, of the extra cli: pip install"
    )


@pytest.mark.parametrize(
    "command", ["train", "generate", "translate", "explain", "bench", "doctor"]
)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith(f"usage: rnnfast {command}")
    assert "None" not in output


def test_the_module_is_the_command(folder):
    """Run in a separate process whose terminal supports only ASCII."""
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
    assert finished.stderr.splitlines()[-1].startswith("rnnfast: error: --prompt: unknown")
    assert "Traceback" not in finished.stderr


def test_an_interruption_ends_without_a_traceback(monkeypatch, capsys):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("rnnfast.cli.doctor.run", interrupt)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--hidden", 10**8], "more memory than there is: a smaller --hidden or --layers"),
        (["train", "--hidden", 10**20], "1 or more"),
        (["train", "--layers", 10**20], "from 1 to 1000"),
        (["train", "--seed", 10**20], "from 0 to"),
        (["train", "--device", "meta"], "expected cpu or cuda"),
        (["translate", "--hidden", 10**8], "than there is: a smaller --hidden or"),
        (["translate", "--lr", 1e300], "lower learning rate"),
        (["generate", "--prompt", "a", "--top-k", 10**30], "1 or more"),
    ],
    ids=str,
)
def test_absurd_numbers(arguments, words, text_file, tmp_path, capsys):
    if arguments[0] == "train":
        arguments = [arguments[0], "--text", text_file, *SMALL, *arguments[1:]]
    if arguments[0] != "generate":
        arguments = [*arguments, "--out", tmp_path]
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    assert re.search(words, capsys.readouterr().err)


@pytest.mark.parametrize("command", ["train", "translate"])
def test_outputs_that_cannot_be_written_are_found_at_once(command, text_file, tmp_path, capsys):
    (tmp_path / checkpoint.FILE_NAME).mkdir()
    arguments = [command, "--out", tmp_path]
    arguments += ["--text", text_file, *SMALL] if command == "train" else []
    assert "is a folder" in refusal(arguments, capsys)


def test_weights_of_several_dtypes_are_refused(folder, capsys):
    path = folder / checkpoint.FILE_NAME
    model = checkpoint.load(path)
    model.lstm.half()
    checkpoint.save(model, path)
    arguments = ["generate", "--model", path, "--prompt", "the"]
    assert "several dtypes" in refusal(arguments, capsys)


def test_layers_that_are_not_there_are_refused(folder, capsys):
    path = folder / checkpoint.FILE_NAME
    model = checkpoint.load(path)
    model.config = model.config._replace(num_layers=10**9)
    checkpoint.save(model, path)
    arguments = ["generate", "--model", path, "--prompt", "the"]
    assert "has 1 layers, but 1000000000 are announced" in refusal(arguments, capsys)
