import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import BenchmarkReport, Environment, read_report
from calib_data.errors import DataError
from tests.benchmarks.reports import make_report


def plain() -> dict[str, Any]:
    return json.loads(json.dumps(make_report().to_json()))


def test_a_report_round_trips_through_json(tmp_path: Path) -> None:
    report = make_report()
    assert BenchmarkReport.from_json(plain()) == report
    (tmp_path / "report.json").write_text(json.dumps(plain()))
    assert read_report(tmp_path / "report.json") == report


def test_another_schema_is_refused() -> None:
    with pytest.raises(DataError, match="schema 99, this version reads 2"):
        BenchmarkReport.from_json({**plain(), "schema": 99})
    for other in ({}, [], "text"):
        with pytest.raises(DataError, match="not a benchmark report"):
            BenchmarkReport.from_json(other)


def damage(path: list[str | int], value: Any) -> dict[str, Any]:
    values = plain()
    place: Any = values
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ["variants", 1, "latency", 0, "typical"],
            "fast",
            r"variants\[1\].latency\[0\].typical must",
        ),
        (["variants", 0, "size_bytes"], 1.5, "size_bytes must be int"),
        (["variants", 0, "latency", 0, "settled"], 1, "settled must be bool"),
        (["variants", 0, "status"], "odd", "status must be one of ok, failed"),
        (["variants", 0, "latency", 0, "interval"], [1], "interval must be 2 values"),
        (["variants"], {}, "variants must be a list"),
        (["title"], None, "report lacks title"),
        (["extra"], 1, "report has unknown extra"),
        (["environment", "cores"], True, "cores must be int"),
        (["baseline"], "nobody", "baseline is 'nobody'"),
    ],
)
def test_a_damaged_report_is_refused_by_place(path: list, value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        BenchmarkReport.from_json(damage(path, value))


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(DataError, match=r"x\.json cannot be read"):
        read_report(tmp_path / "x.json")


def test_the_environment_is_described() -> None:
    here = Environment.here("cpu", 2)
    assert here.cpu
    assert here.threads == 2
    assert "torch" in here.versions
    assert here.gpu is None
