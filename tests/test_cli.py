"""The command line, mostly called in this process and sometimes in a separate one."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from training_worker import signal_at

import rnnfast
from rnnfast.cli import main
from rnnfast.cli.output import Results
from rnnfast.cli.progress import ProgressBar
from rnnfast.cli.speed import compare_speed
from rnnfast.cli.timing import compare, time_in_turn
from rnnfast.models import CharLSTM, CharLSTMConfig, checkpoint, run_state
from rnnfast.models.processes import Processes
from rnnfast.models.training import TrainingOptions
from rnnfast.models.training_log import read_log
from rnnfast.text import CharVocabulary, default_text

TEXT = "the cat sat on the mat; “purr” ° " * 60
SMALL = [
    *("--hidden", 32, "--embedding", 16, "--dropout", 0),
    *("--batch-size", 8, "--seq-length", 24, "--lr", 0.02),
]
AB = json.dumps(CharVocabulary("ab").state())
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "cat.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    """A folder with an untrained model whose vocabulary has the characters of TEXT."""
    vocabulary = CharVocabulary(TEXT)
    model = CharLSTM(len(vocabulary), 8, 1, vocabulary=vocabulary)
    checkpoint.save(model, tmp_path / checkpoint.FILE_NAME)
    return tmp_path


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
    arguments = ["generate", "--model", model, "--prompt", "on the", "--greedy"]
    assert main([*arguments, "--length", "33"]) == 0
    assert capsys.readouterr().out == "on the mat; “purr” ° the cat sat on the\n"


@pytest.mark.full
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
    output = capsys.readouterr().out
    assert "the time limit of 0.3 s ended the training" in output
    assert "--resume with a larger --max-seconds goes on" in output


def test_train_ends_when_it_runs_out_of_patience(text_file, tmp_path, capsys):
    assert train(text_file, tmp_path, "--epochs", 99, "--lr", 1e-30, "--patience", 2) == 0
    output = capsys.readouterr().out
    assert "2 validations without a better loss ended the training after step 30 of" in output
    assert re.search(r"after training +\d\.\d+  after step 10, the best\n", output)


def test_train_with_tied_weights(text_file, tmp_path, capsys):
    options = [*("--hidden", 20, "--tied-weights", "--epochs", 2)]
    text = ["train", "--text", text_file, "--batch-size", 8, "--seq-length", 24, "--out"]
    assert main([str(argument) for argument in [*text, tmp_path, *options]]) == 0
    bits = held_out_bits(capsys.readouterr().out)
    assert bits["after training"] < bits["before training"]
    model = checkpoint.load(tmp_path)
    assert model.head.weight is model.embedding.weight
    assert model.embedding.weight.shape == (len(CharVocabulary(TEXT)), 20)
    assert train(text_file, tmp_path / "small", "--epochs", 1, "--greedy", "--embedding", 5) == 0
    assert "sample from 'the ' without chance" in capsys.readouterr().out
    arguments = [*text, tmp_path / "other", "--hidden", 20, "--tied-weights", "--embedding", 5]
    words = "--tied-weights needs --embedding to be --hidden, got 5 and 20; leave --embedding out"
    assert words in refusal(arguments, capsys)
    assert not (tmp_path / "other").exists()


def log_of(folder):
    """The lines of the log, without the seconds."""
    return [line.rsplit(",", 1)[0] for line in (folder / "log.csv").read_text().splitlines()]


LONG = [
    *("--layers", 2, "--dropout", 0.2, "--epochs", 60, "--max-seconds", "inf"),
    *("--checkpoint-every", 7, "--eval-every", 5, "--sample-length", 10),
]


@pytest.mark.full
@pytest.mark.parametrize("times", [1, 4])
def test_a_training_that_is_killed_ends_the_same(text_file, tmp_path, times, threads):
    torch.set_num_threads(1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(text_file, whole, *LONG) == 0
    total = len(log_of(whole)) - 1
    command = [sys.executable, "-m", "rnnfast", "train", "--text", text_file, "--out", parts]
    command = [str(part) for part in [*command, *SMALL, *LONG]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    chance = random.Random(0)
    kills = sorted(chance.sample(range(20, total - 150), times))
    for target in kills:
        before = (parts / "log.csv").read_bytes() if parts.is_dir() else b""
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
        try:
            wait_for_rows(parts / "log.csv", target, before, process)
            time.sleep(chance.uniform(0, 0.005))
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL
        assert target <= len(log_of(parts)) < total
        command += ["--resume"] * ("--resume" not in command)
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert log_of(parts) == log_of(whole)
    names = [checkpoint.FILE_NAME, run_state.FILE_NAME]
    assert sorted(os.listdir(parts)) == sorted([*names, "log.csv", "loss.png"])
    assert (parts / names[0]).read_bytes() == (whole / names[0]).read_bytes()
    states = [torch.load(folder / names[1], weights_only=True)["run"] for folder in (parts, whole)]
    for state in states:
        del state["seconds"]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def wait_for_rows(log, rows, before, process):
    """Wait until a process has written a log of this many rows."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        content = log.read_bytes() if log.exists() else b""
        if content != before and content.count(b"\n") > rows:
            return
        time.sleep(0.001)
    pytest.fail(f"no {rows} rows; exit code {process.poll()}")


