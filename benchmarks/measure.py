"""Measuring variants against a baseline: speed first, in interleaved rounds, then quality."""

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np

from benchmarks import statistics
from benchmarks.config import BenchmarkConfig, usable_cores
from benchmarks.report import BenchmarkReport, Environment, Latency, Quality, SpeedUp, VariantReport
from benchmarks.runtimes import Source, find_runtime
from benchmarks.worker import LoadInfo, Variant, WarmUp, Worker, WorkerError
from calib_data.errors import ConfigError, DataError

P = ParamSpec("P")
T = TypeVar("T")
Outputs = Mapping[str, np.ndarray]
Progress = Callable[[str, int, int], None]  # (what is going on, steps done, steps in all)

__all__ = ["BenchmarkConfig", "Variant", "benchmark"]


@dataclass(frozen=True)
class Workload:
    """The input that all variants are timed on."""

    label: str
    inputs: Mapping[str, Any]
    batch: int
    sequence: int | None


@dataclass
class _Timing:
    """What one variant did on one workload."""

    rounds: list[list[float]] = field(default_factory=list)
    warm_up: WarmUp = field(default_factory=lambda: WarmUp(0, False))
    outputs: Outputs = field(default_factory=dict)
    agreement: float | None = None


@dataclass
class _Subject:
    """A variant being measured; once it has failed it is left alone."""

    variant: Variant
    source: Source
    worker: Worker
    failure: str | None = None
    info: LoadInfo | None = None
    peak: int | None = None
    timings: dict[str, _Timing] = field(default_factory=dict)  # by workload label
    quality: list[Quality] = field(default_factory=list)

    def attempt(self, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Return what `action` does, or None, taking note of the failure.

        Only `WorkerError` is a row of the report: a provider that is not obtained spoils the whole
        comparison, and a data set that does not fit the metric is the user's to mend.
        """
        if self.failure is not None:
            return None
        try:
            return action(*args, **kwargs)
        except WorkerError as error:
            # The report is shown around: it names no place on this machine.
            model = self.variant.model
            self.failure = str(error).replace(model, Path(model).name)
            return None


def benchmark(
    variants: Sequence[Variant],
    baseline: str | None = None,
    config: BenchmarkConfig | None = None,
    *,
    title: str | None = None,
    command: str | None = None,
    progress: Progress | None = None,
) -> BenchmarkReport:
    """Measure every variant; `baseline` names the one to compare with, by default the first.

    A variant that fails is a row with its reason. Raises `ConfigError` for variants that cannot be
    compared, `ModelError` for a model that is not there, `ProviderError` where the provider is not
    obtained and `WorkerError` where no variant could be measured.
    """
    config = config or BenchmarkConfig()
    baseline = _check_names(variants, baseline)
    threads = config.threads or usable_cores()
    environment = Environment.here(config.provider, threads)  # first: it records the load before
    sources = {
        variant.name: find_runtime(variant.runtime).describe(variant.model) for variant in variants
    }
    first = sources[baseline]
    if first.signature is None:
        raise ConfigError(
            f"{baseline} does not say what its inputs mean; compare it with a bundle or a model, by "
            "--baseline"
        )
    workloads = make_workloads(first.signature, config)
    evaluation = _Evaluation.open(config, first) if config.eval else None
    steps = len(variants) * (1 + len(workloads) * (config.rounds + 1))
    steps += len(variants) * len(evaluation.metrics) if evaluation else 0
    step = _Steps(progress, steps)
    with ExitStack() as stack:
        subjects = []
        for variant in variants:
            worker = stack.enter_context(Worker(variant, config.provider, threads))
            subject = _Subject(variant, sources[variant.name], worker)
            step(f"loading {variant.name}")
            subject.info = subject.attempt(worker.load)
            subjects.append(subject)
        reference = next(subject for subject in subjects if subject.variant.name == baseline)
        for workload in workloads:
            _time(subjects, workload, config, step)
            _check_outputs(subjects, reference, workload)
        for subject in subjects:  # before the quality, whose batches have other sizes
            subject.peak = subject.attempt(subject.worker.peak_memory)
        if evaluation:
            evaluation.run(subjects, reference, config.seed, step)
    if all(subject.failure is not None for subject in subjects):
        raise WorkerError(
            f"no variant could be measured: {subjects[0].variant.name}: {subjects[0].failure}"
        )
    return BenchmarkReport(
        title=title or f"{Path(variants[0].model).name}: {len(variants)} variants",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        task=first.task,
        baseline=baseline,
        config=_shown_config(config, threads),
        environment=environment,
        variants=[
            _variant_report(subject, reference, workloads, config.seed) for subject in subjects
        ],
    )


def make_workloads(signature: Any, config: BenchmarkConfig) -> list[Workload]:
    """Return the inputs of every shape; the sequence is left out where the model has none."""
    has_sequence = getattr(signature, "has_sequence", True)
    workloads: dict[str, Workload] = {}
    for batch, sequence in config.shapes:
        label = f"{batch} × {sequence}" if has_sequence else str(batch)
        if label not in workloads:  # shapes that differ in the sequence alone
            inputs = signature.sample(batch=batch, sequence=sequence, seed=config.seed)
            workloads[label] = Workload(label, inputs, batch, sequence if has_sequence else None)
    return list(workloads.values())


# --- speed ---------------------------------------------------------------------------------------


def _time(
    subjects: list[_Subject], workload: Workload, config: BenchmarkConfig, step: "_Steps"
) -> None:
    """Time all subjects in rounds, each round in another order, one of them at any moment."""
    for subject in subjects:
        step(f"warming up {subject.variant.name} at {workload.label}")
        timing = subject.timings[workload.label] = _Timing()
        warm_up = subject.worker.warm_up
        warm = subject.attempt(warm_up, workload.inputs, config.warm_up_seconds)
        timing.warm_up = warm or timing.warm_up
    shuffle = random.Random(config.seed)
    for number in range(config.rounds):
        for subject in shuffle.sample(subjects, len(subjects)):
            step(f"timing at {workload.label}, round {number + 1} of {config.rounds}")
            seconds = subject.attempt(subject.worker.time, workload.inputs, config.seconds)
            if seconds is not None:
                subject.timings[workload.label].rounds.append(seconds)
    for subject in subjects:
        outputs = subject.attempt(subject.worker.timed_outputs)
        subject.timings[workload.label].outputs = outputs or {}


def _check_outputs(subjects: list[_Subject], reference: _Subject, workload: Workload) -> None:
    """Compare what the timed calls computed with the baseline's: a fast wrong model cannot win."""
    expected = reference.timings[workload.label].outputs if reference.failure is None else None
    name = reference.source.output
    if expected is not None and name not in expected:
        name = next(iter(expected), None)
    for subject in subjects:
        timing = subject.timings[workload.label]
        timing.agreement = subject.attempt(agreement, timing.outputs, expected, name)
    for subject in subjects:
        subject.timings[workload.label].outputs = {}


def agreement(outputs: Outputs, expected: Outputs | None, name: str | None) -> float | None:
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


# --- quality -------------------------------------------------------------------------------------


@dataclass
class _Evaluation:
    """The data and the metrics that judge the variants."""

    examples: Any  # calib_data.sources.Examples
    metrics: tuple[str, ...]
    settings: dict[str, Any]  # of `measure_metric`

    @classmethod
    def open(cls, config: BenchmarkConfig, source: Source) -> "_Evaluation":
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

    def run(self, subjects: list[_Subject], reference: _Subject, seed: int, step: "_Steps") -> None:
        """Measure all metrics of all subjects, the baseline first: the others differ from it."""
        from calib_data.metrics import measure_metric

        trusted = Remembered(reference.worker.predict)
        measured: dict[str, Any] = {}  # the baseline's, by metric
        for subject in sorted(subjects, key=lambda subject: subject is not reference):
            predict = trusted if subject is reference else Remembered(subject.worker.predict)
            for metric in self.metrics:
                step(f"measuring {metric} of {subject.variant.name}")
                found = subject.attempt(
                    measure_metric,
                    metric,
                    predict,
                    self.examples,
                    reference=trusted if reference.failure is None else None,
                    **self.settings,
                )
                if found is None:
                    continue
                if subject is reference:
                    measured[metric] = found
                row = subject.attempt(quality, found, measured.get(metric), self.examples, seed)
                if row is not None:
                    subject.quality.append(row)


class Remembered:
    """A `Predict` that keeps its answers, up to a budget of bytes: several metrics ask the same."""

    def __init__(
        self, predict: Callable[[Mapping[str, Any]], Outputs], budget: int = 2**28
    ) -> None:
        self._predict, self._budget = predict, budget
        self._answers: dict[bytes, Outputs] = {}

    def __call__(self, batch: Mapping[str, Any]) -> Outputs:
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


# --- the report ----------------------------------------------------------------------------------


def _variant_report(
    subject: _Subject, reference: _Subject, workloads: list[Workload], seed: int
) -> VariantReport:
    rows = []
    for workload in workloads:
        timing = subject.timings[workload.label]
        if subject.failure is None:
            theirs = reference.timings[workload.label].rounds
            comparable = subject is not reference and reference.failure is None
            rows.append(latency(workload, timing, theirs if comparable else None, seed))
    return VariantReport(
        name=subject.variant.name,
        runtime=subject.variant.runtime,
        model=Path(subject.variant.model).name,
        lineage=[_without_places(dict(entry)) for entry in subject.source.lineage],
        size_bytes=subject.source.size_bytes,
        sha256=dict(subject.source.sha256),
        status="ok" if subject.failure is None else "failed",
        reason=subject.failure,
        providers=list(subject.info.providers) if subject.info else [],
        load_seconds=round(subject.info.seconds, 4) if subject.info else None,
        peak_memory_bytes=subject.peak,
        latency=rows,
        quality=subject.quality,
    )


def latency(
    workload: Workload, timing: _Timing, baseline: list[list[float]] | None, seed: int
) -> Latency:
    """Return what the raw times of one variant say, and against the baseline's."""
    seconds = statistics.pooled(timing.rounds)
    median = statistics.percentile(seconds, 50)
    speedup = None
    if baseline:
        ratios = statistics.round_ratios(timing.rounds, baseline)
        interval = statistics.sign_interval(ratios)
        different = statistics.is_different(interval)
        speedup = SpeedUp(statistics.percentile(ratios, 50), interval, different)
    tokens = None if workload.sequence is None else workload.batch * workload.sequence / median
    return Latency(
        workload=workload.label,
        batch=workload.batch,
        sequence=workload.sequence,
        calls=len(seconds),
        median=median,
        interval=statistics.median_interval(timing.rounds, seed=seed),
        p95=statistics.percentile(seconds, 95),
        p99=statistics.percentile(seconds, 99),
        examples_per_second=workload.batch / median,
        tokens_per_second=tokens,
        warm_up_calls=timing.warm_up.calls,
        settled=timing.warm_up.settled,
        speedup=speedup,
        agreement=timing.agreement,
        rounds=[[round(second, 7) for second in calls] for calls in timing.rounds],
    )


class _Steps:
    """Counts steps for a progress bar."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, what: str) -> None:
        """Say what begins now."""
        if self.progress is not None:
            self.progress(what, self.done, self.total)
        self.done += 1


def _check_names(variants: Sequence[Variant], baseline: str | None) -> str:
    """Return the baseline's name; a `ConfigError` where names do not tell variants apart."""
    if not variants:
        raise ConfigError("there is nothing to measure; name at least one model")
    names = [variant.name for variant in variants]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"two variants are called {twice}; give each its own name")
    if baseline is not None and baseline not in names:
        raise ConfigError(f"the baseline {baseline} is not among {', '.join(names)}")
    return baseline or names[0]


def _without_places(value: Any) -> Any:
    """Return plain data with absolute paths cut to their last part: a report is shown around."""
    if isinstance(value, Mapping):
        return {name: _without_places(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_places(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _shown_config(config: BenchmarkConfig, threads: int) -> dict[str, Any]:
    """Return the settings as they were used, without places on this machine."""
    return _without_places({**config.to_json(), "threads": threads})
