import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from benchmarks import evaluation
from benchmarks.evaluation import Remembered
from benchmarks.journal import NAME
from benchmarks.measure import BenchmarkConfig, Variant, benchmark
from benchmarks.timing import agreement
from benchmarks.worker import WorkerError
from calib_data.errors import ConfigError, ProviderError

FAKES = "tests.benchmarks.fakes:"
CONFIG = BenchmarkConfig(
    shapes=((1, 4), (2, 8)), rounds=8, seconds=0.004, threads=(1,), warm_up_seconds=0, precision=9
)


def test_good_and_bad_variants_make_one_report() -> None:
    seen: list[tuple[str, int, int]] = []
    report = benchmark(
        [
            Variant("fast", "/home/someone/sleep=0.001,factor=3", FAKES + "steady"),
            Variant("base", "sleep=0.004", FAKES + "steady"),
            Variant("dying", "/home/someone/dying", FAKES + "dying"),
            Variant("nan", "x", FAKES + "nan"),
            Variant("narrow", "x", FAKES + "narrow"),
        ],
        "base",
        CONFIG,
        command="the command",
        progress=lambda *step: seen.append(step),
    )
    fast, base, dying, nan, narrow = report.variants
    assert (fast.status, base.status) == ("ok", "ok")
    assert (report.baseline, report.command, report.task) == (
        "base",
        "the command",
        "feature-extraction",
    )
    assert [x.workload for x in fast.latency] == ["1 × 4", "2 × 8"]
    first = fast.latency[0]
    assert first.calls == sum(map(len, first.rounds))
    assert len(first.rounds) == 8
    assert first.interval[0] <= first.typical <= first.interval[1] <= first.p99
    assert first.speedup is not None
    assert first.agreement == pytest.approx(1)  # three times as much is the same direction
    assert base.latency[0].speedup is None
    assert fast.peak_memory_bytes is not None
    assert fast.model == "sleep=0.001,factor=3"
    assert "/home" not in str(report.to_json()["variants"][2])
    assert dying.status == "failed"
    assert "killed" in (dying.reason or "")
    assert "NaN" in (nan.reason or "")
    assert "shape (1, 1), the baseline's has (1, 2)" in (narrow.reason or "")
    assert dying.latency == nan.latency == narrow.latency == []
    whats, done, totals = zip(*seen, strict=True)
    assert done == tuple(range(totals[0]))
    assert "warming up base at 2 × 8" in whats


def test_a_provider_that_is_not_there_stops_everything() -> None:
    with pytest.raises(ProviderError):
        benchmark([Variant("x", "x", FAKES + "providerless")], config=CONFIG)


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(WorkerError, match="no variant could be measured: x: RuntimeError: the"):
        benchmark([Variant("x", "x", FAKES + "raising")], config=CONFIG)


def test_names_must_tell_variants_apart() -> None:
    twice = [Variant("a", "x", FAKES + "steady")] * 2
    with pytest.raises(ConfigError, match="two variants are called a"):
        benchmark(twice)
    with pytest.raises(ConfigError, match="baseline b is not among a"):
        benchmark(twice[:1], "b")
    with pytest.raises(ConfigError, match="nothing to measure"):
        benchmark([])


def test_agreement_looks_at_the_task_output_and_at_nan_everywhere() -> None:
    expected = {"main": np.eye(2), "other": np.ones(2)}
    assert agreement({"main": np.eye(2) * 5, "other": np.zeros(2)}, expected, "main") == 1
    assert agreement({"main": np.eye(2)[::-1], "other": np.ones(2)}, expected, "main") == 0
    assert agreement({"main": np.eye(2)}, None, "main") is None
    with pytest.raises(WorkerError, match=r"other .*NaN"):
        agreement({"main": np.eye(2), "other": np.array([np.inf])}, expected, "main")
    with pytest.raises(WorkerError, match="no output main"):
        agreement({"logits": np.eye(2)}, expected, "main")


def test_remembered_asks_once_and_stays_in_its_budget() -> None:
    asked: list[Any] = []

    def predict(batch: Any) -> dict[str, np.ndarray]:
        asked.append(batch)
        return {"y": np.zeros(4)}  # 32 bytes

    remembered = Remembered(predict, budget=40)
    for value in (1, 1, 2, 2, 1):
        remembered({"x": np.array([value])})
    assert len(asked) == 3  # 1 is kept, 2 no longer fits


class Found(NamedTuple):
    name: str
    value: float
    per_example: np.ndarray | None
    higher_is_better: bool = True


class Scored(list):
    def column(self, role: str) -> list[float]:
        return list(self)


def test_quality_is_a_difference_paired_by_example() -> None:
    examples = Scored(range(8))
    baseline = Found("cosine", 1.0, np.ones(8))
    same = evaluation.quality(baseline, baseline, examples, 0)
    assert (same.difference, same.interval) == (0.0, None)
    worse = evaluation.quality(Found("cosine", 0.9, np.full(8, 0.9)), baseline, examples, 0)
    assert worse.difference == pytest.approx(-0.1)
    assert worse.interval == pytest.approx((-0.1, -0.1))
    assert evaluation.quality(Found("spearman", 80.0, None), None, examples, 0).difference is None
    with pytest.raises(WorkerError, match="not a finite number"):
        evaluation.quality(Found("spearman", float("nan"), None), None, examples, 0)


