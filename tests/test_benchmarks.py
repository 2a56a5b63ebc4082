"""The benchmarks run, and do not time implementations with wrong results."""

import copy
import json
import math
import os
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import Case as LayerCase
from cases import oracle, sample_grads, sample_inputs
from torch import nn

from benchmarks import (
    cells,
    compare,
    errors,
    frozen,
    long_double,
    models,
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
from rnnfast import _C

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["--min-time", "0", "--repeats", "2", "--threads", "1", "--no-limit"]
# A machine with round numbers, for expected limits that are easy to compute.
MACHINE = Calibration(
    threads=2,
    fma=dict.fromkeys(roofline.ELEMENT_BYTES, 200e9),
    elementwise=100e9,
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


MODULES = [
    *((cell, {}) for cell in (*steps.CELLS, *steps.SINGLE_STEPS)),
    ("RNN", {"num_layers": 2}),
    ("GRU", {"num_layers": 2, "bidirectional": True}),
    ("LSTM", {"num_layers": 3, "bidirectional": True}),
    ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 4}),
]


def is_unsupported(name: str, cell: str, options: dict[str, object], mode: str) -> bool:
    if name in ("jax", "rnnfast", "unfrozen"):
        return False
    if name in ("loop", "compiled", "builtin"):  # of cells that users write
        return True
    no_cells = name == "torch_int8" and (cell == "RNN" or cell in steps.SINGLE_STEPS)
    only_lstm = name == "onnxruntime_int8" and not cell.startswith("LSTM")
    return mode == "training" or "proj_size" in options or no_cells or only_lstm


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("mode", steps.MODES)
@pytest.mark.parametrize(("cell", "options"), MODULES, ids=str)
@pytest.mark.parametrize("name", ["rnnfast", *(name for name in peers.PEERS if name != "torch")])
def test_installed_peers_agree(name, cell, options, mode):
    torch.set_num_threads(1)
    peer = peers.PEERS.get(name, peers.Peer(peers.build_rnnfast))
    problem = steps.make_problem(
        cell, Case(5, 3, 7, 9), "cpu", torch.float32, mode, True, **options
    )
    exact_problem = problem.to(torch.float64)
    if is_unsupported(name, cell, options, mode):
        with pytest.raises((peers.UnsupportedError, ImportError)):
            peer.build(problem)
        return
    with torch.inference_mode(mode == "inference"):
        try:
            step = peer.build(problem)
        except ImportError as reason:
            pytest.skip(f"not installed: {reason}")
        exact, ours = (
            steps.results(steps.module_step(p.module, p)) for p in (exact_problem, problem)
        )
        found = steps.results(step)
        assert found.keys() == exact.keys()
        assert steps.disagreement(found, ours, exact, peer.tolerance) is None


def test_a_cell_is_called_with_the_state_of_the_call_before():
    problem = steps.make_problem(
        "LSTMCell", Case(3, 2, 4, 5), "cpu", torch.float64, "training", True
    )
    found = steps.results(steps.module_step(problem.module, problem))
    x, (h, c) = problem.x.clone().requires_grad_(), problem.state
    for t in range(3):
        h, c = problem.module(x[t], (h, c))
    wanted = torch.autograd.grad(h, [x, problem.module.weight_hh], problem.grad_y)
    for name, value in zip(["y", "grad of x", "grad of weight_hh"], [h, *wanted], strict=True):
        torch.testing.assert_close(found[name], value)
    inference = problem._replace(mode="inference")
    with torch.inference_mode():
        found = steps.results(steps.module_step(problem.module, inference))
    torch.testing.assert_close(found, {"y": h, "state 0": h, "state 1": c})


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


def test_models_exist_and_have_different_names():
    assert len({model.name for model in models.MODELS}) == len(models.MODELS) >= 14
    for model in models.MODELS:
        kind = {**steps.CELLS, **steps.SINGLE_STEPS}[model.cell]
        kind(model.case.I, model.case.H, device="meta", **model.options)


