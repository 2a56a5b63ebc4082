"""tests/mutations.py plants its faults by exact texts of the sources: each must be there once."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutations import FAULTS, Fault, make_copy

CSRC = Path(__file__).resolve().parents[1] / "csrc"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_planted(fault: Fault) -> None:
    assert (CSRC / fault.file).read_text().count(fault.text) == 1
    assert fault.good in fault.text
    assert fault.good != fault.bad


def test_all_faults_are_planted_together(tmp_path: Path) -> None:
    make_copy(tmp_path / "copy")
    planted = "".join(
        (tmp_path / "copy" / "csrc" / name).read_text() for name in {fault.file for fault in FAULTS}
    )
    assert all(planted.count(f"(rnnfast::fault == {n} ?") == 1 for n in range(1, len(FAULTS) + 1))
