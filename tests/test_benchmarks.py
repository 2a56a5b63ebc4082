"""The benchmarks run, and refuse to time what computes wrong numbers."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import compare, gpu_check, peers, timing, tiny_cuda

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["--min-time", "0", "--repeats", "2", "--threads", "1"]


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def build_wrong(module: nn.RNNBase, x: Tensor) -> nn.Module:
    wrong = copy.deepcopy(module)
    with torch.no_grad():
        wrong.weight_hh_l0[0, 0] += 1e-3
    return wrong


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y * 1.001


def build_wrong_gradient(module: nn.RNNBase, x: Tensor) -> nn.Module:
    wrong = copy.deepcopy(module)
    wrong.register_forward_hook(lambda module, args, out: (WrongGradient.apply(out[0]), out[1]))
    return wrong


def build_inference_only(module: nn.RNNBase, x: Tensor) -> peers.Run:
    return lambda x: module(x)


def build_refusing(module: nn.RNNBase, x: Tensor) -> peers.Run:
    raise peers.UnsupportedError("not on a Tuesday")


def test_compare_writes_table_json_and_csv(tmp_path, capsys):
    files = ["--json", str(tmp_path / "c.json"), "--csv", str(tmp_path / "c.csv")]
    assert compare.main([*QUICK, "--case", "2,1,3,4", "3,2,5,5", "--input-grad", *files]) == 0
    table = capsys.readouterr().out
    assert table.count("2,1,3,4") == len(compare.CELLS) * len(compare.MODES)
    assert "geometric means" in table
    report = json.loads((tmp_path / "c.json").read_text())
    assert report["machine"]["torch"] == torch.__version__
    assert len(report["rows"]) == 12
    for row in report["rows"]:
        assert row["rnnfast_rounds"] >= 2
        assert row["ratio_min"] == pytest.approx(row["peer_min"] / row["rnnfast_min"])
    assert len((tmp_path / "c.csv").read_text().splitlines()) == 13


@pytest.mark.parametrize(
    ("wrong", "mode"),
    [(build_wrong, "inference"), (build_wrong, "training"), (build_wrong_gradient, "training")],
)
@pytest.mark.parametrize("cell", compare.CELLS)
def test_wrong_numbers_are_not_timed(monkeypatch, capsys, cell, wrong, mode):
    monkeypatch.setitem(compare.PEERS, "wrong", wrong)
    argv = [
        *QUICK,
        "--case",
        "4,2,3,5",
        "--cell",
        cell,
        "--mode",
        mode,
        "--peers",
        "torch",
        "wrong",
    ]
    assert compare.main(argv) == 1
    rows = capsys.readouterr().out
    assert rows.count("wrong disagrees") == 1
    assert rows.count("torch disagrees") == 0


def test_peers_that_cannot_run_are_named(monkeypatch, capsys):
    monkeypatch.setitem(compare.PEERS, "frozen", build_inference_only)
    monkeypatch.setitem(compare.PEERS, "refusing", build_refusing)
    argv = [*QUICK, "--case", "2,1,3,4", "--cell", "GRU", "--peers", "frozen", "refusing"]
    assert compare.main(argv) == 0
    rows = capsys.readouterr().out
    assert rows.count("frozen inference only") == 1
    assert rows.count("not on a Tuesday") == 2


@pytest.mark.parametrize("case", ["1,2,3", "1,2,3,x", "0,1,1,1"])
def test_bad_case(case, capsys):
    with pytest.raises(SystemExit):
        compare.main(["--case", case])
    assert case in capsys.readouterr().err


def test_summary_has_geometric_means():
    rows = [
        {"peer": "p", "mode": "m", "dtype": "d", "cell": cell, "ratio_min": r, "ratio_median": r}
        for cell, r in (("RNN", 2.0), ("RNN", 8.0), ("GRU", 4.0))
    ]
    means = {s["cell"]: s["ratio_min"] for s in compare.summarize(rows)}
    assert means == pytest.approx({"RNN": 4.0, "GRU": 4.0, "all": 4.0})
    assert compare.summarize([{"not_timed": "why"}]) == []


def test_time_limit_ends_a_comparison(capsys):
    argv = [*QUICK, "--case", "2,1,3,4", "--time-limit", "0"]
    assert compare.main(argv) == 0
    assert capsys.readouterr().out.count("no time was left") == 6


def test_functions_are_timed_in_turn():
    order = []
    functions = {name: lambda name=name: order.append(name) for name in "ab"}
    timings = timing.time_in_turn(functions, lambda: None, min_time=0.0, min_rounds=3)
    calls = [timings[name].calls for name in "ab"]
    turn = ["a"] * calls[0] + ["b"] * calls[1]
    assert order[-len(turn) * 3 :] == turn * 3
    assert all(t.rounds == 3 and 0 < t.min <= t.median < math.inf for t in timings.values())


def test_suites_run():
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark-disable", "benchmarks"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_gpu_check_without_a_gpu_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main() == 1
    assert "no CUDA device" in capsys.readouterr().out


@pytest.mark.parametrize("failing", [None, "build", "tests", "benchmark"])
def test_gpu_check_tells_all(monkeypatch, tmp_path, capsys, failing):
    ran = []

    def fake_run(title, command, at_most, **environment):
        ran.append(title)
        if title == "benchmark":
            Path(command[command.index("--json") + 1]).write_text('{"rows": []}')
        return "failed with exit code 1" if title == failing else "passed"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(gpu_check, "run", fake_run)
    monkeypatch.setattr(gpu_check, "sanitizer", lambda: "compute-sanitizer")
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    assert gpu_check.main() == (0 if failing is None else 1)
    if failing == "build":
        assert ran == ["build"]
        return
    assert ran == ["build", "tests", "memcheck", "benchmark"]
    (file,) = tmp_path.glob("Some-GPU-*.json")
    assert json.loads(file.read_text())["checks"]["build"] == "passed"


def test_gpu_check_ends_parts_that_take_too_long():
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert "stopped" in gpu_check.run("sleep", sleep, at_most=1)
    assert gpu_check.run("fail", [sys.executable, "-c", "exit(3)"], 60).endswith("exit code 3")


def test_tiny_case_runs():
    tiny_cuda.main("cpu")