def test_models_write_a_row_for_each_peer(monkeypatch, tmp_path, capsys):
    stack = {"num_layers": 2, "bidirectional": True}
    tiny = (
        models.Model("Stack", "encoder", "LSTM", Case(3, 2, 4, 5), stack),
        models.Model("Step", "decoder", "GRUCell", Case(2, 2, 4, 5), {}),
        models.Model("Other", "left out", "GRU", Case(2, 2, 4, 5), {}),
    )
    monkeypatch.setattr(models, "MODELS", tiny)
    monkeypatch.setitem(peers.PEERS, "wrong", peers.Peer(build_wrong_cell))
    quick = ["--min-time", "0", "--repeats", "1", "--threads", "1", "2", "--processes", "1"]
    argv = [*quick, "--name", "Stack", "Step", "--json", str(tmp_path / "m.json")]
    assert models.main([*argv, "--peers", "torch"]) == 0
    assert "LSTM, 2 layers, both directions" in capsys.readouterr().out
    report = json.loads((tmp_path / "m.json").read_text())
    assert report["machine"]["threads"] == 2
    assert [(row["name"], row["mode"], row["threads"]) for row in report["rows"]] == [
        (name, mode, threads)
        for mode in steps.MODES
        for name in ("Stack", "Step")
        for threads in (1, 2)
    ]
    assert all(row["ratio_min"] > 0 for row in report["rows"])
    assert models.main([*argv, "--name", "Step", "--peers", "wrong"]) == 1
    assert capsys.readouterr().out.count("wrong disagrees") == 4


def build_wrong_cell(problem: Problem) -> Step:
    wrong = copy.deepcopy(problem.module)
    nn.init.constant_(wrong.bias_hh, 0.1)
    return steps.module_step(wrong, problem)


def test_frozen_layers(tmp_path, capsys, monkeypatch):
    argv = ["--case", "2,3,4,5", "--min-time", "0", "--repeats", "1", "--processes", "1"]
    argv += ["--threads", "1", "--json", str(tmp_path / "f.json")]
    assert frozen.main([*argv, "--peers", "unfrozen", "torch"]) == 0
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert [row["dtype"] for row in rows[::4]] == ["float32", "float16"] * 2
    assert {row["peer"] for row in rows} == {"unfrozen", "torch"}
    assert len(rows) == 2 * 4 * 2
    assert all(row["ratio_min"] > 0 for row in rows)
    monkeypatch.setitem(frozen.TOLERANCES, "int8", 0.0)
    assert frozen.main([*argv, "--peers", "torch", "--weights", "int8"]) == 1
    assert capsys.readouterr().out.count("rnnfast disagrees") == 2


def test_int8_of_onnx_runtime():
    """It is a node of int8, as exact as 7 bits can be."""
    pytest.importorskip("onnxruntime")
    import onnx

    problem = steps.make_problem("LSTM", Case(5, 2, 16, 32), "cpu", torch.float32, "inference")
    model = onnx.load_from_string(peers.int8_onnx_model(problem))
    assert "DynamicQuantizeLSTM" in [node.op_type for node in model.graph.node]
    with torch.inference_mode():
        exact = steps.results(steps.module_step(problem.module, problem))
        found = steps.results(peers.build_onnxruntime_int8(problem))
    error = (found["y"] - exact["y"]).square().mean().sqrt() / exact["y"].square().mean().sqrt()
    assert 1e-5 < error < 0.05


@pytest.mark.parametrize("size", ["1,2", "1,2,x", "0,1,1"])
def test_bad_size_of_a_cell(size, capsys):
    with pytest.raises(SystemExit):
        cells.main(["--size", size])
    assert size in capsys.readouterr().err


def test_cells_in_several_processes(tmp_path, capfd):
    """The processes are new ones: they print to the same place, and not by way of this Python."""
    quick = ["--min-time", "0", "--repeats", "1", "--threads", "1", "--size", "2,3,4"]
    files = ["--json", str(tmp_path / "c.json"), "--csv", str(tmp_path / "c.csv")]
    assert cells.main([*quick, "--processes", "2", *files]) == 0
    shown = capfd.readouterr().out
    assert "process 2 of 2" in shown
    assert shown.count("2,3,4") == 3 * 9  # in each process, and together
    report = json.loads((tmp_path / "c.json").read_text())
    assert report["processes"] == 2
    rows = report["rows"]
    assert [(row["mode"], row["T"]) for row in rows[::3]] == [
        ("inference", 1),
        ("training", 1),
        ("chained", 10),
    ]
    for row in rows:
        assert row["ratio_min"] == pytest.approx(sum(row["ratios"]) / 2)
        assert row["verdict"] == suite.verdict(row["ratios"])
    total = next(s for s in report["summary"] if (s["mode"], s["cell"]) == ("chained", "all"))
    assert sum(total["verdicts"].values()) == total["cases"] == 3
    assert len((tmp_path / "c.csv").read_text().splitlines()) == 10


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([1.01, 1.3], "win"),
        ([0.99, 1.3], "level"),
        ([1.0, 1.3], "level"),
        ([0.9, 1.0], "level"),
        ([0.5, 0.99], "loss"),
    ],
)
def test_a_win_is_a_win_in_every_process(ratios, verdict):
    assert suite.verdict(ratios) == verdict


