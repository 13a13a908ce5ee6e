"""Measuring variants against a baseline: speed first, in interleaved rounds, then quality."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import load, statistics
from benchmarks.config import BenchmarkConfig, usable_cores
from benchmarks.evaluation import Evaluation
from benchmarks.journal import Journal
from benchmarks.report import BenchmarkReport, Environment, Latency, VariantReport, speedup_of
from benchmarks.runtimes import GraphUse, Place, Source, find_runtime
from benchmarks.subjects import Steps, Subject, Timing
from benchmarks.timing import Clock, time_all
from benchmarks.worker import Variant, Worker, WorkerError
from benchmarks.workloads import Workload, largest, make_workloads, on_threads, smallest
from calib_data.errors import ConfigError

Progress = Callable[[str, int, int], None]  # (what is going on, steps done, steps in all)

__all__ = ["BenchmarkConfig", "Variant", "benchmark"]


def benchmark(
    variants: Sequence[Variant],
    baseline: str | None = None,
    config: BenchmarkConfig | None = None,
    *,
    title: str | None = None,
    command: str | None = None,
    progress: Progress | None = None,
    journal: Path | None = None,
) -> BenchmarkReport:
    """Measure every variant; `baseline` names the one to compare with, by default the first.

    A variant that fails is a row with its reason. What is measured is kept in the folder `journal`, and
    after a kill taken from there. Raises `ConfigError` for variants that cannot be compared,
    `ModelError` for a model that is not there, `ProviderError` where the provider is not obtained and
    `WorkerError` where no variant could be measured.
    """
    config = config or BenchmarkConfig()
    baseline = _check_names(variants, baseline)
    counts = config.threads or (usable_cores(),)
    place = Place(
        config.provider, counts[-1], transfers=config.transfers, graphs=config.cuda_graphs
    )
    environment = Environment.here(config.provider, counts[-1])  # first: the load before is in it
    sources = {
        variant.name: find_runtime(variant.runtime).describe(variant.model) for variant in variants
    }
    first = sources[baseline]
    if first.foreign:
        raise ConfigError(
            f"{baseline} does not say what its inputs mean; compare it with a bundle or a model, by "
            "--baseline"
        )
    inputs = make_workloads(_for_all(first, list(sources.values())), config)
    workloads = [placed for count in counts for placed in on_threads(inputs, count, len(counts))]
    evaluation = Evaluation.open(config, first) if config.eval else None
    kept = Journal(journal, _identity(variants, baseline, sources, config, environment))
    loads = len(counts) + len(config.streams)
    steps = len(variants) * (loads + len(workloads) * (config.rounds + 1) + 1)
    steps += len(variants) * len(evaluation.metrics) if evaluation else 0
    steps += len(variants) * len(config.streams) * load.STEPS
    step = Steps(progress, steps)
    subjects = [Subject(variant, sources[variant.name]) for variant in variants]
    reference = next(subject for subject in subjects if subject.name == baseline)
    clock = Clock(config.max_time, len(workloads))
    for count in counts:
        with _opened(subjects, replace(place, threads=count), step):
            for workload in workloads:
                if workload.threads == count:
                    time_all(subjects, reference, workload, config, clock, kept, step)
            if evaluation and count == counts[-1]:
                evaluation.run(subjects, reference, config.seed, kept, step)
    for streams in config.streams:
        with _opened(subjects, replace(place, streams=streams), step):
            load.measure(subjects, smallest(inputs), streams, counts[-1], config, kept, step)
    if all(subject.failure is not None for subject in subjects):
        raise WorkerError(
            f"no variant could be measured: {subjects[0].name}: {subjects[0].failure}"
        )
    for subject in subjects:
        step(f"profiling {subject.name}")
        subject.use = _use(subject, largest(inputs), place)
    return BenchmarkReport(
        title=title or f"{Path(variants[0].model).name}: {len(variants)} variants",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        task=first.task,
        baseline=baseline,
        config=_without_places({**config.to_json(), "threads": list(counts)}),
        environment=environment,
        variants=[_variant_report(subject, reference, workloads, config) for subject in subjects],
    )


@contextmanager
def _opened(subjects: Sequence[Subject], place: Place, step: Steps) -> Iterator[None]:
    """Give every subject a process that has loaded its model on so many threads, for a while."""
    with ExitStack() as stack:
        for subject in subjects:
            subject.worker = stack.enter_context(Worker(subject.variant, place))
            step(f"loading {subject.name}")
            info = subject.attempt(subject.worker.load)
            subject.info = subject.info or info  # of the first time, before its files are in memory
        yield


# --- what runs where -----------------------------------------------------------------------------


def _for_all(first: Source, sources: Sequence[Source]) -> Source:
    """Return the baseline's source, with no more tokens than every variant has to sample from."""
    tokens = [getattr(each.signature, "vocabulary", 0) for each in sources if not each.foreign]
    least = min((count for count in tokens if count), default=0)
    if least >= getattr(first.signature, "vocabulary", 0) or not least:
        return first
    return replace(first, signature=replace(first.signature, vocabulary=least))