def test_the_interval_is_that_of_the_metric_and_in_its_unit() -> None:
    random = np.random.default_rng(0)
    scores = Scored(random.random(100).tolist())
    good = Found("spearman", 99.0, np.asarray(scores) + 0.01 * random.random(100))
    shifted = Found("spearman", 99.0, good.per_example + 5)  # same ranks, other values
    assert evaluation.quality(shifted, good, scores, 0).interval == (0, 0)
    half = np.arange(100) % 2
    accuracy = evaluation.quality(
        Found("accuracy", 50.0, half), Found("accuracy", 100.0, np.ones(100)), scores, 0
    )
    assert accuracy.unit == "%"
    assert accuracy.interval is not None
    assert accuracy.interval[0] < -50 < accuracy.interval[1]
    tokens = Found("perplexity", 20.0, np.arange(100.0))  # tokens weigh alike there, not examples
    assert evaluation.quality(tokens, tokens._replace(value=19.0), scores, 0).interval is None


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "at", ["timing at 1 × 4, round 5", "timing at 2 × 8, round 3", "profiling"]
)
def test_what_was_measured_before_a_kill_is_not_measured_again(tmp_path: Path, at: str) -> None:
    variants = [
        Variant("base", "sleep=0.002", FAKES + "steady"),
        Variant("fast", "sleep=0.001", FAKES + "steady"),
    ]

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith(at):
            raise Killed

    with pytest.raises(Killed):
        benchmark(variants, config=CONFIG, progress=stop, journal=tmp_path)
    lines = (tmp_path / NAME).read_text().splitlines()
    kept = dict(map(json.loads, lines[1:]))
    report = benchmark(variants, config=CONFIG, journal=tmp_path)
    whole = [v for v in report.variants if v.status == "ok"]
    assert len(whole) == 2
    for key, value in kept.items():
        kind, label, *number = json.loads(key)
        if kind == "round":
            for name, seconds in value.items():
                latency = next(x for x in report.variant(name).latency if x.workload == label)
                assert latency.rounds[number[0]] == pytest.approx(seconds, abs=1e-6)
    assert any(json.loads(key)[0] == "round" for key in kept)


def test_a_baseline_of_no_numbers_is_a_row_of_its_own() -> None:
    variants = [
        Variant("nan", "x", FAKES + "nan"),
        Variant("good", "sleep=0.001", FAKES + "steady"),
    ]
    nan, good = benchmark(variants, "nan", CONFIG).variants
    assert "NaN" in (nan.reason or "")
    assert good.status == "ok"
    assert all(x.agreement is None and x.speedup is None for x in good.latency)


def test_rounds_of_which_one_variant_is_missing_are_measured_again(tmp_path: Path) -> None:
    """Ratios are of times taken side by side: what the others took yesterday is worth nothing."""
    variants = [
        Variant("base", "sleep=0.002", FAKES + "steady"),
        Variant("fast", "sleep=0.001", FAKES + "steady"),
    ]
    benchmark(variants, config=CONFIG, journal=tmp_path)
    lines = (tmp_path / NAME).read_text().splitlines()
    kept = [json.loads(line) for line in lines[1:]]
    for key, value in kept:
        if json.loads(key)[0] in ("round", "workload"):
            value.pop("fast")
    spoilt = "\n".join([lines[0], *(json.dumps(pair) for pair in kept)]) + "\n"
    (tmp_path / NAME).write_text(spoilt)
    report = benchmark(variants, config=CONFIG, journal=tmp_path)
    for latency in report.variant("base").latency:
        before = [v["base"] for k, v in kept if json.loads(k)[:2] == ["round", latency.workload]]
        assert len(latency.rounds) == len(before) == 8
        # one round of one call may take as long as before; all of them do not
        assert not all(len(a) == len(b) and a == pytest.approx(b, abs=1e-6)
                       for a, b in zip(latency.rounds, before, strict=True))  # fmt: skip
    again = benchmark(variants, config=CONFIG, journal=tmp_path)
    assert [x.rounds for x in again.variants[0].latency] == [
        x.rounds for x in report.variants[0].latency
    ]
    assert again.variants[0].peak_memory_bytes is not None


def test_what_was_timed_before_a_failure_is_told() -> None:
    variants = [
        Variant("base", "sleep=0.002", FAKES + "steady"),
        Variant("late", "sleep=0.001,longest=4", FAKES + "steady"),
    ]
    base, late = benchmark(variants, config=CONFIG).variants
    assert (late.status, base.status) == ("failed", "ok")
    assert "longer than 4" in (late.reason or "")
    assert [x.workload for x in late.latency] == ["1 × 4"]
    assert late.latency[0].speedup is not None
    assert len(base.latency) == 2


def test_rounds_go_on_until_they_are_precise_or_time_is_up() -> None:
    variants = [
        Variant("base", "sleep=0.001", FAKES + "steady"),
        Variant("noisy", "sleep=0.001,noise=0.5", FAKES + "steady"),
    ]
    config = replace(CONFIG, shapes=((1, 4),), precision=1e-4, max_time=2.0)
    (noisy,) = benchmark(variants, config=config).variants[1].latency
    assert len(noisy.rounds) > 8
    assert not noisy.precise
    easy = replace(config, precision=9.0)
    assert len(benchmark(variants, config=easy).variants[1].latency[0].rounds) == 8
