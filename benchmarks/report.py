"""The report as plain data: everything that was measured, and under which conditions."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from benchmarks import gpus, statistics
from calib_data.errors import DataError

SCHEMA = 2  # raised when an older reader would misread a newer file
_PACKAGES = ("torch", "onnxruntime", "onnxruntime-gpu", "transformers", "onnx", "numpy")

Interval = tuple[float, float]  # 95 %


@dataclass(frozen=True)
class SpeedUp:
    """How many times faster than the baseline, measured round by round."""

    value: float  # median over rounds of baseline seconds / variant seconds
    interval: Interval
    different: bool  # the interval at 99 % excludes 1; otherwise this is "no difference"


def speedup_of(ratios: Sequence[float]) -> SpeedUp:
    """Return what the ratios of the rounds say."""
    return SpeedUp(
        statistics.percentile(ratios, 50),
        statistics.sign_interval(ratios),
        statistics.is_different(ratios),
    )


@dataclass(frozen=True)
class Latency:
    """One variant's times for one kind of input; seconds per call."""

    workload: str  # how the input is labelled: 8 × 128
    kind: Literal["shape", "traffic", "decoding"]
    threads: int
    batch: int
    sequence: int | None  # None where the model takes no sequence, or lengths differ
    calls: int
    typical: float  # the median; the mean where calls differ in length
    interval: Interval  # of `typical`
    p50: float
    p95: float
    p99: float
    examples_per_second: float
    tokens_per_second: float | None
    warm_up_calls: int
    settled: bool  # whether times had settled when warm-up ended
    precise: bool  # whether intervals got as narrow as was asked for
    speedup: SpeedUp | None  # None without a baseline, and for the baseline itself
    agreement: float | None  # least cosine over examples to the baseline's timed output; of what is
    # generated, the share of tokens that are the baseline's
    joules: float | None  # of a call, the whole machine's, where it tells
    rounds: list[list[float]]  # the raw times


@dataclass(frozen=True)
class Arrivals:
    """How long requests took, waiting included, that came at random at one rate; seconds."""

    rate: float  # per second
    p50: float
    p95: float
    p99: float
    requests: int


@dataclass(frozen=True)
class Load:
    """How many requests per second one variant answers in time."""

    workload: str  # what a request is
    streams: int  # requests answered at once
    threads: int  # of all together
    target: float  # seconds that 95 % of the requests may take
    capacity: float  # requests per second where one waits for every answer
    sustained: float  # the highest rate within the target, the median of the rounds
    interval: tuple[float, float]  # least and most of the rounds
    arrivals: list[Arrivals]  # all that was measured


@dataclass(frozen=True)
class Quality:
    """One metric of one variant."""

    metric: str
    value: float
    higher_is_better: bool
    examples: int
    difference: float | None  # to the baseline's value
    interval: Interval | None  # of the difference, paired by example
    unit: str = ""


@dataclass(frozen=True)
class VariantReport:
    """Everything about one variant."""

    name: str
    runtime: str
    model: str  # the last part of its path
    lineage: list[dict[str, Any]]
    size_bytes: int
    sha256: dict[str, str]
    status: Literal["ok", "failed"] = "ok"
    reason: str | None = None
    providers: list[str] = field(default_factory=list)
    load_seconds: float | None = None
    peak_memory_bytes: int | None = None
    device_memory_bytes: int | None = None  # held on GPUs, where they tell
    operators: dict[str, float] = field(
        default_factory=dict
    )  # seconds of a run, the costliest first
    placed: dict[str, int] = field(default_factory=dict)  # nodes by execution provider
    copies: int | None = None  # between host and device
    latency: list[Latency] = field(default_factory=list)
    load: list[Load] = field(default_factory=list)
    quality: list[Quality] = field(default_factory=list)


@dataclass(frozen=True)
class Environment:
    """The conditions of the measurement."""

    cpu: str
    cores: int  # that the process may use
    threads: int  # per model
    memory_bytes: int
    system: str
    python: str
    versions: dict[str, str]
    provider: str
    gpu: str | None
    load_average: float | None  # over the minute before the start

    @classmethod
    def here(cls, provider: str, threads: int) -> Self:
        """Return this machine's."""
        import psutil

        from benchmarks.config import usable_cores

        return cls(
            cpu=_cpu(),
            cores=usable_cores(),
            threads=threads,
            memory_bytes=psutil.virtual_memory().total,
            system=platform.platform(terse=True),
            python=platform.python_version(),
            versions=_versions(),
            provider=provider,
            gpu=gpus.describe() if provider != "cpu" else None,
            load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        )