@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.full)])
def test_an_interrupted_training_says_how_to_go_on(text_file, tmp_path, name, capsys):
    number = getattr(signal, name)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    options = ["--epochs", 5, "--dropout", 0.3, "--checkpoint-every", 1000]
    assert train(text_file, tmp_path / "whole", *options) == 0
    with pytest.raises(SystemExit) as stop, signal_at(13, number):
        train(text_file, tmp_path / "parts", *options)
    assert stop.value.code == 128 + number
    words = f"stopped by {name} after step 13 of 50; rnnfast train --resume --out {tmp_path}"
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert len(log_of(tmp_path / "parts")) == 14

    assert resume(tmp_path / "parts") == 0
    assert "resumed after step 13 of 50" in capsys.readouterr().out
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    columns = read_log(tmp_path / "parts" / "log.csv")
    assert (columns["seconds"][1:] >= columns["seconds"][:-1]).all()
    assert train(text_file, tmp_path / "parts", *options, "--resume") == 0
    assert "resumed after step 50 of 50" in capsys.readouterr().out


@pytest.fixture(scope="module")
def finished(text_file, tmp_path_factory):
    """The folder of a finished training."""
    folder = tmp_path_factory.mktemp("finished")
    assert train(text_file, folder, "--epochs", 1) == 0
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--lr", 0.5], "with other settings: --lr was 0.02, is 0.5. Leave out what differs to"),
        (["--lr", 0.5], "or begin anew with --overwrite"),
        (["--seed", 1, "--clip", 2], "--clip was 1.0, is 2.0; --seed was 0, is 1"),
        (["--tied-weights", "--embedding", 32], "--embedding was 16, is 32; --tied-weights was"),
        (["--text", __file__], "the text of --text was 1,980 characters, 17 distinct"),
        (["--text", "gone"], "/gone: No such file"),
        (["--out", "nowhere"], "no training to resume"),
        (["--overwrite"], "--overwrite: not allowed with argument --resume"),
    ],
)
def test_only_the_same_training_is_resumed(
    text_file, finished, changes, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "--out", finished, "--resume", *changes]
    assert words in refusal(arguments, capsys)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("content", [b"", b"the cat sat on the mat", "truncated"])
def test_damaged_training_states_are_refused(text_file, finished, content, capsys):
    path = finished / run_state.FILE_NAME
    whole = path.read_bytes()
    path.write_bytes(whole[:-100] if content == "truncated" else content)
    arguments = ["train", "--text", text_file, "--out", finished, *SMALL, "--epochs", 1, "--resume"]
    assert "not an intact training state" in refusal(arguments, capsys)
    path.write_bytes(whole)


