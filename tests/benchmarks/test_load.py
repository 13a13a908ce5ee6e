from dataclasses import replace

import pytest

from benchmarks import load
from benchmarks.measure import benchmark
from benchmarks.report import Arrivals
from benchmarks.worker import Variant, Worker
from tests.benchmarks.test_measure import CONFIG, FAKES


def arrivals(*pairs: tuple[float, float]) -> list[Arrivals]:
    return [Arrivals(rate, 0.0, p95, 1.0, 200) for rate, p95 in pairs]


def test_the_rate_in_time_lies_between_those_measured() -> None:
    rows = arrivals((10, 0.02), (40, 0.08), (20, 0.04))
    assert load.sustained(rows, 0.03) == pytest.approx(15)
    assert load.sustained(rows, 0.04) == pytest.approx(20)
    assert load.sustained(rows, 0.01) == 0  # not even alone
    assert load.sustained(rows, 1.0) == 40  # no more was measured


def test_waiting_counts() -> None:
    call = {"input_ids": [[1, 2]]}
    with Worker(Variant("x", "sleep=0.01", FAKES + "steady")) as worker:
        worker.load()
        assert worker.capacity(call, 1, 0.2) < 100 < worker.capacity(call, 4, 0.2)
        at_once = worker.arrivals(call, 1, 1e6, 20, 0)  # all of them, and one answered at a time
        assert len(at_once) == 20
        assert max(at_once) > 0.19
        assert max(worker.arrivals(call, 20, 1e6, 20, 0)) < max(at_once)


def test_a_faster_model_answers_more_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_REQUESTS", 20)
    monkeypatch.setattr(load, "_SECONDS", 0.1)
    variants = [
        Variant("slow", "sleep=0.02", FAKES + "steady"),
        Variant("fast", "sleep=0.002", FAKES + "steady"),
        Variant("dying", "dying", FAKES + "dying"),
    ]
    config = replace(CONFIG, shapes=((2, 8), (1, 4)), streams=(1, 2), target=60.0)
    slow, fast, dying = benchmark(variants, config=config).variants
    assert dying.load == []
    assert [(x.streams, x.workload) for x in fast.load] == [(1, "1 × 4"), (2, "1 × 4")]
    for ours, theirs in zip(fast.load, slow.load, strict=True):
        assert ours.capacity > theirs.capacity
        assert ours.sustained > theirs.sustained
        assert ours.interval[0] <= ours.sustained <= ours.interval[1]
        assert len(ours.arrivals) == load.ROUNDS * len(load.SHARES)
