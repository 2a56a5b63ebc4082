"""The figures in README.md and benchmarks/README.md are those of the committed results."""

import re
import shutil

import pytest

pytest.importorskip("matplotlib")
from benchmarks import report


def test_documents_and_picture_agree_with_the_results():
    assert report.stale() == []


def test_every_part_is_used_and_known():
    names = [
        match["name"]
        for path in report.DOCUMENTS
        for match in report.MARKED.finditer(path.read_text())
    ]
    assert sorted(set(names)) == sorted(set(report.PARTS))


def test_a_changed_figure_is_noticed(tmp_path, monkeypatch):
    path = tmp_path / "README.md"
    shutil.copy(report.DOCUMENTS[0], path)
    monkeypatch.setattr(report, "DOCUMENTS", (path,))
    assert report.stale() == []
    text = path.read_text()
    begin, end = re.search(r"<!-- report: models-in-short -->.*?<!-- end -->", text, re.S).span()
    changed = re.sub(r"\d\.\d\d", "9.99", text[begin:end], count=1)
    path.write_text(text[:begin] + changed + text[end:])
    assert report.stale() == ["README.md"]
    assert report.main(["--check"]) == 1


def test_means_of_groups():
    """Of two cases with 4 and 1 the geometric mean is 2; other groups, cells and modes stay out."""
    case = report.Case
    ratios = {
        ("inference", "LSTM", case(100, 1, 64, 64)): 4.0,
        ("inference", "LSTM", case(100, 1, 256, 256)): 1.0,
        ("inference", "LSTM", case(1, 1, 64, 64)): 100.0,
        ("inference", "LSTM", case(100, 16, 64, 64)): 100.0,
        ("inference", "GRU", case(100, 1, 64, 64)): 100.0,
        ("training", "LSTM", case(100, 1, 64, 64)): 100.0,
    }
    assert report.group_mean(ratios, "inference", "LSTM", "B = 1") == "2.00"


def test_table_by_threads():
    """Verdicts other than wins are marked; a peer that never runs in a mode has no entry there."""

    def row(mode: str, threads: int, peer: str, **found: object) -> report.Row:
        return {"mode": mode, "threads": threads, "peer": peer, "name": "m"} | found

    win, level = {"ratio_min": 2.0, "verdict": "win"}, {"ratio_min": 1.01, "verdict": "level"}
    rows = [
        row("inference", 1, "torch", **win),
        row("inference", 1, "onnxruntime", not_timed="no projection"),
        row("inference", 2, "torch", **win),
        row("inference", 2, "onnxruntime", ratio_min=0.5, verdict="loss"),
        row("training", 1, "torch", **level),
        row("training", 1, "onnxruntime", not_timed="inference only"),
        row("training", 2, "torch", **win),
        row("training", 2, "onnxruntime", not_timed="inference only"),
    ]
    in_all = {"mode": "training", "threads": 2, "cell": "all", "peer": "torch", "cases": 1}
    in_all |= {"ratio_min": 2.0, "least_ratio_min": 2.0}
    in_all["verdicts"] = {"win": 1, "level": 0, "loss": 0}
    machine = dict.fromkeys(("cpu", "threads", "date", "commit", "torch", "python"), "-")
    results = {
        "machine": machine | {"built_with": {"compiler": "gcc"}},
        "rows": rows,
        "summary": [in_all, in_all | {"peer": "best"}, in_all | {"cell": "LSTM"}],
    }
    _, table, said = report.by_threads(results, ["model"], lambda row: (row["name"],)).split("\n\n")
    head, _, line = table.splitlines()
    assert head == (
        "| model | inference, 1 thread | training, 1 thread "
        "| inference, 2 threads | training, 2 threads |"
    )
    assert line == "| m | 2.00 / - | 1.01 (level) | 2.00 / 0.50 (loss) | 2.00 |"
    assert said == (
        "- training, 2 threads, over torch.nn: geometric mean 2.00, least 2.00, 1 cases: "
        "1 wins, 0 level, 0 losses."
    )