@pytest.mark.parametrize("schedule", [pytest.param("one-cycle", marks=pytest.mark.full), "plateau"])
def test_a_training_cut_by_time_is_extended(text_file, tmp_path, schedule, capsys):
    options = ["--schedule", schedule, "--epochs", 4, "--dropout", 0.3, "--seed", 5]
    assert train(text_file, tmp_path, *options, "--max-seconds", 1e-3) == 0
    assert "the time limit of 0.001 s ended the training after step 1 of 40" in (
        capsys.readouterr().out
    )
    assert resume(tmp_path) == 0
    assert "the time limit of 0.001 s ended the training after step 1 of" in capsys.readouterr().out
    assert resume(tmp_path, "--max-seconds", 300) == 0
    output = capsys.readouterr().out
    assert "resumed after step 1 of 40" in output
    assert "ended the training" not in output
    assert resume(tmp_path, "--epochs", 5, "--max-seconds", "inf") == 0
    assert "resumed after step 40 of 50" in capsys.readouterr().out
    assert read_log(tmp_path / "log.csv")["step"].tolist() == list(range(1, 51))
    arguments = ["train", "--resume", "--out", tmp_path, "--epochs", 2]
    assert "--epochs 2: the training has read more" in refusal(arguments, capsys)


@pytest.mark.full
def test_a_resumed_training_finds_its_text_where_it_is_now(
    text_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.txt").write_bytes(text_file.read_bytes())
    assert train("old.txt", tmp_path / "run", "--epochs", 1) == 0
    monkeypatch.chdir("/")
    assert resume(tmp_path / "run") == 0
    (tmp_path / "old.txt").rename(tmp_path / "new.txt")
    capsys.readouterr()
    arguments = ["train", "--resume", "--out", tmp_path / "run"]
    assert f"--text {tmp_path}/old.txt: No such file" in refusal(arguments, capsys)
    for _ in range(2):  # the first resumption must store the new option
        assert resume(tmp_path / "run", "--text", tmp_path / "new.txt", "--epochs", 2) == 0
    (tmp_path / "new.txt").write_text(TEXT[:-1])
    capsys.readouterr()
    assert "--text was 1,980 characters" in refusal([*arguments, "--epochs", 2], capsys)


RESULTS = [checkpoint.FILE_NAME, "log.csv", "loss.png", run_state.FILE_NAME]


def contents(folder):
    return {name: (folder / name).read_bytes() for name in RESULTS}


@pytest.mark.full
def test_results_stay_until_others_replace_them_whole(text_file, tmp_path, capsys):
    assert train(text_file, tmp_path, "--epochs", 1) == 0
    old = contents(tmp_path)
    capsys.readouterr()
    again = ["train", "--text", text_file, "--out", tmp_path, *SMALL]
    words = refusal(again, capsys)
    assert "has model.safetensors, log.csv, loss.png, training.pt already; --resume" in words
    for options in (["--lr", 1e30], ["--lr", 1e300], ["--text", __file__ + "x"]):
        with pytest.raises(SystemExit):
            main([str(part) for part in [*again, "--overwrite", *options]])
        assert contents(tmp_path) == old
        words = f"delete {tmp_path}/unfinished to return to the older training"
        assert (words in capsys.readouterr().err) == (options[1] == 1e30)
    diverging = [*again, "--overwrite", "--lr", 1e9, "--schedule", "constant", "--patience", 1]
    with pytest.raises(SystemExit):
        main([str(part) for part in [*diverging, "--eval-every", 1]])
    output = capsys.readouterr()
    assert "1 validations without a better loss ended the training after step" in output.out
    assert "goes on" not in output.out
    assert f"rnnfast train --resume --out {tmp_path} goes on with it; {words}" in output.err

    options = ["--epochs", 5, "--dropout", 0.3, "--seed", 1]
    with pytest.raises(SystemExit), signal_at(13, signal.SIGINT):
        train(text_file, tmp_path, *options, "--overwrite")
    assert contents(tmp_path) == old
    said = capsys.readouterr().err
    assert f"its model so far is in {tmp_path}/unfinished, and rnnfast train --resume" in said
    assert words in said
    assert "unfinished" in refusal(again, capsys)
    assert main(["generate", "--model", f"{tmp_path}/unfinished", "--prompt", "the"]) == 0
    assert resume(tmp_path) == 0
    assert "resumed after step 13 of 50" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == sorted(RESULTS)
    assert train(text_file, tmp_path / "whole", *options) == 0
    assert contents(tmp_path)["model.safetensors"] == contents(tmp_path / "whole")[RESULTS[0]]
    assert log_of(tmp_path) == log_of(tmp_path / "whole")


@pytest.mark.parametrize("moved", range(5))
def test_results_are_replaced_even_if_that_was_cut_short(moved, tmp_path, monkeypatch):
    (tmp_path / "tensorboard").mkdir()
    for name in (*RESULTS, "tensorboard/a"):
        (tmp_path / name).write_text("old")
    results = Results(tmp_path, *RESULTS)
    results.check(True, "")
    results.begin(Processes())
    (results.work / "tensorboard").mkdir()
    for name in (*RESULTS, "tensorboard/b"):
        (results.work / name).write_text("new")
    replace, calls = os.replace, []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) > moved:
            raise KeyboardInterrupt
        replace(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(KeyboardInterrupt):
            results.finish()
    with pytest.raises(FileExistsError, match="already; a remedy"):
        Results(tmp_path, *RESULTS).check(False, "a remedy")
    later = Results(tmp_path, *RESULTS)
    later.resume(run_state.FILE_NAME)
    assert later.work == tmp_path
    assert sorted(os.listdir(tmp_path)) == sorted([*RESULTS, "tensorboard"])
    assert {(tmp_path / name).read_text() for name in RESULTS} == {"new"}
    assert os.listdir(tmp_path / "tensorboard") == ["b"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_validation_is_interrupted_and_done_anew(text_file, tmp_path, name, capsys, monkeypatch):
    options = ["--epochs", 3, "--dropout", 0.3, "--eval-every", 4, "--validation", 0.4]
    assert train(text_file, tmp_path / "whole", *options) == 0
    note = ProgressBar.note

    def noted(bar, activity):
        activities.append(activity)
        if len(activities) == 6:  # after 4 steps
            os.kill(os.getpid(), getattr(signal, name))
        note(bar, activity)

    activities = []
    monkeypatch.setattr(ProgressBar, "note", noted)
    with pytest.raises(SystemExit) as stop:
        train(text_file, tmp_path / "parts", *options)
    assert stop.value.code == 128 + getattr(signal, name)
    expected = [*["training"] * 3, "validation  24%", "validation  49%", "validation  73%"]
    assert activities == expected
    assert f"stopped by {name} after step 4 of" in capsys.readouterr().err
    assert len(log_of(tmp_path / "parts")) == 4
    assert resume(tmp_path / "parts") == 0
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")


def test_the_estimate_of_the_bar_knows_the_time_limit():
    bar = ProgressBar(10**9, seconds=70)
    bar.update(10)
    assert "<01:0" in str(bar) or "<01:10" in str(bar)
    bar.close()
    bar = ProgressBar(1000)
    assert "<?" in str(bar)
    bar.update(1000)
    assert "<00:00" in str(bar)
    bar.close()


def test_everything_is_over_in_time(tmp_path, capsys):
    """A long held-out text, sample and speed comparison must not exceed --max-seconds."""
    (tmp_path / "text").write_text(TEXT * 1000)
    start = time.monotonic()
    sizes = ["--hidden", 128, "--sample-length", 10**7, "--max-seconds", 2]
    assert train(tmp_path / "text", tmp_path, *sizes, "--eval-characters", 5000) == 0
    assert time.monotonic() - start < 10
    output = capsys.readouterr().out
    assert "of which 5,000 characters were read" in output
    assert "(no time is left)" in output


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--lr", 1e9, "--epochs", 1], 1, "worse than one that knows nothing .*: it diverged"),
        (["--epochs", 1, "--lr", 1e-4], 0, "a bigram model does better; a longer training"),
        (
            [
                "--epochs",
                4,
                "--lr",
                100,
                "--clip",
                1e9,
                "--eval-every",
                1,
                "--schedule",
                "constant",
            ],
            1,
            "",
        ),
    ],
)
def test_absurd_results_are_said(text_file, tmp_path, options, code, words, capsys):
    if code:
        with pytest.raises(SystemExit) as stop:
            train(text_file, tmp_path, *options)
        assert stop.value.code == code
    else:
        assert train(text_file, tmp_path, *options) == code
    output = capsys.readouterr()
    assert re.search(f"^rnnfast train: warning: .*{words}", output.err, re.M)
    assert "wrote model.safetensors" in output.out