def _use(subject: Subject, workload: Workload, place: Place) -> GraphUse | None:
    """Return what ONNX Runtime makes of a graph, found by a process that does nothing else."""
    inspect = find_runtime(subject.variant.runtime).inspect
    if subject.failure is not None or inspect is None:
        return None
    with Worker(subject.variant, place) as worker:
        try:
            return worker.operators((workload.batch, workload.sequence or 1))
        except WorkerError:
            return None  # it runs as it is, and only how is not told


# --- the report ----------------------------------------------------------------------------------


def _variant_report(
    subject: Subject, reference: Subject, workloads: Sequence[Workload], config: BenchmarkConfig
) -> VariantReport:
    rows = []
    for workload in workloads:
        timing, theirs = (s.timings.get(workload.label, Timing()) for s in (subject, reference))
        if timing.done:
            comparable = subject is not reference and theirs.done
            rows.append(latency(workload, timing, theirs.rounds if comparable else None, config))
    use = subject.use
    return VariantReport(
        name=subject.name,
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
        device_memory_bytes=subject.held,
        operators=dict(use.operators) if use else {},
        placed=dict(use.providers) if use else {},
        copies=use.copies if use else None,
        latency=rows,
        load=subject.load,
        quality=subject.quality,
    )


def latency(
    workload: Workload,
    timing: Timing,
    baseline: list[list[float]] | None,
    config: BenchmarkConfig,
) -> Latency:
    """Return what the raw times of one variant say, and against the baseline's."""
    seconds = statistics.pooled(timing.rounds)
    typical = statistics.typical(seconds, workload.ragged)
    interval = statistics.typical_interval(timing.rounds, seed=config.seed, ragged=workload.ragged)
    speedup = None
    if baseline:
        speedup = speedup_of(statistics.round_ratios(timing.rounds, baseline, workload.ragged))
    return Latency(
        workload=workload.label,
        kind=workload.kind,
        threads=workload.threads,
        batch=workload.batch,
        sequence=workload.sequence,
        calls=len(seconds),
        typical=typical,
        interval=interval,
        p50=statistics.percentile(seconds, 50),
        p95=statistics.percentile(seconds, 95),
        p99=statistics.percentile(seconds, 99),
        examples_per_second=workload.batch / typical,
        tokens_per_second=None if workload.tokens is None else workload.tokens / typical,
        warm_up_calls=timing.warm_up.calls,
        settled=timing.warm_up.settled,
        precise=statistics.precision(timing.rounds, baseline, workload.ragged) <= config.precision,
        speedup=speedup,
        agreement=timing.agreement,
        joules=timing.joules,
        rounds=[[round(second, 7) for second in calls] for calls in timing.rounds],
    )


def _identity(
    variants: Sequence[Variant],
    baseline: str,
    sources: Mapping[str, Source],
    config: BenchmarkConfig,
    environment: Environment,
) -> dict[str, Any]:
    """Return what must be the same for a run to go on where another was."""
    return {
        "variants": [
            [v.name, v.runtime, dict(sources[v.name].sha256), sources[v.name].size_bytes]
            for v in variants
        ],
        "baseline": baseline,
        "config": config.to_json(),
        "data": [_fingerprint(spec) for spec in (config.eval, config.traffic)],
        "environment": {**dataclasses.asdict(environment), "load_average": None},
    }


def _fingerprint(spec: str | None) -> list[tuple[str, int, int]]:
    """Return name, size and time of the files that a data spec names, as far as it names files."""
    paths = [Path(part) for part in re.split("[,+]", spec or "") if part and Path(part).is_file()]
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


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
