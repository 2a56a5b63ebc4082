"""benchmarks/programs.py: whole models before and after `rnnfast.accelerate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import programs
from benchmarks.programs import PROGRAMS

QUICK = ["--processes", "1", "--min-time", "0", "--repeats", "1"]
SMALL = {"tagger": (3, 2, 300), "rssm": (3, 2, 1030), "vad": (2, 1, 576)}


@pytest.fixture(autouse=True)
def short_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, shape in SMALL.items():
        monkeypatch.setitem(PROGRAMS, name, PROGRAMS[name]._replace(shape=shape))


@pytest.mark.parametrize("name", PROGRAMS)
def test_accelerate_replaces_the_cells_alone(name: str) -> None:
    models, _ = programs.steps_of(PROGRAMS[name])
    pairs = list(zip(models["torch"].modules(), models["rnnfast"].modules(), strict=True))
    changed = [type(before) for before, after in pairs if type(before) is not type(after)]
    cells = [type(before) for before, _ in pairs if isinstance(before, nn.RNNCellBase)]
    assert changed == cells != []


def test_programs_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "programs.json"
    programs.main([*QUICK, "--json", str(file)])
    rows = {row["program"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == list(PROGRAMS)
    assert all(row["ratio_min"] > 0 and len(row["ratios"]) == 1 for row in rows.values())
    assert {name for name, row in rows.items() if "share" in row} == {"vad"}
    assert 0 < rows["vad"]["share"] < 1
    assert capsys.readouterr().out.count("ratio") == len(PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_compare_before_they_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate = programs.rnnfast.accelerate

    def wrong(model: nn.Module, **options: str) -> None:
        accelerate(model, **options)
        with torch.no_grad():
            next(model.parameters()).mul_(2)

    monkeypatch.setattr(programs.rnnfast, "accelerate", wrong)
    with pytest.raises(AssertionError, match="the results differ"):
        programs.main([*QUICK, "--only", name])
