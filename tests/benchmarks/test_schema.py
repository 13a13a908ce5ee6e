import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from benchmarks.schema import json_schema
from tests.benchmarks.reports import make_report

ROOT = Path(__file__).parents[2]


def plain() -> Any:
    return json.loads(json.dumps(make_report().to_json()))


def test_a_report_fits_the_documented_schema() -> None:
    documented = json.loads((ROOT / "docs" / "report.schema.json").read_text())
    assert documented == json_schema(), "python -m benchmarks.schema > docs/report.schema.json"
    jsonschema.Draft202012Validator.check_schema(documented)
    jsonschema.validate(plain(), documented)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda report: report.pop("baseline"),
        lambda report: report.update(schema=1),
        lambda report: report.update(more=1),
        lambda report: report["variants"][0].update(size_bytes="large"),
        lambda report: report["variants"][0]["latency"][0].update(interval=[1.0]),
        lambda report: report["variants"][0]["latency"][0].update(kind="guess"),
    ],
)
def test_what_is_no_report_does_not_fit(spoil: Any) -> None:
    report = plain()
    spoil(report)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(report, json_schema())