def test_defaults_on_a_short_text_beat_the_bigram_model(tmp_path, capsys):
    (tmp_path / "text").write_text(default_text()[200_000:212_000])
    options = [
        "--hidden",
        "64",
        "--embedding",
        "32",
        "--max-seconds",
        "inf",
    ]  # a small model, for speed
    text = ["train", "--text", f"{tmp_path}/text", "--out", f"{tmp_path}/out"]
    assert main([*text, *options]) == 0
    output = capsys.readouterr()
    bits = held_out_bits(output.out)
    assert bits["after training"] < bits["bigram model"]
    assert "warning" not in output.err
    assert 400 <= len(log_of(tmp_path / "out")) - 1 < 420


def test_train_needs_tensorboard_only_if_asked(text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    arguments = ["train", "--text", text_file, "--out", tmp_path, *SMALL, "--tensorboard"]
    assert "pip install tensorboard" in refusal(arguments, capsys)
    assert not list(tmp_path.iterdir())


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
    ("content", "words"),
    [
        (None, "--text {}: No such file"),
        (b"", "--text: {} is empty"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"abc", "too short: of its 3 characters --validation"),
        (
            b"abcd" * 50,
            "--validation 0.1 leaves 180 to learn from, and --batch-size 8 with --seq-length 24 "
            "needs 193. Give a longer --text, or a smaller --batch-size or --seq-length",
        ),
    ],
)
def test_train_refuses_useless_texts(tmp_path, content, words, capsys):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    arguments = ["train", "--text", path, "--out", tmp_path / "out", *SMALL]
    assert words.format(path) in refusal(arguments, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--prompt", "THE", "--prompt: unknown characters: the vocabulary of 17 lacks 'E', 'H'"),
        ("--prompt", "", "at least one character"),
        ("--text", "", "--text: expected the name of a file or folder, got an empty one"),
        ("--text", "/", "--text /: Is a directory"),
        ("--out", "", "--out: expected the name of a file or folder, got an empty one"),
        ("--eval-characters", "0", "1 or more"),
        ("--temperature", "-1", "expected a number above zero, got '-1'"),
        ("--temperature", "nan", "above zero"),
        ("--hidden", "0", "1 or more"),
        ("--layers", "1.5", "without fraction"),
        ("--lr", "fast", "above zero, got 'fast'"),
        ("--dropout", "1", "below 1"),
        ("--validation", "1", "between 0 and 1"),
        ("--validation", "1e-9", "--validation 1e-09 holds out 0, and 2 are needed"),
        ("--device", "abacus", "device 'abacus' cannot be used"),
        ("--backend", "warp", "invalid choice"),
        ("--out", __file__, f"--out {__file__}: File exists"),
        ("--out", __file__ + "/model", f"--out {__file__}/model: Not a directory"),
        ("--out", "/proc", "--out /proc"),
        ("--schedule", "up", "invalid choice: 'up'"),
        ("--patience", "0", "1 or more"),
        ("--max-seconds", "0", "above zero, or inf"),
        ("--embedding", "0", "1 or more"),
        ("--checkpoint-every", "0", "1 or more"),
        ("--nonsense", "1", "unrecognized arguments"),
    ],
)
def test_train_refuses_useless_options(text_file, tmp_path, option, value, words, capsys):
    arguments = ["train", "--text", text_file, "--out", tmp_path, *SMALL, option, value]
    assert words in refusal(arguments, capsys)


