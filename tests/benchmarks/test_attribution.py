from dataclasses import replace

import pytest

from benchmarks.attribution import steps
from benchmarks.report import BenchmarkReport
from benchmarks.tables import attribution_table
from tests.benchmarks.reports import make_report

SOURCE = {"stage": "source", "model": "m"}
PRUNE, INT8 = {"stage": "prune", "settings": {"heads": 0.25}}, {"stage": "quantize"}
EXPORT = {"stage": "export", "target": "cpu"}


def staged() -> BenchmarkReport:
    lineages = {
        "PyTorch": [SOURCE],
        "float": [SOURCE, EXPORT],
        "int8": [SOURCE, INT8, EXPORT],
        "int8 pruned": [SOURCE, PRUNE, INT8, EXPORT],
        "broken": [SOURCE, EXPORT],
    }
    report = make_report()
    return replace(report, variants=[replace(v, lineage=lineages[v.name]) for v in report.variants])


def test_each_variant_is_held_against_the_nearest_one_before_it() -> None:
    found = {step.variant.name: (step.parent.name, step.stages) for step in steps(staged())}
    assert found == {
        "float": ("PyTorch", ("export",)),
        "int8": ("float", ("quantize",)),
        "int8 pruned": ("float", ("prune", "quantize")),
    }


def test_what_a_stage_did_is_told_round_by_round() -> None:
    step = next(step for step in steps(staged()) if step.variant.name == "int8")
    found = step.speedup("8 × 128")
    assert found is not None
    assert found.value == pytest.approx(75 / 32.5, rel=0.02)
    assert found.interval[0] < found.value < found.interval[1]
    assert found.different
    assert step.quality("spearman") == pytest.approx(-0.21)
    assert step.speedup("7 × 7") is None
    assert step.quality("accuracy") is None
    rows = attribution_table(staged()).rows
    assert [row[0].text for row in rows] == ["float", "int8", "int8 pruned"]
    assert [row[4].text for row in rows] == ["99 %", "27 %", "22 %"]


def test_without_a_common_beginning_there_is_nothing_to_tell() -> None:
    report = staged()
    variants = [
        replace(v, lineage=[{"stage": "foreign", "model": v.name}]) for v in report.variants
    ]
    assert steps(replace(report, variants=variants)) == []
