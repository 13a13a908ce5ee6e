"""How many requests per second a model answers in time, when they come whether it is ready or not.

A loop that waits for each answer before it asks again slows down with the model and hides what users
wait for. Here requests arrive at random (Poisson), several streams answer them in the order of arrival,
and what a request takes counts from its arrival.
"""

import statistics
from collections.abc import Sequence

from benchmarks.config import BenchmarkConfig
from benchmarks.journal import Journal
from benchmarks.report import Arrivals, Load
from benchmarks.statistics import percentile
from benchmarks.subjects import Steps, Subject
from benchmarks.workloads import Workload

ROUNDS = 3
SHARES = (0.2, 0.4, 0.6, 0.75, 0.9)  # of the capacity: at all of it the queue grows without end
STEPS = ROUNDS * (1 + len(SHARES))  # of a subject, for the progress
_REQUESTS = 200  # at each rate: the 95th percentile is the tenth from above
_SECONDS = 2.0  # at each rate at least
_MOST = 20.0  # seconds, which may be fewer requests


def measure(
    subjects: Sequence[Subject],
    workload: Workload,
    streams: int,
    threads: int,
    config: BenchmarkConfig,
    journal: Journal,
    step: Steps,
) -> None:
    """Add to each subject how many requests per second it answers within the config's target.

    Every round finds the capacity anew and goes up from a fifth of it, the subjects in turns.
    """
    assert config.target is not None
    target = config.target / 1e3
    found: dict[str, list[list[Arrivals]]] = {subject.name: [] for subject in subjects}
    capacities: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    for subject in subjects:
        subject.attempt(subject.worker.warm_up, workload.calls, config.warm_up_seconds)
    for number in range(ROUNDS):
        for subject in subjects:
            key = ("load", streams, subject.name, number)
            known = journal.get(*key)
            if known is None:
                known = subject.attempt(_round, subject, workload, streams, number, step)
                if known is None:
                    continue
                journal.put(*key, value=known)
            capacity, rows = known
            capacities[subject.name].append(capacity)
            found[subject.name].append([Arrivals(*row) for row in rows])
    for subject in subjects:
        if subject.failure is not None:
            continue
        rounds = found[subject.name]
        rates = [sustained(arrivals, target) for arrivals in rounds]
        subject.load.append(
            Load(
                workload=workload.label,
                streams=streams,
                threads=threads,
                target=target,
                capacity=statistics.median(capacities[subject.name]),
                sustained=statistics.median(rates),
                interval=(min(rates), max(rates)),
                arrivals=[row for arrivals in rounds for row in arrivals],
            )
        )


def _round(
    subject: Subject, workload: Workload, streams: int, number: int, step: Steps
) -> tuple[float, list[tuple[float, float, float, float, int]]]:
    """Return the capacity and (rate, p50, p95, p99, requests) at each share of it."""
    (inputs,) = workload.calls
    what = f"{subject.name} under load, {streams} at once"
    step(what)
    capacity = subject.worker.capacity(inputs, streams, _SECONDS)
    rows = []
    for i, share in enumerate(SHARES):
        step(what)
        rate = share * capacity
        count = max(1, round(min(max(_REQUESTS, rate * _SECONDS), rate * _MOST)))
        spent = subject.worker.arrivals(inputs, streams, rate, count, 1000 * number + i)
        p50, p95, p99 = (percentile(spent, percent) for percent in (50, 95, 99))
        rows.append((rate, p50, p95, p99, count))
    return capacity, rows


def sustained(arrivals: Sequence[Arrivals], target: float) -> float:
    """Return the highest rate at which 95 % of requests take at most `target` seconds.

    Between two measured rates the percentile is taken to grow evenly; 0 where it is above the target at
    the lowest, and the highest measured rate where it never is.
    """
    ordered = sorted(arrivals, key=lambda row: row.rate)
    below = None
    for row in ordered:
        if row.p95 > target:
            if below is None:
                return 0.0
            part = (target - below.p95) / (row.p95 - below.p95)
            return below.rate + part * (row.rate - below.rate)
        below = row
    return ordered[-1].rate
