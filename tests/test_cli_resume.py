"""The command line: trainings that are interrupted, resumed and replaced."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from cli_cases import SMALL, TEXT, log_of, refusal, resume, train, written
from training_worker import signal_at

from rnnfast.cli import main
from rnnfast.cli.output import Results
from rnnfast.cli.progress import ProgressBar
from rnnfast.models import checkpoint, run_state
from rnnfast.models.processes import Processes
from rnnfast.models.training_log import read_log


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    return written(tmp_path_factory.mktemp("text") / "cat.txt")


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
