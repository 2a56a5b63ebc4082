"""The benchmarks run, and do not time implementations with wrong results."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import (
    compare,
    peers,
    plot,
    roofline,
    sequences,
    steps,
    suite,
    systems,
    timing,
    tiny_cuda,
)
from benchmarks.roofline import Calibration, Level
from benchmarks.steps import Case, Problem, Step

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["--min-time", "0", "--repeats", "2", "--threads", "1", "--no-limit"]
# A machine with round numbers, for expected limits that are easy to compute.
MACHINE = Calibration(
    threads=2,
    fma=dict.fromkeys(roofline.ELEMENT_BYTES, 200e9),
    levels=[
        Level("L1", 64e3, 400e9),
        Level("L2", 2e6, 200e9),
        Level("L3", 32e6, 100e9),
        Level("DRAM", math.inf, 50e9),
    ],
    barrier=1e-6,
)


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def build_wrong(problem: Problem) -> Step:
    wrong = copy.deepcopy(problem.module)
    with torch.no_grad():
        wrong.weight_hh_l0[0, 0] += 1e-3
    return steps.module_step(wrong, problem)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y * 1.001


def build_wrong_gradient(problem: Problem) -> Step:
    wrong = copy.deepcopy(problem.module)
    wrong.register_forward_hook(lambda module, args, out: (WrongGradient.apply(out[0]), out[1]))
    return steps.module_step(wrong, problem)


def build_refusing(problem: Problem) -> Step:
    raise peers.UnsupportedError("not on a Tuesday")


def build_missing(problem: Problem) -> Step:
    import a_package_that_nobody_has  # noqa: F401


def test_sequences_compares_before_it_times(tmp_path, capsys, monkeypatch):
    file = tmp_path / "s.json"
    quick = ["--case", "6,3,4,5", "--min-time", "0", "--repeats", "1", "--threads", "1"]
    sequences.main([*quick, "--json", str(file)])
    assert capsys.readouterr().out.count("6,3,4,5") == 6
    rows = json.loads(file.read_text())["rows"]
    assert all({"packed", "lengths", "reset"} <= set(row["ratios"]) for row in rows)
    assert sum("projection" in row["ratios"] for row in rows) == 2
    wrong = sequences.pad_packed_sequence
    monkeypatch.setattr(
        sequences, "pad_packed_sequence", lambda y, **o: (wrong(y, **o)[0] * 1.01, None)
    )
    with pytest.raises(AssertionError):
        sequences.main(quick)


def test_systems_compares_before_it_times(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(systems, "TOKENS", ((9, "zipf"), (5, "uniform")))
    monkeypatch.setattr(systems, "JORDAN", ((4, 2, 3, 5, 2),))
    monkeypatch.setattr(systems, "GREEDY", 5)
    file = tmp_path / "s.json"
    quick = ["--min-time", "0", "--repeats", "1", "--size", "5,3,4", "--generate-hidden", "8"]
    systems.main([*quick, "--json", str(file)])
    rows = {row["case"]: row["ratios"] for row in json.loads(file.read_text())["rows"]}
    assert len(rows) == 4 + 1 + 2
    assert all(ratio > 0 for ratios in rows.values() for ratio in ratios.values())
    assert "loop / generate" in capsys.readouterr().out
    monkeypatch.setattr(systems.JordanRNN, "forward", lambda self, x: (x.new_zeros(2, 4, 2), None))
    with pytest.raises(AssertionError):
        systems.main([*quick, "--only", "jordan"])
    monkeypatch.setattr(systems.PlainLoop, "__call__", lambda *_, **__: [0] * 5)
    with pytest.raises(AssertionError, match="not those of the plain loop"):
        systems.main([*quick, "--only", "generation"])


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
    monkeypatch.setitem(peers.PEERS, "wrong", peers.Peer(wrong))
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
    monkeypatch.setitem(peers.PEERS, "absent", peers.Peer(build_missing))
    monkeypatch.setitem(peers.PEERS, "refusing", peers.Peer(build_refusing))
    argv = [*QUICK, "--case", "2,1,3,4", "--cell", "GRU", "--peers", "absent", "refusing", "torch"]
    assert compare.main(argv) == 0
    rows = capsys.readouterr().out
    assert rows.count("not installed: No module named 'a_package_that_nobody_has'") == 2
    assert rows.count("not on a Tuesday") == 2


@pytest.mark.parametrize("mode", compare.MODES)
@pytest.mark.parametrize("cell", compare.CELLS)
@pytest.mark.parametrize("name", [name for name in peers.PEERS if name != "torch"])
def test_installed_peers_agree(name, cell, mode):
    torch.set_num_threads(1)
    problem = steps.make_problem(cell, Case(5, 3, 7, 9), "cpu", torch.float32, mode, True)
    exact_problem = problem.to(torch.float64)
    inference_only = name in ("onnxruntime", "openvino", "torch_int8")
    if (mode == "training" and inference_only) or (name == "torch_int8" and cell == "RNN"):
        with pytest.raises((peers.UnsupportedError, ImportError)):
            peers.PEERS[name].build(problem)
        return
    with torch.inference_mode(mode == "inference"):
        try:
            step = peers.PEERS[name].build(problem)
        except ImportError as reason:
            pytest.skip(f"not installed: {reason}")
        exact, ours = (
            steps.results(steps.module_step(p.module, p)) for p in (exact_problem, problem)
        )
        tolerance = peers.PEERS[name].tolerance
        assert steps.disagreement(steps.results(step), ours, exact, tolerance) is None


@pytest.mark.parametrize("case", ["1,2,3", "1,2,3,x", "0,1,1,1"])
def test_bad_case(case, capsys):
    with pytest.raises(SystemExit):
        compare.main(["--case", case])
    assert case in capsys.readouterr().err


def test_summary_has_geometric_means():
    rows = [
        {"peer": "p", "mode": "m", "dtype": "d", "threads": 1, "cell": cell}
        | {"ratio_min": r, "ratio_median": r}
        for cell, r in (("RNN", 2.0), ("RNN", 8.0), ("GRU", 4.0))
    ]
    means = {s["cell"]: s["ratio_min"] for s in suite.summarize(rows) if s["peer"] == "p"}
    assert means == pytest.approx({"RNN": 4.0, "GRU": 4.0, "all": 4.0})
    assert suite.summarize([{"not_timed": "why"}]) == []


def test_scaling_with_threads(capsys):
    argv = ["--case", "2,1,3,4", "--cell", "RNN", "--mode", "inference", "--no-limit"]
    assert compare.main([*argv, "--min-time", "0", "--repeats", "1", "--threads", "1", "2"]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    assert line.split()[:6] == ["inference", "RNN", "float32", "2,1,3,4", "torch", "1:"]
    with pytest.raises(SystemExit):
        compare.main(["--threads", "1", "2", "--peers", "jax"])
    row = {"mode": "m", "cell": "c", "dtype": "d", "T": 1, "B": 2, "I": 3, "H": 4, "peer": "p"}
    rows = [
        row | {"threads": 1, "rnnfast_min": 6.0, "peer_min": 8.0},
        row | {"threads": 3, "rnnfast_min": 2.0, "peer_min": 5.0},
    ]
    assert compare.format_scaling(rows).endswith("1: 1.00 / 1.00  3: 3.00 / 1.60")


def test_best_peer_of_each_case():
    def row(peer: str, T: int, ratio: float) -> dict[str, object]:
        where = {"mode": "m", "dtype": "d", "cell": "c", "T": T, "peer": peer}
        return where | {"lower_precision": peer == "int8", "ratio_min": ratio}

    rows = [row("a", 1, 3.0), row("b", 1, 2.0), row("int8", 1, 0.5), row("a", 2, 1.5)]
    best = suite.best_peers(rows)
    assert [(r["T"], r["peer"], r["ratio_min"]) for r in best] == [
        (1, "best", 2.0),
        (2, "best", 1.5),
    ]


def test_calibration_is_plausible():
    for threads in (1, 2):
        machine = roofline.calibrate(threads, seconds=5e-4, windows=4, dram_bytes=8 << 20)
        assert 1e8 < machine.fma["float32"] < 1e14
        assert machine.fma["bfloat16"] > 0.8 * machine.fma["float32"]  # both are measured
        assert [level.name for level in machine.levels] == ["L1", "L2", "L3", "DRAM"]
        assert all(1e8 < level.bandwidth < 1e13 for level in machine.levels)
        capacities = [level.capacity for level in machine.levels]
        assert capacities == sorted(capacities)
        assert machine.barrier >= 0


@pytest.mark.parametrize("mode", compare.MODES)
@pytest.mark.parametrize("cell", compare.CELLS)
def test_limits(cell, mode):
    def limit(*case: int, dtype: str = "float32", input_grad: bool = False) -> roofline.Limit:
        return roofline.limit(cell, Case(*case), mode, dtype, input_grad, MACHINE)

    small = (2, 2, 50, 60)
    for k in range(4):
        grown = [limit(*(n * 2**g if k == j else n for j, n in enumerate(small))) for g in range(9)]
        seconds = [one.seconds for one in grown]
        assert seconds == sorted(seconds)
        assert all(one.seconds == max(one.fma, one.traffic) > 0 for one in grown)
    assert limit(50, 4096, 512, 512).bound == "FMA"
    assert limit(1, 1, 4000, 4000).bound == "DRAM"
    assert limit(100, 1, 8, 800).bound in ("L2", "L3")
    assert limit(9, 1, 500, 500, dtype="float16").traffic < limit(9, 1, 500, 500).traffic
    grad = limit(9, 99, 500, 500, input_grad=True)
    assert (grad.fma > limit(9, 99, 500, 500).fma) == (mode == "training")


def test_limit_of_lstm_inference_by_hand():
    found = roofline.limit("LSTM", Case(10, 8, 16, 32), "inference", "float32", False, MACHINE)
    assert found.fma == pytest.approx(10 * 8 * 2 * 4 * 32 * (16 + 32) / 200e9)
    once = 4 * (4 * 32 * 16 + 10 * 8 * (16 + 32))
    assert found.traffic == pytest.approx((10 * 4 * 4 * 32 * 32 + once) / 400e9)


def test_barriers_only_where_threads_outnumber_sequences():
    one, both = (roofline.Limit(seconds, "FMA", seconds, 0) for seconds in (10e-6, 5e-6))

    def synchronised(T: int, B: int) -> float:
        return roofline.synchronised(Case(T, B, 8, 8), "inference", one, both, MACHINE)

    assert synchronised(2, 2) == both.seconds
    assert synchronised(2, 1) == pytest.approx(7e-6)
    assert synchronised(9, 1) == one.seconds


def test_limits_are_reported(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(roofline, "calibrate", lambda threads: MACHINE._replace(threads=threads))
    argv = [arg for arg in QUICK if arg != "--no-limit"] + ["--case", "2,1,3,4", "--cell", "RNN"]
    assert compare.main([*argv, "--json", str(tmp_path / "c.json")]) == 0
    assert "reaches 85% of the limit" in capsys.readouterr().out
    report = json.loads((tmp_path / "c.json").read_text())
    for row in report["rows"]:
        assert row["of_limit"] == pytest.approx(row["limit"] / row["rnnfast_min"])
    assert len(report["calibration"]) == 2


def test_no_compiler_no_limits(monkeypatch, capsys):
    def fail(threads: int) -> None:
        raise roofline.CalibrationError("no C compiler was found")

    monkeypatch.setattr(roofline, "calibrate", fail)
    argv = [arg for arg in QUICK if arg != "--no-limit"] + ["--case", "2,1,3,4", "--cell", "RNN"]
    assert compare.main(argv) == 0
    assert "no C compiler" in capsys.readouterr().err


def test_plot_and_table(tmp_path, capsys):
    numbers, picture = tmp_path / "c.json", tmp_path / "c.png"
    cases = ["--case", "2,1,3,4", "3,2,5,5", "--cell", "GRU", "LSTM"]
    assert compare.main([*QUICK, *cases, "--json", str(numbers)]) == 0
    capsys.readouterr()
    plot.main([str(numbers), "--png", str(picture), "--markdown"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out.splitlines()
    assert [line.count("|") for line in table] == [6] * 4
    assert table[2].startswith("| 2, 1, 3, 4 |")
    assert " / " in table[2]


def test_time_limit_ends_a_comparison(capsys):
    argv = [*QUICK, "--case", "2,1,3,4", "--time-limit", "0"]
    assert compare.main(argv) == 1
    shown = capsys.readouterr()
    assert shown.out.count("no time was left") == 6
    assert "nothing was timed" in shown.err


def test_functions_are_timed_in_turn(monkeypatch):
    monkeypatch.setattr(timing, "LONG_CALL_SECONDS", 0.0)  # no untimed calls between functions
    order = []
    functions = {name: lambda name=name: order.append(name) for name in "ab"}
    timings = timing.time_in_turn(functions, lambda: None, min_time=0.0, min_rounds=3)
    calls = [timings[name].calls for name in "ab"]
    turn = ["a"] * calls[0] + ["b"] * calls[1]
    assert order[-len(turn) * 3 :] == turn * 3
    assert all(t.rounds == 3 and 0 < t.min <= t.median < math.inf for t in timings.values())


@pytest.mark.full
def test_suites_run():
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark-disable", "benchmarks"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_tiny_case_runs():
    assert tiny_cuda.main(["--dry-run"]) == 0
