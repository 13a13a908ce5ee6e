"""How fast variants are: interleaved rounds, measured on until they are precise, and checked."""

import dataclasses
import random
import time
from collections.abc import Sequence

import numpy as np

from benchmarks import statistics
from benchmarks.config import BenchmarkConfig
from benchmarks.foreign import completed
from benchmarks.journal import Journal
from benchmarks.runtimes import Arrays
from benchmarks.subjects import Steps, Subject, Timing
from benchmarks.worker import WarmUp, WorkerError
from benchmarks.workloads import Workload


class Clock:
    """Deals out the seconds that all rounds may take: what one workload leaves, the next ones have."""

    def __init__(self, seconds: float, workloads: int) -> None:
        self._seconds, self._workloads, self._begun = seconds, workloads, 0.0

    def begin(self) -> float:
        """Begin the next workload's rounds; return until when they may take."""
        self._begun = time.monotonic()
        return self._begun + max(0.0, self._seconds) / max(1, self._workloads)

    def end(self) -> None:
        """End a workload, which may have had no rounds."""
        if self._begun:
            self._seconds -= time.monotonic() - self._begun
        self._workloads, self._begun = self._workloads - 1, 0.0


def time_all(
    subjects: Sequence[Subject],
    reference: Subject,
    workload: Workload,
    config: BenchmarkConfig,
    clock: Clock,
    journal: Journal,
    step: Steps,
) -> None:
    """Time all subjects in rounds, each round in another order, one of them at any moment.

    There are as many rounds as `config` says, and more until every ratio to the reference is precise or
    the clock's share is over. Graphs of other tools, which cannot generate, are left out of decoding.
    """
    label = workload.label
    if workload.kind == "decoding":
        subjects = [subject for subject in subjects if not subject.source.foreign]
    for subject in subjects:
        subject.timings[label] = Timing()
    if _restore(subjects, label, journal, step, config.rounds):
        clock.end()
        return
    for subject in subjects:
        step(f"warming up {subject.name} at {label}")
        warm_up = subject.worker.warm_up
        warm = subject.attempt(warm_up, workload.calls, config.warm_up_seconds)
        subject.timings[label].warm_up = warm or WarmUp(0, False)
    shuffle = random.Random(config.seed)
    number, deadline = 0, clock.begin()
    while number < config.rounds or not (
        time.monotonic() > deadline or _precise(subjects, reference, workload, config.precision)
    ):
        order = shuffle.sample(subjects, len(subjects))
        _round(order, workload, number, config, journal, step)
        number += 1
    clock.end()
    for subject in subjects:
        timing = subject.timings[label]
        timing.outputs = subject.attempt(subject.worker.timed_outputs) or {}
        timing.joules = subject.attempt(subject.worker.joules)
        if workload.kind != "decoding":  # which opens the graph once more
            subject.weigh()
    _check_outputs(subjects, reference, workload)
    for subject in subjects:
        subject.timings[label].done = subject.failure is None
    done = {
        subject.name: {
            "warm_up": dataclasses.asdict(subject.timings[label].warm_up),
            "agreement": subject.timings[label].agreement,
            "joules": subject.timings[label].joules,
            "rounds": number,
            "memory": [subject.peak, subject.held],
        }
        for subject in subjects
        if subject.failure is None
    }
    journal.put("workload", label, value=done)


def _round(
    order: Sequence[Subject],
    workload: Workload,
    number: int,
    config: BenchmarkConfig,
    journal: Journal,
    step: Steps,
) -> None:
    """Time every subject once, or look up that round."""
    label, extra = workload.label, number >= config.rounds
    kept = journal.get("round", label, number)
    if kept is not None and any(s.failure is None and s.name not in kept for s in order):
        kept = None  # ratios are of times taken side by side
    spent: dict[str, list[float]] = {}
    for subject in order:
        step(f"timing at {label}, round {number + 1}", extra)
        if kept is not None:
            seconds = kept.get(subject.name)
        else:
            seconds = subject.attempt(subject.worker.time, workload.calls, config.seconds)
        if seconds is not None and subject.failure is None:
            spent[subject.name] = seconds
            subject.timings[label].rounds.append(seconds)
    if kept is None:
        journal.put("round", label, number, value=spent)


