"""`make gpu-check`: its time limits, its failures, and its dry run without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import compare, gpu_bench, gpu_check, gpu_probe, gpu_verify, steps, suite
from benchmarks.gpu_check import PARTS, Part
from benchmarks.steps import Case

ROOT = Path(__file__).resolve().parents[1]
PYTHON_LINE = "import json, time; print(json.dumps({'found': 1}), flush=True); "


def lines_of(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 1
    shown = capsys.readouterr().out
    assert "no CUDA device" in shown
    assert "--dry-run" in shown


@pytest.mark.full
def test_dry_run_goes_through_all_stages(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))  # no nvcc: other tests compile CUDA
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert gpu_check.main(["--dry-run", "--results", str(tmp_path)]) == 0, capsys.readouterr().out
    (file,) = tmp_path.glob("*.json")
    report, lines = json.loads(file.read_text()), lines_of(file.with_suffix(".jsonl").read_text())
    assert report["lines"] == lines
    assert list(report["checks"]) == [part.name for part in PARTS]
    not_run = {name for name, outcome in report["checks"].items() if outcome != "passed"}
    assert not_run == {"build", "racecheck"}
    assert "--report-api-errors no" in report["checks"]["racecheck"]
    of = {part.name: [line for line in lines if line.get("part") == part.name] for part in PARTS}
    assert all("not_measured" in line for line in of["probe"] if "probe" in line)
    assert {line["precision"] for line in of["parity"] if "precision" in line} == {"ieee", "tf32"}
    assert of["tests"][-2]["tests"]["passed"] > 0
    assert {line["dtype"] for line in of["memcheck"] if "ran" in line} == set(compare.DTYPES)
    assert sum("ratio_min" in line for line in of["bench"]) == len(steps.CELLS) * 4
    assert {row["dtype"] for row in report["summary"]} == {"float32", "tf32"}


def test_probe_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(gpu_probe, "cuda_tool", lambda name: f"/cuda/{name}")
    monkeypatch.setattr(gpu_probe, "compile_probe", Path)
    assert gpu_probe.main(["--dry-run"]) == 0
    lines = lines_of(capsys.readouterr().out)
    assert lines[0] == {"probe": "compile", "arch": "sm_90"}
    assert [line["probe"] for line in lines[1:7]] == list(gpu_probe.MEASUREMENTS)
    assert all("not_measured" in line for line in lines[1:])


@pytest.mark.parametrize("seconds", [gpu_check.TOTAL_SECONDS, 200.0])
def test_parts_leave_time_for_those_after_them(seconds):
    left, parts = seconds, list(PARTS)
    assert gpu_check.TOTAL_SECONDS < 600
    for number, part in enumerate(parts):
        limit = gpu_check.limit_of(number, parts, left)
        assert limit <= part.at_most
        if seconds == gpu_check.TOTAL_SECONDS:
            assert limit >= part.at_least
        left -= limit
    assert left >= 0


def on_a_gpu(monkeypatch, *parts):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_check, "PARTS", parts)


def part(name, code, at_most=60.0):
    return Part(name, "verify", at_most, 0.0, ("-c", PYTHON_LINE + code))


def report_in(folder):
    (file,) = folder.glob("Some-GPU-*.json")
    return json.loads(file.read_text())


def test_what_fails_or_hangs_does_not_stop_the_rest(monkeypatch, tmp_path):
    hangs = part("hangs", "time.sleep(60)", at_most=2.0)
    fails = part("fails", "print('some words'); exit(3)")
    on_a_gpu(monkeypatch, hangs, fails, part("works", ""))
    assert gpu_check.main(["--results", str(tmp_path)]) == 1
    report = report_in(tmp_path)
    outcomes = {"hangs": "stopped after 2 s", "fails": "failed with exit code 3", "works": "passed"}
    assert report["checks"] == outcomes
    assert [line["part"] for line in report["lines"] if "found" in line] == list(outcomes)
    assert ["some words"] in [line.get("output") for line in report["lines"]]


@pytest.mark.parametrize("code", ["", "exit(1)"])
def test_nothing_runs_without_a_build(monkeypatch, tmp_path, code):
    """The build is for this GPU, and of the CPU's instruction sets only for the portable one."""
    look = "import os; print(os.environ['RNNFAST_CPU_TARGETS'], os.environ['FORCE_CUDA']); "
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    on_a_gpu(monkeypatch, part("build", look + code), part("parity", ""))
    assert gpu_check.environment_of(gpu_check.PARTS[0], False) == {
        "FORCE_CUDA": "1",
        "RNNFAST_CPU_TARGETS": "portable",
        "TORCH_CUDA_ARCH_LIST": "9.0",
    }
    assert gpu_check.main(["--results", str(tmp_path)]) == (1 if code else 0)
    outcome = report_in(tmp_path)["checks"]["parity"]
    assert outcome == ("failed: there is no build" if code else "passed")


