"""What a report says in words, and what of it matters most: shared by all formats."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.figures import (
    NO_DIFFERENCE,
    difference,
    factor,
    megabytes,
    score,
    times,
    uncertainty,
)
from benchmarks.report import BenchmarkReport, Latency, Quality, VariantReport

UNRELATED = 0.5  # a cosine below this: the outputs have little to do with the baseline's


@dataclass(frozen=True)
class TrainingStage:
    """A stage that trained: its name, its loss curve, and the variants that came out of it."""

    name: str
    curve: tuple[tuple[float, float], ...]  # (steps done, mean loss since the point before)
    variants: tuple[str, ...]


def training_stages(report: BenchmarkReport) -> list[TrainingStage]:
    """Return the stages whose lineage entry holds a loss curve, each once, in order."""
    found: dict[tuple[str, tuple[tuple[float, float], ...]], list[str]] = {}
    for variant in report.variants:
        for entry in variant.lineage:
            metrics = entry.get("metrics")
            pairs = metrics.get("curve") if isinstance(metrics, dict) else None
            if pairs:
                curve = tuple((float(step), float(loss)) for step, loss in pairs)
                found.setdefault((str(entry.get("stage")), curve), []).append(variant.name)
    return [TrainingStage(name, curve, tuple(v)) for (name, curve), v in found.items()]


# --- what matters --------------------------------------------------------------------------------


def headline(report: BenchmarkReport) -> str | None:
    """Return the label of the largest workload that was measured, or None."""
    measured = [latency for variant in report.variants for latency in variant.latency]
    measured = [latency for latency in measured if latency.kind == "shape"] or measured
    largest = max(measured, key=_extent, default=None)
    return largest.workload if largest else None


def _extent(latency: Latency) -> tuple[int, int]:
    return latency.threads, latency.batch * (latency.sequence or 1)


def workloads(report: BenchmarkReport) -> list[str]:
    """Return the labels of all workloads, in the order they were measured."""
    return list(dict.fromkeys(x.workload for variant in report.variants for x in variant.latency))


def load_streams(report: BenchmarkReport) -> list[int]:
    """Return the numbers of requests answered at once that were measured."""
    return list(dict.fromkeys(x.streams for variant in report.variants for x in variant.load))


def latency_at(variant: VariantReport, workload: str | None) -> Latency | None:
    """Return a variant's times on one workload, or None where there are none."""
    return next((x for x in variant.latency if x.workload == workload), None)


def main_metric(report: BenchmarkReport) -> str | None:
    """Return the first metric that was measured, or None."""
    return next((x.metric for variant in report.variants for x in variant.quality), None)


def quality_of(variant: VariantReport, metric: str | None) -> Quality | None:
    """Return a variant's figure for one metric, or None."""
    return next((x for x in variant.quality if x.metric == metric), None)


def metric_label(quality: Quality) -> str:
    """Return a metric's name as a heading: spearman × 100, cosine fidelity, accuracy in %."""
    name = quality.metric.replace("_", " ")
    return f"{name} in %" if quality.unit == "%" else f"{name} {quality.unit}".strip()


def best(report: BenchmarkReport) -> VariantReport | None:
    """Return the variant furthest ahead of the baseline at the headline, or None.

    One whose outputs have nothing to do with the baseline's cannot be it, however fast.
    """
    place = headline(report)
    candidates = []
    for variant in report.variants:
        latency = latency_at(variant, place)
        related = latency is not None and _likeness(variant, latency)[0] >= UNRELATED
        if variant.status == "ok" and latency is not None and latency.speedup and related:
            faster = latency.speedup
            # what is proven to be faster comes before what may be
            candidates.append((faster.different and faster.value > 1, faster.value, variant))
    return max(candidates, key=lambda row: row[:2], default=(False, 0.0, None))[2]


def verdict(report: BenchmarkReport) -> str:
    """Return the finding in one sentence."""
    place, winner = headline(report), best(report)
    base = report.variant(report.baseline)
    if winner is None:
        if base.status == "failed":
            return f"The baseline {base.name} could not be measured, so nothing is compared"
        others = [variant for variant in report.variants if variant is not base]
        if not others:
            return f"{base.name} was measured alone"
        return f"No variant could be compared with {base.name}: see the reasons below"
    latency = latency_at(winner, place)
    assert latency is not None
    assert latency.speedup is not None
    speedup = latency.speedup
    if not speedup.different:
        speed = f"{winner.name} is as fast as {base.name} at {place}"
    elif speedup.value > 1:
        speed = f"{winner.name} is {factor(speedup.value)} faster than {base.name} at {place}"
    else:
        slower = factor(1 / speedup.value)
        speed = (
            f"No variant is faster than {base.name}: {winner.name} is {slower} slower at {place}"
        )
    quality = quality_of(winner, main_metric(report))
    tail = ""
    if quality is not None and quality.difference is not None:
        sure = ""
        if quality.interval is not None and quality.difference:
            sure = f" {uncertainty(quality)}"
        change = difference(quality, short=True)
        tail = f"; {quality.metric.replace('_', ' ')} {change}{sure}"
    return f"{speed} and {size_against(winner, base)}{tail}"


