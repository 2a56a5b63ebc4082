"""The command line: measurements of speed."""

import json
import os
import sys
import time
import warnings

import pytest
import torch
from cli_cases import TEXT, refusal, with_model
from torch import nn

import rnnfast
from rnnfast.cli import main
from rnnfast.cli.speed import compare_speed
from rnnfast.cli.timing import compare, time_in_turn
from rnnfast.models import checkpoint
from rnnfast.models.training import TrainingOptions


@pytest.fixture
def folder(tmp_path):
    return with_model(tmp_path)


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
