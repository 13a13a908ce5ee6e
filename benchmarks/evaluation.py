"""How good variants are: metrics on the same data, and their differences to the baseline's."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import statistics
from benchmarks.config import BenchmarkConfig
from benchmarks.foreign import completed
from benchmarks.journal import Journal
from benchmarks.report import Quality, quality_from
from benchmarks.runtimes import Arrays, Source
from benchmarks.subjects import Steps, Subject
from benchmarks.worker import WorkerError
from calib_data.errors import DataError


@dataclass
class Evaluation:
    """The data and the metrics that judge the variants."""

    examples: Any  # calib_data.sources.Examples
    metrics: tuple[str, ...]
    settings: dict[str, Any]  # of `measure_metric`

    @classmethod
    def open(cls, config: BenchmarkConfig, source: Source) -> "Evaluation":
        """Return the config's, for a baseline; raise `DataError` where a metric does not fit."""
        from calib_data.metrics import METRICS, default_metrics
        from calib_data.sources import open_data

        assert config.eval is not None
        examples = open_data(config.eval, config.columns, config.limit)
        if examples.label_names and set(examples.label_names) <= set(source.labels):
            examples = examples.relabel(source.labels)
        fitting = default_metrics(source.task, examples.roles, True)
        for name in config.metrics:  # now, not after minutes of timing
            metric = METRICS.get(name)
            known = metric is not None and metric.suits(source.task)
            if metric is None or not known or set(metric.roles) - examples.roles:
                raise DataError(
                    f"metric {name} does not fit {source.task} and {config.eval}; "
                    f"choose among {', '.join(fitting)}"
                )
        metrics = config.metrics or fitting
        if not metrics:
            raise DataError(f"no metric fits {source.task} and {config.eval}; use other data")
        settings = {
            "processor": source.processor,
            "task": source.task,
            "batch_size": config.batch_size,
            "max_length": source.max_length,
        }
        return cls(examples, tuple(metrics), settings)

    def run(
        self,
        subjects: Sequence[Subject],
        reference: Subject,
        seed: int,
        journal: Journal,
        step: Steps,
    ) -> None:
        """Measure all metrics of all subjects, the baseline first: the others differ from it.

        What the journal has is not measured again, but for the baseline while others need it.
        """
        from calib_data.metrics import METRICS, measure_metric

        known = {subject.name: journal.get("quality", subject.name) for subject in subjects}
        for subject in subjects:
            kept = known[subject.name]
            if kept is not None and subject.failure is None:
                subject.quality = [quality_from(row) for row in kept]
        if all(known[s.name] is not None or s.failure is not None for s in subjects):
            for subject in subjects:
                for metric in self.metrics:
                    step(f"measuring {metric} of {subject.name}")
            return
        trusted = Remembered(_asked(reference))
        measured: dict[str, Any] = {}  # the baseline's, by metric
        for subject in sorted(subjects, key=lambda subject: subject is not reference):
            again = known[subject.name] is None or subject is reference
            if again:
                subject.quality = []
            if subject.source.foreign and not subject.comparable:
                journal.put("quality", subject.name, value=[])
                continue
            predict = (
                trusted if subject is reference else Remembered(self._predict(subject, reference))
            )
            settings = self.settings
            if apart := subject.reads_apart(reference):
                settings = {**settings, "processor": subject.source.processor}
            for metric in self.metrics:
                step(f"measuring {metric} of {subject.name}")
                if apart and METRICS[metric].reference:
                    continue  # one batch is for both, whose tokens have other numbers
                lost = reference.failure is not None and METRICS[metric].reference
                if not again or lost:
                    continue
                try:
                    found = subject.attempt(
                        measure_metric,
                        metric,
                        predict,
                        self.examples,
                        reference=trusted if reference.failure is None else None,
                        **settings,
                    )
                except _ReferenceLostError:  # the baseline's failure, not this subject's
                    continue
                if found is None:
                    continue
                if subject is reference:
                    measured[metric] = found
                row = subject.attempt(quality, found, measured.get(metric), self.examples, seed)
                if row is not None:
                    subject.quality.append(row)
            if again and subject.failure is None:
                rows = [dataclasses.asdict(row) for row in subject.quality]
                journal.put("quality", subject.name, value=rows)

    @staticmethod
    def _predict(subject: Subject, reference: Subject) -> Callable[[Mapping[str, Any]], Arrays]:
        """Return a subject's predictions under the baseline's names."""
        if not subject.source.foreign:
            return subject.worker.predict
        return lambda batch: completed(subject.worker.predict(batch), batch, reference.source)


class _ReferenceLostError(Exception):
    """The baseline, asked while another was measured, has failed."""


def _asked(reference: Subject) -> Callable[[Mapping[str, Any]], Arrays]:
    """Return the baseline's predictions, whose failure is noted where it belongs."""

    def predict(batch: Mapping[str, Any]) -> Arrays:
        found = reference.attempt(reference.worker.predict, batch)
        if found is None:
            raise _ReferenceLostError
        return found

    return predict


class Remembered:
    """A `Predict` that keeps its answers, up to a budget of bytes: several metrics ask the same."""

    def __init__(self, predict: Callable[[Mapping[str, Any]], Arrays], budget: int = 2**28) -> None:
        self._predict, self._budget = predict, budget
        self._answers: dict[bytes, Arrays] = {}

    def __call__(self, batch: Mapping[str, Any]) -> Arrays:
        """Return the outputs for `batch`."""
        key = _digest(batch)
        if key not in self._answers:
            outputs = self._predict(batch)
            size = sum(values.nbytes for values in outputs.values())
            if size > self._budget:
                return outputs
            self._budget -= size
            self._answers[key] = outputs
        return self._answers[key]


def _digest(batch: Mapping[str, Any]) -> bytes:
    digest = hashlib.sha256()
    for name, value in sorted(batch.items()):
        array = np.ascontiguousarray(value)
        digest.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.digest()


def quality(found: Any, baseline: Any | None, examples: Any, seed: int) -> Quality:
    """Return a metric's value and its difference to the baseline's, with an interval if it has one."""
    from calib_data.metrics import METRICS

    if not np.isfinite(found.value):
        raise WorkerError(f"{found.name} is not a finite number: the outputs are useless")
    interval = None
    statistic = _statistic(found, examples)
    if statistic is not None and baseline is not None and baseline is not found:
        ours, theirs = found.per_example, baseline.per_example
        interval = statistics.paired_interval(ours, theirs, seed=seed, statistic=statistic)
    return Quality(
        metric=found.name,
        value=float(found.value),
        higher_is_better=found.higher_is_better,
        examples=len(examples),
        difference=None if baseline is None else float(found.value - baseline.value),
        interval=interval,
        unit=METRICS[found.name].unit if found.name in METRICS else "",
    )


def _statistic(found: Any, examples: Any) -> Callable[[np.ndarray, np.ndarray], float] | None:
    """Return how a metric's value follows from its values per example, or None where it does not."""
    if found.per_example is None or len(found.per_example) != len(examples):
        return None
    if found.name == "spearman":
        scores = np.asarray(examples.column("score"))
        return lambda values, rows: 100 * statistics.rank_correlation(values, scores[rows])
    mean = float(np.nanmean(found.per_example))
    scale = next((scale for scale in (1, 100) if np.isclose(scale * mean, found.value)), None)
    return None if scale is None else lambda values, rows: scale * float(np.nanmean(values))