def test_rows_of_processes_are_merged():
    def run(peer_min: float, **more: object) -> list[suite.Row]:
        row = {"mode": "m", "peer": "p", "rnnfast_min": 2.0, "peer_min": peer_min}
        return [row | {"ratio_min": peer_min / 2, "ratio_median": 1.0, "peer_rounds": 3} | more]

    (row,) = suite.merged([run(6.0), run(2.0), run(3.0)])
    assert row["ratios"] == [3.0, 1.0, 1.5]
    assert (row["ratio_min"], row["peer_min"], row["rnnfast_min"]) == (1.5, 3.0, 2.0)
    assert (row["verdict"], row["peer_rounds"]) == ("level", 3)
    assert "1.00 to 3.00, spread 133%  level" in suite.format_numbers(row)
    (row,) = suite.merged([run(6.0), [{"mode": "m", "peer": "p", "not_timed": "why"}]])
    assert row == {"mode": "m", "peer": "p", "not_timed": "why"}
    with pytest.raises(SystemExit):
        compare.main(["--processes", "0"])


@pytest.mark.parametrize("gates", ["", "saturated"])
@pytest.mark.parametrize("cell", long_double.CELLS)
def test_long_double_oracle(cell, gates):
    """It agrees with the reference in float64, which torch differentiates."""
    case = LayerCase(cell, 5, 3, 4, 6, gates=gates)
    inputs, grads = sample_inputs(case, torch.float64), sample_grads(case, torch.float64)
    expected = oracle(case, inputs, grads)
    given = [[t.numpy().astype(np.longdouble) for t in each] for each in (inputs, grads)]
    found = long_double.oracle(cell, *given)
    assert {value.dtype for value in found} == {np.dtype(np.longdouble)}
    for value, wanted in zip(found, [*expected.outputs, *expected.grads], strict=True):
        torch.testing.assert_close(
            torch.from_numpy(value.astype(float)), wanted, rtol=1e-12, atol=1e-13
        )


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_errors_are_relative_to_the_oracle(monkeypatch, dtype):
    """Where torch.nn's results are twice as large as they should be, its error is 1."""

    def twice(*given: object) -> list[torch.Tensor]:
        return [2 * value for value in errors.by_kernels(*given)]

    monkeypatch.setattr(errors, "by_torch", twice)
    case, capability = LayerCase("gru", 5, 3, 4, 6), _C.get_cpu_capability()
    found = errors.relative_errors(case, errors.DTYPE_NAMES[dtype], range(3), [capability])
    assert found["torch.nn"] == pytest.approx([1.0] * 8, rel=1e-5)
    eps = torch.finfo(errors.DTYPE_NAMES[dtype]).eps
    assert all(0 < error < 10 * eps for error in found[capability])


def test_samples_in_which_a_unit_crosses_the_kink_of_relu_are_left_out(monkeypatch):
    """Here torch.nn has a unit on the other side in the first of two samples, then in both."""
    case, seeds = LayerCase("elman_relu", 5, 3, 4, 6), range(2)
    whole, calls = errors.by_torch, []

    def crossing(*given: object) -> list[torch.Tensor]:
        y, *others = whole(*given)
        calls.append(y)
        unit = y.detach().clone()
        if len(calls) != 2:
            unit[0, 0, 0] = 0 if unit[0, 0, 0] > 0 else 1e-9
        return [unit, *others]

    capability = [_C.get_cpu_capability()]
    second = errors.relative_errors(case, torch.float32, range(1, 2), capability)
    monkeypatch.setattr(errors, "by_torch", crossing)
    assert errors.relative_errors(case, torch.float32, seeds, capability) == second
    with pytest.raises(ValueError, match="in every sample"):
        errors.relative_errors(case, torch.float32, seeds, capability)
    assert len(errors.relative_errors(case, torch.bfloat16, seeds, capability)) == 2