def _restore(
    subjects: Sequence[Subject], label: str, journal: Journal, step: Steps, rounds: int
) -> bool:
    """Take a finished workload from the journal, if it has it for all subjects."""
    done = journal.get("workload", label)
    if done is None or any(s.failure is None and s.name not in done for s in subjects):
        return False
    for subject in subjects:
        for _ in range(1 + rounds):
            step(f"{subject.name} at {label} is known")
        if subject.failure is not None:
            continue
        known, timing = done[subject.name], subject.timings[label]
        timing.warm_up = WarmUp(**known["warm_up"])
        timing.agreement, timing.joules = known["agreement"], known["joules"]
        timing.done = True
        subject.grown(*known["memory"])
        for number in range(known["rounds"]):
            timing.rounds.append(journal.get("round", label, number)[subject.name])
    return True


def _precise(
    subjects: Sequence[Subject], reference: Subject, workload: Workload, wanted: float
) -> bool:
    """Return whether the ratios to the reference, or all times without one, are as sure as asked for."""
    label = workload.label
    live = [subject for subject in subjects if subject.failure is None]
    compared = [s for s in live if s is not reference] if reference.failure is None else []
    theirs = reference.timings[label].rounds if compared else None
    return all(
        statistics.precision(subject.timings[label].rounds, theirs, workload.ragged) <= wanted
        for subject in compared or live
    )


def _check_outputs(subjects: Sequence[Subject], reference: Subject, workload: Workload) -> None:
    """Compare what the timed calls computed with the baseline's: a fast wrong model cannot win."""
    mine = reference.timings[workload.label].outputs
    reference.attempt(agreement, mine, None, None)  # nothing is compared with what is no number
    expected = mine if reference.failure is None else None
    generated = workload.kind == "decoding"
    name = None if generated else reference.source.output
    if expected is not None and name not in expected:
        name = next(iter(expected), None)
    for subject in subjects:
        timing = subject.timings[workload.label]
        outputs: Arrays | None = timing.outputs
        if subject.source.foreign:
            last = workload.calls[-1]
            outputs = subject.attempt(completed, timing.outputs, last, reference.source)
        if outputs is not None:
            wanted = name if name in outputs or not subject.source.foreign else None
            compare = same_tokens if generated else agreement
            # the same numbers are other words to a tokenizer of its own
            theirs = None if subject.reads_apart(reference) else expected
            timing.agreement = subject.attempt(compare, outputs, theirs, wanted)
    for subject in subjects:
        subject.timings[workload.label].outputs = {}


def same_tokens(outputs: Arrays, expected: Arrays | None, name: str | None) -> float | None:
    """Return the share of generated tokens that are the expected ones."""
    if expected is None or name is None:
        return None
    ours, theirs = outputs[name], expected[name]
    if ours.shape != theirs.shape:
        raise WorkerError(f"it made {ours.shape} tokens, the baseline {theirs.shape}")
    return float((ours == theirs).mean())


def agreement(outputs: Arrays, expected: Arrays | None, name: str | None) -> float | None:
    """Return the least cosine over examples between one output and the expected one.

    Raises `WorkerError` for an output that is missing, not finite, or of another shape.
    """
    for key, values in outputs.items():
        if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
            raise WorkerError(f"output {key} of the timed calls holds NaN or infinite values")
    if expected is None or name is None:
        return None
    if name not in outputs:
        raise WorkerError(
            f"it has no output {name}, which the baseline has; it has {', '.join(outputs)}"
        )
    ours, theirs = outputs[name], expected[name]
    if ours.shape != theirs.shape:
        raise WorkerError(
            f"output {name} has shape {ours.shape}, the baseline's has {theirs.shape}"
        )
    return float(statistics.row_cosines(ours, theirs).min())
