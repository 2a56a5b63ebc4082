"""benchmarks/programs.py: whole models in plain PyTorch and with rnnfast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import programs
from benchmarks.programs import PROGRAMS

QUICK = ["--processes", "1", "--min-time", "0", "--repeats", "1"]
SMALL = {
    "tagger": (3, 2, 300),
    "rssm": (3, 2, 1030),
    "vad": (2, 1, 576),
    "awd": (4, 2),
    "dreamer": (3, 2, 4102),
    "ligru": (3, 2, 80),
}
RECURRENT = (nn.RNNBase, nn.RNNCellBase, *programs.REPLACEMENTS)


@pytest.fixture(autouse=True)
def short_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, shape in SMALL.items():
        monkeypatch.setitem(PROGRAMS, name, PROGRAMS[name]._replace(shape=shape))


@pytest.mark.parametrize("name", PROGRAMS)
def test_only_recurrent_modules_are_replaced(name: str) -> None:
    models, _ = programs.steps_of(PROGRAMS[name])
    before, after = (dict(models[key].named_modules()) for key in ("torch", "rnnfast"))
    changed = [key for key, module in after.items() if type(module) is not type(before[key])]
    assert changed == [key for key in before if isinstance(before[key], RECURRENT)] != []
    inner = [key for key in before if key not in after]
    assert all(key.rpartition(".")[0] in changed for key in inner)


def test_programs_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "programs.json"
    programs.main([*QUICK, "--json", str(file)])
    rows = {row["program"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == list(PROGRAMS)
    assert all(row["ratio_min"] > 0 and len(row["ratios"]) == 1 for row in rows.values())
    shares = {name: row["share"] for name, row in rows.items() if "share" in row}
    assert shares.keys() == {"vad", "ligru"}
    assert all(0 < share < 1 for share in shares.values())
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
