"""Two reports of the same variants: what became slower, larger or worse, beyond threshold and noise."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.report import BenchmarkReport, Interval, Latency, Quality, VariantReport
from calib_data.errors import ConfigError, OnnxPressError

KINDS = ("latency", "size", "memory", "quality")


class RegressionError(OnnxPressError):
    """A variant became worse than it may."""

    exit_code = 7


@dataclass(frozen=True)
class Change:
    """How one figure of one variant changed; worse is above zero."""

    variant: str
    kind: str  # one of KINDS
    what: str  # the figure as people call it: 8 × 128, spearman
    old: float
    new: float
    worse: float  # a share of the old figure
    interval: Interval | None  # of `worse`, 95 % and more; None where the figure has no noise
    regression: bool


@dataclass(frozen=True)
class Comparison:
    """What changed from one report to another."""

    changes: tuple[Change, ...]
    missing: tuple[str, ...]  # what the old report measured and the new one does not
    notes: tuple[str, ...]  # what was not compared, and why

    @property
    def regressions(self) -> tuple[str, ...]:
        """What became worse than it may, one line each."""
        found = [f"{x.variant}: {describe(x)}" for x in self.changes if x.regression]
        return (*found, *self.missing)

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as JSON-able values."""
        return {
            "changes": [vars(change) for change in self.changes],
            "missing": list(self.missing),
            "notes": list(self.notes),
            "regressions": list(self.regressions),
        }


def compare(
    old: BenchmarkReport, new: BenchmarkReport, thresholds: Mapping[str, float]
) -> Comparison:
    """Return what changed; a regression is above its kind's threshold, and all of its interval above 0.

    Times are compared as ratios to the baseline where both reports have the same one, for these hold
    on a machine that is busier or slower today; otherwise, and for the baseline itself, as times, and
    only on the same processor with as many threads.
    """
    same_machine = _conditions(old) == _conditions(new)
    changes: list[Change] = []
    missing: list[str] = []
    timeless: list[str] = []
    found = {variant.name: variant for variant in new.variants}
    for before in old.variants:
        if before.status != "ok":
            continue
        after = found.get(before.name)
        if after is None or after.status != "ok":
            why = "is missing" if after is None else f"fails: {after.reason}"
            missing.append(f"{before.name} {why}")
            continue
        missing += _gone(before, after)
        for change in _changes(before, after, old.baseline == new.baseline, same_machine):
            above = change.worse > thresholds[change.kind]
            certain = change.interval is None or change.interval[0] > 0
            changes.append(replace(change, regression=above and certain))
        if not same_machine and not _has_ratios(before, after, old.baseline == new.baseline):
            timeless.append(before.name)
    notes = []
    if timeless:
        notes.append(
            f"the times of {', '.join(timeless)} are not compared: the processor or the number of "
            "threads is another"
        )
    return Comparison(tuple(changes), tuple(missing), tuple(notes))


def parse_thresholds(texts: Sequence[str]) -> dict[str, float]:
    """Return what `--fail-on` says by kind: `5%` for all, `quality=0.5%` for one.

    Raises `ConfigError` for what is neither.
    """
    found: dict[str, float] = {}
    default = None
    for text in texts:
        name, equals, value = text.rpartition("=")
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", value.strip())
        if match is None or (equals and name not in KINDS):
            raise ConfigError(
                f"--fail-on must be as 5%, or as quality=0.5% with one of {', '.join(KINDS)}, "
                f"got {text}"
            )
        share = float(match[1]) / (100 if match[2] else 1)
        if equals:
            found[name] = share
        else:
            default = share
    return {kind: found.get(kind, 0.05 if default is None else default) for kind in KINDS}


def describe(change: Change) -> str:
    """Return a change in words: 8 × 128 12.3 % slower (+11.0 to +13.5)."""
    percent = f"{100 * abs(change.worse):.1f} %"
    if percent == "0.0 %":
        return f"{change.what} unchanged"
    direction = "worse" if change.worse > 0 else "better"
    if change.kind in ("size", "memory"):
        direction = "more" if change.worse > 0 else "less"
    elif change.kind == "latency":
        direction = "slower" if change.worse > 0 else "faster"
    text = f"{change.what} {percent} {direction}"
    if change.interval is not None:
        low, high = (100 * end for end in change.interval)
        text += f" ({low:+.1f} to {high:+.1f})".replace("-", "−")
    return text


def _conditions(report: BenchmarkReport) -> tuple[str, int, str, str | None]:
    here = report.environment
    return here.cpu, here.threads, here.provider, here.gpu


def _has_ratios(before: VariantReport, after: VariantReport, same_baseline: bool) -> bool:
    return same_baseline and all(x.speedup for v in (before, after) for x in v.latency)


def _gone(before: VariantReport, after: VariantReport) -> list[str]:
    """Return which times and metrics of a variant are no longer measured: silence is no good news."""
    now = {x.workload for x in after.latency} | {x.metric for x in after.quality}
    was = [x.workload for x in before.latency] + [x.metric for x in before.quality]
    return [f"{before.name} has no {name} any more" for name in was if name not in now]


def _changes(
    before: VariantReport, after: VariantReport, same_baseline: bool, same_machine: bool
) -> Iterator[Change]:
    """Yield every change that can be told of a variant, not yet judged."""

    def change(
        kind: str, what: str, old: float, new: float, worse: float, interval: Interval | None
    ) -> Change:
        return Change(before.name, kind, what, old, new, worse, interval, False)

    later = {latency.workload: latency for latency in after.latency}
    for old in before.latency:
        if (new := later.get(old.workload)) is None:
            continue
        slower = _slower(old, new, same_baseline, same_machine)
        if slower is not None:
            yield change("latency", old.workload, old.typical, new.typical, *slower)
    for kind, what, was, now in (
        ("size", "size", before.size_bytes, after.size_bytes),
        ("memory", "peak memory", before.peak_memory_bytes, after.peak_memory_bytes),
    ):
        if was and now is not None:
            yield change(kind, what, was, now, now / was - 1, None)
    judged = {quality.metric: quality for quality in after.quality}
    for metric in before.quality:
        if (other := judged.get(metric.metric)) is not None and metric.value:
            worse, interval = _worse(metric, other)
            yield change("quality", metric.metric, metric.value, other.value, worse, interval)


def _slower(
    old: Latency, new: Latency, same_baseline: bool, same_machine: bool
) -> tuple[float, Interval] | None:
    """Return by which share a variant became slower, with the widest interval the two allow."""
    if same_baseline and old.speedup and new.speedup:
        (low, high), (later_low, later_high) = old.speedup.interval, new.speedup.interval
        worse = old.speedup.value / new.speedup.value - 1
        return worse, (low / later_high - 1, high / later_low - 1)
    if not same_machine:
        return None
    (low, high), (later_low, later_high) = old.interval, new.interval
    return new.typical / old.typical - 1, (later_low / high - 1, later_high / low - 1)


def _worse(old: Quality, new: Quality) -> tuple[float, Interval | None]:
    """Return by which share of itself a metric became worse.

    The noise is that of the differences to the baseline, which both reports measure on the same data;
    a metric without intervals is what it is.
    """
    sign = -1 if old.higher_is_better else 1
    scale = abs(old.value)
    worse = sign * (new.value - old.value) / scale
    widths = [(x.interval[1] - x.interval[0]) / 2 for x in (old, new) if x.interval is not None]
    if not widths:
        return worse, None
    noise = sum(widths) / scale
    return worse, (worse - noise, worse + noise)