@pytest.mark.parametrize("rate", ["1e37", "1e38", "1e300"])
def test_train_says_when_it_diverges(text_file, tmp_path, rate, capsys):
    with pytest.raises(SystemExit) as stop:
        train(text_file, tmp_path, "--epochs", 1, "--lr", rate)
    assert stop.value.code == 2
    assert "a lower learning rate may help" in capsys.readouterr().err.splitlines()[-1]


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


def test_the_speed_is_measured_on_copies(folder):
    model = checkpoint.load(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = TrainingOptions(24, 8, epochs=1, max_seconds=1, learning_rate=0.1, clip=1.0)
    speeds = compare_speed(model, model.vocabulary.encode(TEXT), options, "reference")
    assert list(speeds) == ["rnnfast.LSTM (reference)", "torch.nn.LSTM"]
    assert min(speeds.values()) > 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_bench_prints_and_writes_its_times(tmp_path, capsys):
    path = tmp_path / "times.json"
    options = ["--size", "3,2,4,5", "--size", "1,1,2,2", "--seconds", "0.01", "--json", path]
    assert main(["bench", *map(str, options)]) == 0
    lines = capsys.readouterr().out.splitlines()
    content = json.loads(path.read_text())
    results = content["results"]
    expected = [
        (size, layer, mode)
        for size in ("3,2,4,5", "1,1,2,2")
        for layer in ("RNN", "GRU", "LSTM")
        for mode in ("inference", "training")
    ]
    assert [tuple(line.split()[:3]) for line in lines[2:-2]] == expected
    for line, result, case in zip(lines[2:-2], results, expected, strict=True):
        size = ",".join(str(result[name]) for name in "TBIH")
        assert (size, result["layer"], result["mode"]) == case
        for name in ("rnnfast", "torch.nn"):
            assert 0 < result[name]["min"] <= result[name]["median"] < 10
        speed_up = result["torch.nn"]["median"] / result["rnnfast"]["median"]
        assert result["speed_up"] == speed_up
        runs = result["speed_ups_of_runs"]
        assert len(runs) == 5
        medians, ratios = line.split()[3:5], line.split()[5:7]
        for name, shown in zip(("rnnfast", "torch.nn"), medians, strict=True):
            microseconds = float(shown.replace(",", ""))
            assert microseconds == pytest.approx(result[name]["median"] * 1e6, abs=0.06)
        assert ratios == [f"{speed_up:.2f}", f"{min(runs):.2f}-{max(runs):.2f}"]
        assert line.endswith(" ?") != result["runs_agree"]
    assert lines[-2].startswith("geometric mean of the speed-ups: ")
    assert lines[-1] == f"wrote {path}"


QUIET, BUSY = [1e-5, 2e-5, 1.1e-5, 1e-5, 1e-5] * 3, [1e-5] * 9 + [2e-2] * 6


@pytest.mark.parametrize(
    ("times", "speed_up", "agrees"),
    [
        (QUIET, 1, True),
        (BUSY, 1, False),
        (BUSY[::-1], 1, False),
        ([2e-2] * 12 + [1e-5] + [2e-2] * 2, 2000, False),  # only the minimum shows it
        ([3e-5] * 5, 3, True),
        ([3e-5], 3, True),
    ],
)
def test_disagreement_of_timings(times, speed_up, agrees):
    found = compare([1e-5] * len(times), times)
    assert found.speed_up == pytest.approx(speed_up)
    assert found.agrees == agrees
    swapped = compare(times, [1e-5] * len(times))
    assert swapped.agrees == agrees
    assert swapped.runs == pytest.approx([1 / ratio for ratio in found.runs])


def test_timing_in_turn():
    called = []
    functions = {name: lambda name=name: (called.append(name), time.sleep(0.03)) for name in "ab"}
    samples = time_in_turn(functions, lambda: None, 0.1)
    assert {name: len(times) for name, times in samples.items()} == {"a": 5, "b": 5}
    assert called[-10:] == ["a", "b"] * 5
    assert all(seconds >= 0.03 for times in samples.values() for seconds in times)


@pytest.mark.parametrize(
    ("times", "load", "words"),
    [
        (QUIET, 0.1, None),
        (
            BUSY,
            0.1,
            "the runs of 1 of 2 lines, marked by ?, disagree by more than a factor of 1.25",
        ),
        (QUIET, 900.0, "other programs use the machine (load 900.0 on"),
    ],
)
def test_bench_says_when_its_times_are_in_doubt(times, load, words, monkeypatch, capfd):
    later = iter([times, QUIET])
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(
        "rnnfast.cli.bench.time_in_turn",
        lambda *_: {"rnnfast": [1e-5] * len(QUIET), "torch.nn": next(later)},
    )
    with warnings.catch_warnings():  # otherwise pytest records the warnings
        warnings.simplefilter("always")
        warnings.showwarning = lambda m, c, f, n, *_: sys.stderr.write(
            warnings.formatwarning(m, c, f, n)
        )
        assert main(["bench", "--size", "1,1,2,2", "--layer", "GRU"]) == 0
    output = capfd.readouterr()
    marks = [line.endswith(" ?") for line in output.out.splitlines()[2:4]]
    assert marks == [times is BUSY, False]
    if words is None:
        assert output.err == ""
    else:
        assert output.err.startswith("rnnfast: warning: the times are in doubt: " + words)
        assert output.err.count("\n") == 1


def test_the_speed_says_when_it_is_in_doubt(folder, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (900.0,) * 3)
    model = checkpoint.load(folder)
    options = TrainingOptions(24, 8, epochs=1, max_seconds=1, learning_rate=0.1, clip=1.0)
    with pytest.warns(UserWarning, match=r"training speeds are in doubt: .*load 900"):
        compare_speed(model, model.vocabulary.encode(TEXT), options, "reference")


def test_bench_compares_the_numbers_first(monkeypatch, capsys):
    class Wrong(rnnfast.GRU):
        def forward(self, *arguments):
            output, state = super().forward(*arguments)
            return output * 1.01, state

    monkeypatch.setattr(rnnfast, "GRU", Wrong)
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--size", "3,2,4,5", "--layer", "GRU"])
    assert stop.value.code == 2
    assert "GRU 3,2,4,5, inference: rnnfast and torch.nn differ by" in capsys.readouterr().err


def test_bench_runs_what_it_says(monkeypatch, capsys):
    made = []

    def gru(*arguments, backend, device):
        made.append(backend)
        return nn.GRU(*arguments)

    monkeypatch.setattr(rnnfast, "GRU", gru)
    options = ["--size", "1,1,1,1", "--layer", "GRU", "--seconds", "0.01"]
    assert main(["bench", "--backend", "reference", *options]) == 0
    assert made == ["reference"] * 2
    assert "backend reference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--size", "1,2,3", "four whole numbers of 1 or more, such as 100,16,128,128; got '1,2,3'"),
        ("--size", "1,2,3,x", "four whole numbers"),
        ("--size", "1,2,3,0", "four whole numbers"),
        ("--layer", "MLP", "invalid choice: 'MLP'"),
        ("--seconds", "0", "above zero"),
        ("--json", "/proc/x", "/proc/x: No such file or directory"),
        ("--json", "", "argument --json: expected the name of a file or folder, got an empty one"),
    ],
)
def test_bench_refuses_useless_options(option, value, words, capsys):
    assert words in refusal(["bench", option, value], capsys)


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
