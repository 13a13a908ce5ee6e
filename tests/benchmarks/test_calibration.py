from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.calibration import OURS, PLAIN, Work, memory_table, once, others_table, ratios
from tests.tiny import write_bert


def work(tmp_path: Path) -> Work:
    return Work(OURS, str(write_bert(tmp_path / "bert")), samples=8, tokens=16, batch=4)


@pytest.mark.slow
def test_passes_run_in_turns_and_are_tabled(tmp_path: Path) -> None:
    ours = work(tmp_path)
    found = ratios(ours, replace(ours, what=PLAIN), rounds=2)
    assert len(found) == 2
    assert min(found) > 0
    head, rule, *rows = memory_table(ours, [4])
    assert [row.split(" | ")[:2] for row in rows] == [[f"| {PLAIN}", "4"], [f"| {OURS}", "4"]]
    assert head.count("|") == rule.count("|") == rows[0].count("|")
    assert all(float(row.split(" | ")[2]) > 50 for row in rows)  # MB: PyTorch alone takes more


@pytest.mark.slow
def test_others_run_and_stop_at_the_limit(tmp_path: Path) -> None:
    rows = list(others_table(work(tmp_path), 8, limit=64 << 30))
    assert [row.split(" | ")[0] for row in rows] == [
        f"| ONNX Runtime, {method}" for method in ("min-max", "percentile", "entropy")
    ]
    assert all(float(row.split(" | ")[3].rstrip(" |")) > 0 for row in rows)
    (row, *_) = others_table(work(tmp_path / "again"), 8, limit=100 << 20)
    assert "not within 105: " in row


def test_failure_is_told(tmp_path: Path) -> None:
    missing = replace(work(tmp_path), model=str(tmp_path / "none"))
    assert "none" in str(once(missing))