@dataclass(frozen=True)
class BenchmarkReport:
    """What a benchmark found."""

    title: str
    created: str  # UTC, ISO 8601
    command: str | None  # repeats it
    task: str
    baseline: str  # a variant's name
    config: dict[str, Any]
    environment: Environment
    variants: list[VariantReport]
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """Return the report that `to_json` gave; a `DataError` names what does not fit."""
        if not isinstance(values, Mapping) or "schema" not in values:
            raise DataError("this is not a benchmark report: it has no schema version")
        if values["schema"] != SCHEMA:
            raise DataError(
                f"the report has schema {values['schema']}, this version reads {SCHEMA}; "
                "read it with the onnxpress that wrote it, or measure again"
            )
        report = _parse(cls, values, "report")
        names = [variant.name for variant in report.variants]
        if report.baseline not in names:
            raise DataError(f"report.baseline is {report.baseline!r}, not one of {names}")
        return report

    def variant(self, name: str) -> VariantReport:
        """Return the variant called `name`, which there is."""
        return next(variant for variant in self.variants if variant.name == name)

    def find(self, name: str) -> VariantReport | None:
        """Return the variant called `name`, or None."""
        return next((variant for variant in self.variants if variant.name == name), None)


def read_report(path: Path) -> BenchmarkReport:
    """Return the report in a JSON file; a `DataError` says why it cannot be read."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}; name a report.json") from error
    return BenchmarkReport.from_json(values)


def read_reports(paths: Iterable[Path]) -> list[BenchmarkReport]:
    """Return the reports in JSON files, oldest first."""
    return sorted(map(read_report, paths), key=lambda report: report.created)


def quality_from(values: Any) -> Quality:
    """Return one metric's figures from JSON-able values."""
    quality: Quality = _parse(Quality, values, "quality")
    return quality


def _parse(hint: Any, value: Any, where: str) -> Any:
    """Return `value` as the type `hint` says, strictly; a `DataError` names the place."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, Union):
        if value is None and type(None) in arguments:
            return None
        return _parse(next(a for a in arguments if a is not type(None)), value, where)
    if origin is Literal:
        _expect(value in arguments, where, f"one of {', '.join(arguments)}", value)
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        _expect(isinstance(value, Mapping), where, "an object", value)
        hints = get_type_hints(hint)
        given, wanted = set(value), {f.name: f for f in dataclasses.fields(hint)}
        needed = {name for name, f in wanted.items() if is_required(f)}
        if missing := sorted(needed - given):
            raise DataError(f"{where} lacks {', '.join(missing)}")
        if extra := sorted(given - set(wanted)):
            raise DataError(f"{where} has unknown {', '.join(extra)}")
        return hint(**{k: _parse(hints[k], v, f"{where}.{k}") for k, v in value.items()})
    if origin is list:
        _expect(isinstance(value, list), where, "a list", value)
        return [_parse(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is tuple:
        fits = isinstance(value, list | tuple) and len(value) == len(arguments)
        _expect(fits, where, f"{len(arguments)} values", value)
        parts = zip(arguments, value, strict=True)
        return tuple(_parse(a, item, f"{where}[{i}]") for i, (a, item) in enumerate(parts))
    if origin is dict:
        _expect(isinstance(value, Mapping), where, "an object", value)
        return {k: _parse(arguments[1], item, f"{where}.{k}") for k, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    fits = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    _expect(fits, where, hint.__name__, value)
    return value


def _expect(condition: bool, where: str, wanted: str, value: Any) -> None:
    if not condition:
        raise DataError(f"{where} must be {wanted}, got {value!r:.40}; measure again")


def is_required(item: dataclasses.Field[Any]) -> bool:
    """Return whether a field has no default."""
    missing = dataclasses.MISSING
    return item.default is missing and item.default_factory is missing


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
