import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pytest

from calib_data.errors import ParityError
from export.verdict import Check, ParityReport, joined


def check(**changes: Any) -> Check:
    values: dict[str, Any] = {
        "graph": "model",
        "case": "a",
        "session": "plain",
        "output": "logits",
        "rule": "float",
        "rms": 1.0,
        "rms_allowed": 2.0,
        "largest": 1.0,
        "largest_allowed": 4.0,
    }
    return Check(**(values | changes))


def test_report_round_trips_through_json() -> None:
    report = ParityReport((check(), check(rms=3.0)), diverges="encoder")
    stored = json.loads(json.dumps(report.to_json()))
    checks = tuple(Check(**{k: v for k, v in c.items() if k != "passed"}) for c in stored["checks"])
    assert ParityReport(checks, stored["diverges"]) == report
    assert stored["passed"] is False
    assert [c["passed"] for c in stored["checks"]] == [True, False]


@pytest.mark.parametrize(
    "changes",
    [
        {"rms": 2.1},
        {"largest": 4.1},
        {"row": 0.1},
        {"rms": float("nan")},
        {"largest": float("inf")},
    ],
    ids=str,
)
def test_verdict_of_a_check(changes: Mapping[str, float]) -> None:
    assert check().passed
    assert not check(**changes).passed


def test_worst_is_nearest_to_its_bound() -> None:
    checks = (check(), check(largest=3.9), check(rms=1.5))
    assert ParityReport(checks).worst() == checks[1]
    exact = check(rms=0.0, rms_allowed=0.0, largest=0.0, largest_allowed=0.0)
    assert ParityReport((exact, check())).worst() == check()
    assert exact.passed


def test_no_checks_is_no_pass() -> None:
    assert not ParityReport(()).passed
    assert asdict(check())["case"] == "a"


def test_empty_report_raises_the_familys_error() -> None:
    with pytest.raises(ParityError, match="no case"):
        ParityReport(()).raise_if_failed()


def test_joined_reports_keep_everything() -> None:
    first = ParityReport((check(),), None, {"a": 1.0})
    second = ParityReport((check(graph="decoder", rms=3.0),), "layer.1", {"b": 2.0})
    both = joined([first, second])
    assert both.checks == first.checks + second.checks
    assert both.diverges == "layer.1"
    assert both.padding_drift == {"a": 1.0, "b": 2.0}
    with pytest.raises(ParityError, match=r"^decoder disagrees with its source"):
        both.raise_if_failed()
