"""That the figures are right: known times are found, equal models are equal, noise divides out."""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import statistics, timing
from benchmarks.config import BenchmarkConfig
from benchmarks.journal import Journal
from benchmarks.measure import benchmark, latency
from benchmarks.report import Latency
from benchmarks.runtimes import Place, find_runtime
from benchmarks.subjects import Steps, Subject
from benchmarks.worker import Variant, WarmUp, Worker
from benchmarks.workloads import Workload
from tests.benchmarks.fakes import FakeSignature
from tests.benchmarks.test_measure import FAKES
from tests.export.graphs import checkpoint_of, graph_of, save

WORKLOAD = Workload("1 × 4", (FakeSignature().sample(1, 4),), 1, 4, 4.0)
CONFIG = BenchmarkConfig(shapes=((1, 4),), seconds=0.05, warm_up_seconds=1, max_time=20)


def compared(subjects: list[Subject], config: BenchmarkConfig = CONFIG) -> Latency:
    """Time two subjects as a report does; return the second's times, with its ratio to the first."""
    clock = timing.Clock(config.max_time, 1)
    kept, step = Journal(None, None), Steps(None, 1)
    timing.time_all(subjects, subjects[0], WORKLOAD, config, clock, kept, step)
    first, second = (subject.timings[WORKLOAD.label] for subject in subjects)
    assert [subject.failure for subject in subjects] == [None, None]
    return latency(WORKLOAD, second, first.rounds, config)


def subject_of(variant: Variant, worker: Any) -> Subject:
    subject = Subject(variant, find_runtime(variant.runtime).describe(variant.model))
    subject.worker = worker
    return subject


# --- on a clock that is not real -----------------------------------------------------------------


class Machine:
    """A machine whose time is a number: it drifts, jitters, and at times something disturbs it."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.now, self.mood = 0.0, 1.0

    def monotonic(self) -> float:
        return self.now

    def call(self, seconds: float) -> float:
        self.mood *= self.random.lognormal(0, 0.002)  # a walk: by 5 % in some hundreds of calls
        disturbed = 1 + self.random.exponential(0.5) * (self.random.random() < 0.03)
        spent = seconds * self.mood * self.random.lognormal(0, 0.03) * disturbed
        self.now += spent
        return spent


class SimulatedWorker:
    def __init__(self, machine: Machine, seconds: float) -> None:
        self.machine, self.seconds = machine, seconds

    def warm_up(self, *_: Any) -> WarmUp:
        return WarmUp(6, True)

    def time(self, calls: Any, seconds: float) -> list[float]:
        end = self.machine.now + seconds
        spent = [self.machine.call(self.seconds)]
        while self.machine.now < end:
            spent.append(self.machine.call(self.seconds))
        return spent

    def timed_outputs(self) -> dict[str, np.ndarray]:
        return {"output": np.ones((1, 2))}

    def joules(self) -> None:
        return None

    peak_memory = device_memory = joules


def simulated(seed: int, slower: float, monkeypatch: pytest.MonkeyPatch) -> Latency:
    machine = Machine(seed)
    monkeypatch.setattr(timing, "time", machine)
    seconds = {"base": 0.01, "other": 0.01 * slower}
    subjects = [
        subject_of(Variant(name, "x", FAKES + "steady"), SimulatedWorker(machine, each))
        for name, each in seconds.items()
    ]
    return compared(subjects, replace(CONFIG, seconds=0.3, max_time=900, seed=seed))


def test_equal_models_are_equal_on_a_simulated_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [simulated(seed, 1.0, monkeypatch) for seed in range(100)]
    assert sum(not x.speedup.different for x in found if x.speedup) >= 95


def test_five_percent_are_found_on_a_simulated_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [simulated(seed, 1.05, monkeypatch).speedup for seed in range(100)]
    assert sum(x.different and x.value < 1 for x in found if x) >= 90
    assert sum(x.interval[0] <= 1 / 1.05 <= x.interval[1] for x in found if x) >= 90


# --- on this machine, with nothing else at work --------------------------------------------------


@pytest.mark.quiet
def test_a_known_sleep_is_measured() -> None:
    variants = [
        Variant("base", "sleep=0.03", FAKES + "steady"),
        Variant("twice", "sleep=0.06", FAKES + "steady"),
    ]
    base, twice = benchmark(variants, config=CONFIG).variants
    assert base.latency[0].typical == pytest.approx(0.03, rel=0.02)
    assert twice.latency[0].typical == pytest.approx(0.06, rel=0.02)
    assert twice.latency[0].speedup is not None
    assert twice.latency[0].speedup.value == pytest.approx(0.5, rel=0.02)


@contextmanager
def workers(*variants: Variant, threads: int = 1) -> Iterator[Callable[[], list[Subject]]]:
    """Yield what makes subjects, without a past, of processes that stay the same."""
    with ExitStack() as stack:
        opened = [
            stack.enter_context(Worker(variant, Place(threads=threads))) for variant in variants
        ]
        for worker in opened:
            worker.load()
        yield lambda: [subject_of(worker.variant, worker) for worker in opened]


def busy(name: str, work: int) -> Variant:
    return Variant(name, f"work={work}", FAKES + "busy")


@pytest.mark.quiet
def test_equal_models_are_equal() -> None:
    with workers(busy("base", 100), busy("same", 100)) as fresh:
        found = [compared(fresh(), replace(CONFIG, seed=seed)).speedup for seed in range(10)]
    assert sum(not x.different for x in found if x) >= 9


@pytest.mark.quiet
def test_five_percent_are_found() -> None:
    config = replace(CONFIG, precision=0.015, max_time=60)
    with workers(busy("base", 200), busy("slower", 210)) as fresh:
        found = [compared(fresh(), replace(config, seed=seed)).speedup for seed in range(10)]
    assert sum(x.different and x.value < 1 for x in found if x) >= 9


def burn() -> None:
    while True:
        sum(range(10_000))


@contextmanager
def a_loaded_core() -> Iterator[None]:
    process = multiprocessing.get_context("spawn").Process(target=burn, daemon=True)
    process.start()
    try:
        time.sleep(0.5)
        yield
    finally:
        process.kill()
        process.join()


@pytest.mark.quiet
def test_ratios_hold_beside_another_process() -> None:
    config = replace(CONFIG, precision=0.015)
    with workers(busy("base", 200), busy("fast", 100)) as fresh:
        quiet = compared(fresh(), config).speedup
        with a_loaded_core():
            loaded = compared(fresh(), config).speedup
    assert quiet is not None
    assert loaded is not None
    assert loaded.value == pytest.approx(quiet.value, rel=0.05)


@pytest.mark.quiet
def test_other_sessions_do_not_disturb(tmp_path: Path) -> None:
    """A session's threads spin for a while after a run; within a process the next one would suffer."""
    graph = str(save(graph_of("bert"), tmp_path))
    calls = [checkpoint_of("bert").signature.sample(8, 16)]
    with ExitStack() as stack:
        ours, *others = (
            stack.enter_context(Worker(Variant("x", graph), Place(threads=2))) for _ in range(4)
        )
        for worker in (ours, *others):
            worker.load()
            worker.warm_up(calls, 1.0)
        alone, between = [], []
        for _ in range(15):
            ours.time(calls, 0.05)
            alone.append(ours.time(calls, 0.05))
            for other in others:
                other.time(calls, 0.02)
            between.append(ours.time(calls, 0.05))
    ratios = statistics.round_ratios(alone, between)
    low, high = statistics.sign_interval(ratios)
    assert low <= 1.05
    assert high >= 0.95
