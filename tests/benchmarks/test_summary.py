from dataclasses import replace

import pytest

from benchmarks import figures, summary, tables
from benchmarks.plots import pareto
from benchmarks.report import BenchmarkReport, Quality
from tests.benchmarks.reports import make_report, make_variant


def only(*names: str) -> BenchmarkReport:
    report = make_report()
    return replace(report, variants=[v for v in report.variants if v.name in names])


def test_the_verdict_names_the_fastest() -> None:
    assert summary.verdict(make_report()) == (
        "int8 pruned is 7.9 × faster than PyTorch at 8 × 128 and 4.6 × smaller; spearman −0.8"
    )


def test_the_verdict_is_honest() -> None:
    report = only("PyTorch")
    assert summary.verdict(report) == "PyTorch was measured alone"
    same = make_variant("twin", 143, 90.9, 86.72, seed=5)
    assert summary.verdict(replace(report, variants=[*report.variants, same])) == (
        "twin is as fast as PyTorch at 8 × 128 and of the same size; spearman ±0"
    )
    slow = make_variant("slow", 286, 181.8, 86.72, seed=5)
    assert summary.verdict(replace(report, variants=[*report.variants, slow])).startswith(
        "No variant is faster than PyTorch: slow is 2.0 × slower at 8 × 128 and 2.0 × larger"
    )
    assert "could not be measured" in summary.verdict(replace(only("broken"), baseline="broken"))
    assert "No variant could be compared" in summary.verdict(only("PyTorch", "broken"))


def test_a_fast_wrong_model_cannot_win() -> None:
    report = make_report()
    wrong = report.variant("int8 pruned")
    wrong = replace(wrong, latency=[replace(x, agreement=0.1) for x in wrong.latency])
    learned = replace(report, variants=[*report.variants[:3], wrong])
    assert summary.best(learned) is wrong  # on real texts it gives what the baseline gives
    assert not any("little to do" in note for note in summary.notes(learned))
    lost = [replace(x, value=0.2) if x.metric == "cosine_fidelity" else x for x in wrong.quality]
    unlike = replace(learned, variants=[*report.variants[:3], replace(wrong, quality=lost)])
    assert any("(cosine 0.20 on the data)" in note for note in summary.notes(unlike))
    wrong = replace(wrong, quality=wrong.quality[:1])  # that was not measured
    report = replace(report, variants=[*report.variants[:3], wrong])
    winner = summary.best(report)
    assert winner is not None
    assert winner.name == "int8"
    assert any("int8 pruned have little to do" in note for note in summary.notes(report))


def test_what_is_proven_comes_before_what_may_be() -> None:
    report = only("PyTorch", "float")
    proven = report.variants[1]
    lucky = [
        replace(x, speedup=replace(x.speedup, value=9.0, interval=(0.9, 12.0), different=False))
        for x in proven.latency
        if x.speedup
    ]
    report = replace(
        report, variants=[*report.variants, replace(proven, name="lucky", latency=lucky)]
    )
    assert summary.verdict(report).startswith("float is 1.9 × faster")


def test_a_small_difference_is_told_in_figures_that_show_it() -> None:
    assert [figures.factor(x) for x in (4.41, 1.02, 0.98, 1.06)] == [
        "4.4 ×",
        "1.02 ×",
        "0.980 ×",
        "1.1 ×",
    ]


def test_generated_tokens_that_differ_are_no_alarm() -> None:
    report = make_report()
    told = [replace(x, kind="decoding", agreement=0.1) for x in report.variants[2].latency]
    variants = [report.variants[0], replace(report.variants[2], latency=told)]
    assert not any("little to do" in n for n in summary.notes(replace(report, variants=variants)))


def test_notes_tell_of_noise() -> None:
    report = make_report()
    base = report.variants[0]
    restless = replace(base, latency=[replace(x, settled=False) for x in base.latency])
    busy = replace(report.environment, load_average=3.0, cores=2)
    notes = summary.notes(replace(report, variants=[restless], environment=busy))
    assert any(note.startswith("2 of 2 times had not settled") for note in notes)
    assert any("load 3.0 on 2 cores" in note for note in notes)


def test_percentiles_need_calls() -> None:
    report = only("PyTorch")
    few = replace(report.variants[0].latency[0], calls=30)
    report = replace(report, variants=[replace(report.variants[0], latency=[few])])
    row = dict(zip(tables.latency_table(report).columns, tables.latency_table(report).rows[0]))
    assert row["p95, ms"].text != "–"
    assert row["p99, ms"].text == "–"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.04183, "0.0418"), (4.1849, "4.18"), (32.46, "32.5"), (1430.2, "1,430")],
)
def test_number(value: float, text: str) -> None:
    assert figures.number(value) == text


def test_spans_and_signs() -> None:
    assert figures.span(10.69, 10.74) == "10.69–10.74"
    assert figures.megabytes(24_312_000) == "24.3 MB"
    assert figures.megabytes(3_456) == "3.46 kB"
    quality = Quality("spearman", 86.5, True, 9, -0.214, None)
    assert figures.difference(quality) == "−0.21"
    assert figures.difference(quality, short=True) == "−0.2"
    assert figures.difference(replace(quality, difference=-0.001)) == "±0"


def test_the_verdict_tells_how_sure_a_difference_is() -> None:
    report = make_report()
    fastest = report.variant("int8 pruned")
    sure = replace(fastest.quality[0], interval=(-1.1, -0.5))
    variants = [*report.variants[:3], replace(fastest, quality=[sure])]
    assert summary.verdict(replace(report, variants=variants)).endswith("spearman −0.8 ± 0.3")


def test_pareto_keeps_what_nothing_beats() -> None:
    assert pareto([(1, 1), (2, 2), (2, 1), (3, 2), (1, 1)]) == [0, 1, 4]
