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
    begin, end = re.search(r"<!-- report: summary -->.*?<!-- end -->", text, re.S).span()
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
