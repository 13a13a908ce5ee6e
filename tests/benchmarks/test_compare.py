"""What counts as a regression from one report to the next, and what is only noise."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from benchmarks.compare import Comparison, compare, describe, parse_thresholds
from benchmarks.report import BenchmarkReport, VariantReport
from calib_data.errors import ConfigError
from onnxpress.cli import onnxpress_group
from tests.benchmarks.reports import make_report, make_variant

FIVE = parse_thresholds(["5%"])


def changed(report: BenchmarkReport, *variants: VariantReport) -> BenchmarkReport:
    """Return the report with some variants in place of those of the same names."""
    new = {variant.name: variant for variant in variants}
    return replace(report, variants=[new.get(v.name, v) for v in report.variants])


def told(found: Comparison, kind: str, variant: str) -> list[str]:
    return [describe(x) for x in found.changes if (x.kind, x.variant) == (kind, variant)]


def test_the_same_report_has_no_regression() -> None:
    found = compare(make_report(), make_report(), FIVE)
    assert found.regressions == found.missing == found.notes == ()
    assert {x.kind for x in found.changes} == {"latency", "size", "memory", "quality"}
    assert {x.worse for x in found.changes} == {0.0}
    assert "broken" not in {x.variant for x in found.changes}  # it failed before as well


@pytest.mark.parametrize(
    ("milliseconds", "size", "value", "kinds"),
    [
        (32.5 * 1.10, 24.3, 86.51, {"latency"}),
        (32.5 * 1.03, 24.3, 86.51, set()),  # certain, but below the threshold
        (32.5 / 1.5, 24.3, 86.51, set()),
        (32.5, 30.0, 86.51, {"size", "memory"}),
        (32.5, 24.3, 80.0, {"quality"}),
        (32.5, 24.3, 88.0, set()),
    ],
)
def test_what_is_worse_than_its_threshold_is_a_regression(
    milliseconds: float, size: float, value: float, kinds: set[str]
) -> None:
    old = make_report()
    new = changed(old, make_variant("int8", milliseconds, size, value, seed=3))
    found = compare(old, new, FIVE)
    assert {x.kind for x in found.changes if x.regression} == kinds
    assert {x.variant for x in found.changes if x.regression} <= {"int8"}


def test_a_change_within_the_noise_is_none() -> None:
    old = make_report()
    slower = make_variant("int8", 32.5 * 1.10, 24.3, 86.51, seed=3)
    wide = [
        replace(x, speedup=x.speedup and replace(x.speedup, interval=(3.0, 6.0)))
        for x in slower.latency
    ]
    assert compare(old, changed(old, slower), FIVE).regressions
    assert not compare(old, changed(old, replace(slower, latency=wide)), FIVE).regressions
    worse = make_variant("int8", 32.5, 24.3, 80.0, seed=3)
    unsure = [replace(x, interval=(-9.0, 9.0)) for x in worse.quality]
    assert not compare(old, changed(old, replace(worse, quality=unsure)), FIVE).regressions


def test_times_hold_on_the_same_machine_alone_and_factors_anywhere() -> None:
    old = make_report()
    slow = replace(old, variants=[twice_as_slow(v) for v in old.variants])
    found = compare(old, slow, FIVE)  # the baseline has no factor
    assert {x.variant for x in found.changes if x.regression} == {"PyTorch"}
    elsewhere = replace(slow, environment=replace(slow.environment, cpu="another"))
    found = compare(old, elsewhere, FIVE)
    assert found.regressions == ()
    assert "the times of PyTorch are not compared" in found.notes[0]
    assert told(found, "latency", "PyTorch") == []
    assert told(found, "latency", "int8")[1] == "8 × 128 unchanged"


def twice_as_slow(variant: VariantReport) -> VariantReport:
    slower = [
        replace(x, typical=2 * x.typical, interval=(2 * x.interval[0], 2 * x.interval[1]))
        for x in variant.latency
    ]
    return replace(variant, latency=slower)


def test_a_variant_that_fails_or_is_gone_is_a_regression() -> None:
    old = make_report()
    failed = replace(old.variant("int8"), status="failed", reason="it crashed")
    new = changed(old, failed)
    new = replace(new, variants=[v for v in new.variants if v.name != "float"])
    found = compare(old, new, FIVE)
    assert found.missing == ("float is missing", "int8 fails: it crashed")
    assert found.regressions == found.missing


def test_what_is_no_longer_measured_is_a_regression() -> None:
    old = make_report()
    less = replace(old.variant("int8"), quality=[], latency=old.variant("int8").latency[:1])
    found = compare(old, changed(old, less), FIVE)
    gone = ("8 × 128", "spearman", "cosine_fidelity")
    assert found.regressions == tuple(f"int8 has no {name} any more" for name in gone)
    assert compare(changed(old, less), old, FIVE).regressions == ()  # more is no fault


def test_thresholds_by_kind() -> None:
    assert parse_thresholds(["5%"]) == dict.fromkeys(("latency", "size", "memory", "quality"), 0.05)
    some = parse_thresholds(["0.1", "quality=0.5%", "memory=20 %"])
    assert some == {"latency": 0.1, "size": 0.1, "memory": 0.2, "quality": 0.005}
    assert parse_thresholds(["size=1%"])["latency"] == 0.05
    for wrong in ("fast", "speed=5%", "-5%", "5%%", ""):
        with pytest.raises(ConfigError, match="--fail-on must be as 5%"):
            parse_thresholds([wrong])


def run(*words: object) -> Result:
    return CliRunner().invoke(onnxpress_group, ["benchmark", *map(str, words)])


def write(path: Path, report: BenchmarkReport) -> Path:
    path.write_text(json.dumps(report.to_json()))
    return path


def test_the_command_fails_with_seven(tmp_path: Path) -> None:
    report = make_report()
    slow = changed(report, make_variant("int8", 36.5, 24.3, 86.51, seed=3))
    old, new = write(tmp_path / "old.json", report), write(tmp_path / "new.json", slow)
    assert run("compare", old, old).exit_code == 0
    found = run("compare", old, new)
    assert found.exit_code == 7
    assert "! int8: 8 × 128 12." in found.output
    assert "  float: size unchanged" in found.output
    assert "raise --fail-on if that is accepted" in found.output
    assert run("compare", old, new, "--fail-on", "20%").exit_code == 0
    assert run("compare", old, new, "--fail-on", "latency=20%").exit_code == 0
    shown = run("compare", old, new, "--json")
    assert json.loads(shown.stdout)["regressions"][0].startswith("int8: ")
    for words, code, message in (
        ((old, tmp_path / "none.json"), 4, "cannot be read"),
        ((old, new, "--fail-on", "much"), 2, "--fail-on must be"),
    ):
        failed = run("compare", *words)
        assert (failed.exit_code, message in failed.output) == (code, True)


def test_finished_reports_are_drawn_again_with_their_past(tmp_path: Path) -> None:
    reports = [
        replace(make_report(), created=f"2026-01-0{day}T00:00:00+00:00") for day in (3, 1, 2)
    ]
    files: Sequence[Path] = [write(tmp_path / f"{i}.json", r) for i, r in enumerate(reports)]
    assert run("report", *files, "--title", "again", "-o", tmp_path / "out").exit_code == 0
    made = {p.name for p in (tmp_path / "out").iterdir()}
    assert made == {"report.html", "report.json", "report.md", "report.csv"}
    drawn = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (drawn["title"], drawn["created"][:10]) == ("again", "2026-01-03")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>Trend</h2>" in page
    assert page.index("2026-01-01 00:00") < page.index("2026-01-02 00:00")
    assert run("report", files[0], "-o", tmp_path / "one").exit_code == 0
    assert "<h2>Trend</h2>" not in (tmp_path / "one" / "report.html").read_text()
    failed = run("report", files[0], "--eval", "x.csv", "-o", tmp_path / "no")
    assert (failed.exit_code, "name a BUNDLE to measure" in failed.output) == (2, True)