def test_an_interrupted_check_leaves_what_it_has(monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    on_a_gpu(monkeypatch, part("works", ""), part("long", ""))
    run = gpu_check.run
    monkeypatch.setattr(
        gpu_check, "run", lambda *a: interrupt() if a[-1].name == "long" else run(*a)
    )
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main(["--results", str(tmp_path)])
    assert report_in(tmp_path)["checks"] == {"works": "passed"}


def test_sanitizers_do_not_fail_on_what_torch_asks_the_driver(monkeypatch):
    monkeypatch.setattr(gpu_check, "cuda_tool", lambda name: f"/cuda/{name}")
    memcheck = next(part for part in PARTS if part.name == "memcheck")
    command = " ".join(gpu_check.command_of(memcheck, 60.0, dry_run=False))
    assert command.startswith("/cuda/compute-sanitizer --tool memcheck --report-api-errors no")
    assert command.endswith("-m benchmarks.tiny_cuda")
    monkeypatch.setattr(gpu_check, "cuda_tool", lambda name: None)
    assert gpu_check.command_of(memcheck, 60.0, False) == "compute-sanitizer was not found"


def test_a_probe_that_fails_keeps_its_lines(tmp_path, capsys):
    program = tmp_path / "probe"
    program.write_text('#!/bin/sh\necho \'{"probe": "x", "us": 1}\'\necho "no $1" >&2\nexit 1\n')
    program.chmod(0o755)
    with pytest.raises(RuntimeError, match="no flags"):
        gpu_probe.run_probe(program, "flags")
    assert lines_of(capsys.readouterr().out) == [{"probe": "x", "us": 1}]


def test_a_test_file_that_cannot_be_collected_does_not_stop_the_others(tmp_path):
    (tmp_path / "test_a.py").write_text("import there_is_no_such_module\n")
    (tmp_path / "test_b.py").write_text(
        "import pytest\npytestmark = pytest.mark.cuda\n"
        "def test_1(): pass\ndef test_2(): assert 1 == 2\n"
    )
    command = [sys.executable, "-m", "benchmarks.gpu_tests", "--files"]
    command += [tmp_path / "test_a.py", tmp_path / "test_b.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = lines_of(done.stdout)
    assert done.returncode == 1
    assert "there_is_no_such_module" in lines[0]["error"]
    assert "assert 1 == 2" in next(line["failed"] for line in lines if "test" in line)
    assert lines[-1] == {"tests": {"errors": 1, "passed": 1, "failed": 1}, "not_run": 0}


def test_what_matters_most_is_timed_first():
    order = gpu_bench.choices(gpu_bench.CASES, (("float16", "ieee"), ("float32", "tf32")))
    for choice in order[:2]:
        assert (choice.cell, choice.mode) == ("LSTM", "training")
        assert choice.case == Case(1024, 16, 768, 768)
    assert len(set(order)) == len(order) == 3 * 2 * 2 * len(gpu_bench.CASES)
    assert len({case.T for case in gpu_bench.CASES}) > 3


def test_a_benchmark_that_timed_nothing_fails(capsys):
    assert gpu_bench.main(["--dry-run", "--seconds", "-1"]) == 1
    assert lines_of(capsys.readouterr().out)[-1]["timed"] == 0


def test_a_benchmark_with_a_case_that_fails_goes_on_and_fails(monkeypatch, capsys):
    whole = suite.compare_one

    def compare_one(problem, args):
        if isinstance(problem.module, torch.nn.GRU):
            raise RuntimeError("out of memory")
        return whole(problem, args)

    monkeypatch.setattr(suite, "compare_one", compare_one)
    assert gpu_bench.main(["--dry-run"]) == 1
    lines = lines_of(capsys.readouterr().out)
    assert sum("out of memory" in line.get("error", "") for line in lines) == 4
    assert lines[-1] == {"timed": 8, "disagreed": 0, "failed": 4, "not_started": 0}


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_wrong_numbers_are_found(monkeypatch, wrong):
    arithmetic = gpu_verify.ARITHMETIC[0]
    assert gpu_verify.check("GRU", Case(3, 2, 5, 7), arithmetic, "cpu", 1)["passed"]
    build = gpu_verify.build_rnnfast

    def build_wrong(problem):
        step = build(problem)
        return step._replace(numbers=lambda y: {**step.numbers(y), "y": y.detach() + wrong})

    monkeypatch.setattr(gpu_verify, "build_rnnfast", build_wrong)
    assert not gpu_verify.check("GRU", Case(3, 2, 5, 7), arithmetic, "cpu", 1)["passed"]
    assert torch.backends.cudnn.rnn.fp32_precision != "ieee"
