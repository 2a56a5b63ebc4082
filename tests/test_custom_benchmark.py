"""benchmarks/custom.py: cells that users write, beside other ways to run the same formula."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import custom, custom_cells, peers, steps, suite
from benchmarks.custom_cells import KINDS
from benchmarks.steps import Case

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a compiler")
QUICK = ["--processes", "1", "--threads", "1", "--min-time", "0", "--repeats", "1"]
QUICK += ["--case", "1,2,3,5", "4,2,3,5", "--no-compile-times"]


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_all_cells_agree_and_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "custom.json"
    options = ["--peers", "loop", "builtin", "--input-grad", "--json", str(file)]
    assert custom.main([*QUICK, *options]) == 0
    content = json.loads(file.read_text())
    assert content["compiles"] == []
    rows = content["rows"]
    assert len(rows) == len(KINDS) * 2 * 2 * 2
    for row in rows:
        if row["peer"] == "loop" or KINDS[row["cell"]].builtin:
            assert row["ratio_min"] > 0
        else:
            assert row["not_timed"] == "builtin not a built-in cell"
    assert capsys.readouterr().out.count("sLSTM") >= 8


@pytest.mark.parametrize("name", KINDS)
def test_a_loop_has_what_the_layer_has(name: str) -> None:
    for case, single in ((Case(4, 2, 3, 5), False), (Case(1, 2, 3, 5), True)):
        problem = custom_cells.make_problem(name, case, "inference", single, False)
        loop = peers.loop_of(problem)
        expected = steps.results(steps.module_step(loop, problem))
        found = steps.results(peers.build_written(problem))
        torch.testing.assert_close(found, expected)
        assert found.keys() == {"y", *(f"state {k}" for k in range(len(loop.kind.cell.state)))}


def test_wrong_results_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = peers.build_loop

    def wrong(problem: steps.Problem) -> steps.Step:
        step = build(problem)
        return step._replace(run=lambda: tuple_scaled(step.run()))

    def tuple_scaled(result: tuple[Tensor, object]) -> tuple[Tensor, object]:
        return result[0] * 1.01, result[1]

    monkeypatch.setitem(peers.PEERS, "loop", peers.Peer(wrong))
    options = ["--cell", "GRU", "--mode", "inference", "--peers", "loop"]
    assert custom.main([*QUICK, *options]) == 1
    assert capsys.readouterr().out.count("loop disagrees: y is off") == 2


def test_a_scan_in_jax_agrees() -> None:
    pytest.importorskip("jax")
    torch.set_num_threads(1)
    for name in KINDS:
        for single in (False, True):
            case = Case(1 if single else 4, 2, 3, 5)
            problem = custom_cells.make_problem(name, case, "training", single, True)
            double = problem.to(torch.float64)
            exact, ours = (steps.results(steps.module_step(p.module, p)) for p in (double, problem))
            found = steps.results(peers.build_jax(problem))
            assert steps.disagreement(found, ours, exact) is None, name


def test_long_loops_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    long = custom_cells.make_problem("LSTM", Case(26, 1, 2, 3), "inference", False, False)
    with pytest.raises(peers.UnsupportedError, match="no loops of more than 25 steps"):
        peers.build_compiled(long)
    short = custom_cells.make_problem("LSTM", Case(2, 1, 2, 3), "inference", False, False)
    monkeypatch.setattr(peers, "COMPILE_SECONDS", 0.0)
    with pytest.raises(peers.UnsupportedError, match="took more than 0 s"):
        peers.build_compiled(short)


@pytest.mark.full
def test_a_compiled_loop_agrees() -> None:
    options = ["--cell", "light GRU", "--peers", "compiled"]
    assert custom.main([*QUICK, *options]) == 0


def test_each_number_of_threads_has_its_own_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def rows_of(items: object, show: object, args: argparse.Namespace) -> list[suite.Row]:
        asked.append((args.threads, args.peers))
        return []

    monkeypatch.setattr(suite, "rows_of", rows_of)
    custom.main(["--threads", "1", "2", "--peers", "jax", "--no-compile-times"])
    assert asked == [([1], ["jax"]), ([2], ["jax"])]
    with pytest.raises(SystemExit):  # one process cannot have both
        custom.main(["--threads", "1", "2", "--peers", "jax", "--processes", "1"])


@pytest.mark.full
def test_compile_times() -> None:
    (row,) = custom.compile_times(["minGRU"])
    assert row["cell"] == "minGRU"
    assert row["first"] > 5 * row["cached"] > 0