def size_against(variant: VariantReport, base: VariantReport) -> str:
    """Return how the sizes compare: 3.8 × smaller."""
    ratio = base.size_bytes / max(variant.size_bytes, 1)
    if abs(ratio - 1) < 0.02:
        return "of the same size"
    return f"{times(ratio, 2)} smaller" if ratio > 1 else f"{times(1 / ratio, 2)} larger"


def highlights(report: BenchmarkReport) -> list[tuple[str, str]]:
    """Return up to three (figure, what it is) about the best variant."""
    winner, base = best(report), report.variant(report.baseline)
    latency = latency_at(winner, headline(report)) if winner else None
    if winner is None or latency is None or latency.speedup is None:
        return []
    found = [
        (factor(latency.speedup.value), f"the speed of {base.name} at {latency.workload}"),
        (megabytes(winner.size_bytes), f"on disk; {base.name} has {megabytes(base.size_bytes)}"),
    ]
    if not latency.speedup.different:
        found[0] = (NO_DIFFERENCE, f"in speed to {base.name} at {latency.workload}")
    quality = quality_of(winner, main_metric(report))
    if quality is not None:
        change = "" if quality.difference is None else f"; {difference(quality)} to {base.name}"
        found.append((score(quality.value), f"{metric_label(quality)}{change}"))
    return found


def _likeness(variant: VariantReport, latency: Latency) -> tuple[float, str]:
    """Return the cosine of a variant's outputs to the baseline's, and of what, in words.

    Of real texts, if there were some: shapes are timed on random tokens, to which a model that learned
    from real texts may well answer otherwise.
    """
    real = quality_of(variant, "cosine_fidelity")
    if real is not None:
        return real.value, f"{real.value:.2f} on the data"
    least = latency.agreement or 0
    return least, f"down to {least:.2f} at {latency.workload}"


def notes(report: BenchmarkReport) -> list[str]:
    """Return what a reader must know before trusting the figures."""
    found = [
        f"{variant.name} could not be measured: {variant.reason}"
        for variant in report.variants
        if variant.status == "failed"
    ]
    for variant in report.variants:
        # equal generated tokens are another matter: one that differs makes all after it differ
        compared = [x for x in variant.latency if x.kind != "decoding" and x.agreement is not None]
        least = min(compared, key=lambda x: x.agreement or 0, default=None)
        cosine, told = (1.0, "") if least is None else _likeness(variant, least)
        if cosine < UNRELATED:
            found.append(
                f"The outputs of {variant.name} have little to do with the baseline's (cosine {told})"
            )
        unknown = variant.latency and all(x.agreement is None for x in variant.latency)
        if unknown and not variant.quality and report.variant(report.baseline).latency:
            found.append(
                f"No output of {variant.name} can be compared with one of {report.baseline}: whether it "
                "computes the same is not known"
            )
    found += _noise(report)
    environment = report.environment
    if environment.load_average is not None and environment.load_average > environment.cores / 2:
        found.append(
            f"The machine was busy before the start: load {environment.load_average} on "
            f"{environment.cores} cores. Ratios hold better than absolute times"
        )
    return found


def _noise(report: BenchmarkReport) -> list[str]:
    """Return how many of the figures are less sure than they should be, and whose."""
    found = []
    rows = [(variant.name, x) for variant in report.variants for x in variant.latency]
    factors = [(name, x) for name, x in rows if x.speedup] or rows
    if noisy := [name for name, x in factors if not x.precise]:
        found.append(
            f"The machine was too noisy for the asked precision of {_count_of(noisy, factors)} "
            f"figures ({_whose(noisy)}): see the intervals, or raise --max-time"
        )
    if restless := [name for name, x in rows if not x.settled]:
        found.append(
            f"{_count_of(restless, rows)} times had not settled when warm-up ended "
            f"({_whose(restless)}): the machine is noisy, or the model slow to start"
        )
    return found


def _count_of(some: Sequence[object], all_of_them: Sequence[object]) -> str:
    return f"{len(some)} of {len(all_of_them)}"


def _whose(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(names))