def test_errors_of_every_cell_and_dtype(tmp_path, capsys):
    file = tmp_path / "e.json"
    shapes = ["--shape", "3,2,4,5", "2,200,200,200"]
    assert errors.main([*shapes, "--seeds", "1", "--json", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 4 * 4 * 3
    report = json.loads(file.read_text())
    assert len(report["summary"]) == 4 * 4 * 3
    assert {row["shape"] for row in report["rows"] if row["dtype"] == "float64"} == {"3,2,4,5"}
    kinds = {row["kind"] for row in report["rows"]}
    assert kinds == set(errors.KINDS)


def test_summary_of_errors():
    where = {"capability": "k", "cell": "c", "dtype": "d", "gates": "plain", "shape": "1,2,3,4"}
    rows = [
        where | {"kind": kind, "result": result, "rnnfast": ours, "torch": theirs}
        for kind, result, ours, theirs in (
            ("outputs", "y", 0.0, 0.0),
            ("states", "h_n", 3e-8, 2e-8),
            ("gradients", "gradient of x", 2e-8, 1e-8),
            ("gradients", "gradient of w_ih", 8e-8, 1e-8),
        )
    ]
    (line,) = errors.summarize(rows)
    assert "outputs" not in line
    assert line["states"]["mean"] == pytest.approx(1.5)
    assert line["gradients"]["mean"] == pytest.approx(4.0)
    assert line["gradients"]["largest"] == pytest.approx(8.0)
    assert errors.format_line(line).endswith("gradient of w_ih 1,2,3,4")


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
        for one in grown:
            least, most = max(one.fma + one.gates, one.traffic), one.fma + one.gates + one.traffic
            assert 0 < least / (1 + 1e-9) <= one.seconds <= most * (1 + 1e-9)
    assert limit(50, 4096, 512, 512).bound == "FMA"
    assert limit(1, 1, 4000, 4000).bound == "DRAM"
    assert limit(100, 1, 8, 800).bound in ("L2", "L3")
    assert limit(9, 1, 500, 500, dtype="float16").traffic < limit(9, 1, 500, 500).traffic
    grad = limit(9, 99, 500, 500, input_grad=True)
    assert (grad.fma > limit(9, 99, 500, 500).fma) == (mode == "training")


def test_limits_of_lstm_by_hand():
    def limit(case: Case, mode: str) -> roofline.Limit:
        return roofline.limit("LSTM", case, mode, "float32", False, MACHINE)

    # all in L1, so arithmetic is slower than traffic in every phase
    small = Case(10, 8, 16, 32)
    found, step, units = limit(small, "inference"), 8 * 2 * 4 * 32, 10 * 8 * 32
    assert found.fma == pytest.approx(10 * step * (16 + 32) / 200e9)
    assert found.gates == pytest.approx(156 * units / 100e9)
    assert found.seconds == pytest.approx(found.fma + found.gates)
    once = 4 * (4 * 32 * 16 + 10 * 8 * (16 + 32))
    assert found.traffic == pytest.approx((10 * 4 * 4 * 32 * 32 + once) / 400e9)
    both = limit(small, "training")
    products = 2 * 10 * step * (16 + 32) + 9 * step * 32
    assert both.fma == pytest.approx(products / 200e9)
    assert both.gates == pytest.approx((156 + 55) * units / 100e9)
    # one sequence: arithmetic binds the projection, traffic the steps, and their times add
    one = Case(100, 1, 400, 800)
    found = limit(one, "inference")
    assert found.bound == "L3"
    projection = 100 * 2 * 4 * 800 * 400 / 200e9
    assert projection < found.seconds < projection + found.traffic
    assert found.seconds > max(found.fma + found.gates, found.traffic)


def test_calibration_is_held_back_with_the_kernels():
    commands = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", lambda command, **_: commands.append(command) or 1 / 0)
        for capability in ("avx2", "avx512", "avx512_amx"):
            with pytest.raises(ZeroDivisionError):
                roofline.native.__wrapped__(capability)  # not cached
    levels = ("x86-64-v3", "x86-64-v4", "native")
    for command, level in zip(commands, levels, strict=True):
        level = level if platform.machine() == "x86_64" else "native"
        assert f"-march={level}" in command


def test_barriers_only_where_threads_outnumber_sequences():
    one, both = (roofline.Limit(seconds, "FMA", seconds, 0, 0) for seconds in (10e-6, 5e-6))

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


def test_pauses_last_until_threads_are_idle():
    """A thread that spins would take time from what is measured next."""
    code = """
import threading, time
from benchmarks import timing

def spin():
    end = time.perf_counter() + 0.06
    while time.perf_counter() < end:
        pass

def pause():
    started = time.perf_counter()
    timing.pause()
    return time.perf_counter() - started

idle = pause()
spinning = threading.Thread(target=spin)
spinning.start()
print(idle, pause())
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    idle, beside = map(float, done.stdout.split())
    assert idle < timing.MOST_PAUSE_SECONDS / 2
    assert beside > 0.05


def test_odd_sizes_use_every_size_twice():
    cases = compare.parse_args(["--table", "odd"]).case
    assert len(cases) == 16
    for sizes in (Counter(case.B for case in cases), Counter(case.H for case in cases)):
        assert min(sizes.values()) >= 2
    assert {case.H for case in cases} == {40, 96, 200, 257, 320, 650, 700}
    assert {case.B for case in cases} == {3, 8, 12, 16, 20, 24, 48, 96}
