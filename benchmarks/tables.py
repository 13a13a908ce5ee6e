"""The report's tables, as they are shown and sorted, before any rendering."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import attribution
from benchmarks.figures import (
    NO_DIFFERENCE,
    NONE,
    difference,
    megabytes,
    number,
    score,
    signed,
    span,
    times,
)
from benchmarks.report import BenchmarkReport, Latency, Quality, SpeedUp, VariantReport
from benchmarks.summary import (
    headline,
    latency_at,
    load_streams,
    main_metric,
    metric_label,
    quality_of,
    workloads,
)


@dataclass(frozen=True)
class Cell:
    """One value in a table: as shown, and as sorted (None comes last)."""

    text: str
    key: float | str | None = None
    note: str = ""  # small print: an interval, a share

    @property
    def full(self) -> str:
        """The text with its note."""
        return f"{self.text} ({self.note})" if self.note else self.text


@dataclass(frozen=True)
class Table:
    """A table whose first column is text and whose others are figures."""

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def summary_table(report: BenchmarkReport) -> Table:
    """Return one row per variant: what to decide by."""
    place, base = headline(report), report.variant(report.baseline)
    metrics = {x.metric: metric_label(x) for v in report.variants for x in v.quality}
    rows = []
    for variant in report.variants:
        latency = latency_at(variant, place)
        cells = [Cell(variant.name, variant.name, _role(variant, base))]
        cells.append(_milliseconds(latency.typical if latency else None))
        cells.append(_speedup(latency, variant is base))
        cells.append(Cell(megabytes(variant.size_bytes), variant.size_bytes))
        cells.append(_memory(variant))
        cells += [_quality(quality_of(variant, metric)) for metric in metrics]
        rows.append(tuple(cells))
    columns = (
        "Variant",
        f"Median at {place}",
        "Speed-up",
        "Size",
        "Peak memory",
        *metrics.values(),
    )
    return Table("summary", "All variants at a glance", columns, tuple(rows))


def latency_table(report: BenchmarkReport) -> Table:
    """Return one row per workload and variant."""
    rows: list[tuple[Cell, ...]] = []
    for place in workloads(report):
        for variant in report.variants:
            x = latency_at(variant, place)
            if x is None:
                continue
            low, high = x.interval
            rows.append(
                (
                    Cell(variant.name, variant.name),
                    Cell(x.workload, float(x.batch * (x.sequence or 1)) + x.threads / 1e3),
                    Cell(number(1e3 * x.typical), x.typical, span(1e3 * low, 1e3 * high)),
                    # a percentile from fewer calls than it takes is only the slowest call
                    _milliseconds(x.p95 if x.calls >= 20 else None, unit=""),
                    _milliseconds(x.p99 if x.calls >= 100 else None, unit=""),
                    Cell(number(x.examples_per_second), x.examples_per_second),
                    _count(x.tokens_per_second),
                    _speedup(x, variant.name == report.baseline),
                    Cell(NONE if x.agreement is None else f"{x.agreement:.4f}", x.agreement),
                    Cell(str(x.calls), x.calls),
                )
            )
    columns: tuple[str, ...] = (
        *("Variant", "Input", "Time, ms", "p95, ms", "p99, ms", "Examples/s"),
        *("Tokens/s", "Speed-up", "Agreement", "Calls"),
    )
    kinds = {x.kind for variant in report.variants for x in variant.latency}
    caption = (
        "Time: the median of the calls. In parentheses: 95 % intervals. Speed-up: how many times "
        f"faster than {report.baseline}, median of the rounds; a difference is one at 99 %. Agreement: "
        f"least cosine between the timed outputs and those of {report.baseline}. p95 is given from 20 "
        "calls on, p99 from 100."
    )
    if "traffic" in kinds:
        caption += " Texts as they come: the mean of the calls, which differ in length."
    if "decoding" in kinds:
        caption += (
            " Tokens after a prompt: tokens per second count the prompt's time, and agreement is the "
            "share of tokens that are the same."
        )
    if any(x.joules for variant in report.variants for x in variant.latency):
        columns = (*columns, "Energy, J")
        rows = [(*row, energy) for row, energy in zip(rows, _energies(report), strict=True)]
    return Table("latency", caption, columns, tuple(rows))


def _energies(report: BenchmarkReport) -> list[Cell]:
    """Return the energy of a call for each row of the latency table."""
    found = (latency_at(v, place) for place in workloads(report) for v in report.variants)
    return [
        Cell(NONE if x.joules is None else number(x.joules), x.joules)
        for x in found
        if x is not None
    ]


def load_table(report: BenchmarkReport) -> Table:
    """Return one row per number of streams and variant: requests per second answered in time."""
    rows = [
        (
            Cell(variant.name, variant.name),
            Cell(str(x.streams), float(x.streams)),
            Cell(number(x.sustained), x.sustained, span(*x.interval)),
            Cell(number(x.capacity), x.capacity),
        )
        for streams in load_streams(report)
        for variant in report.variants
        for x in variant.load
        if x.streams == streams
    ]
    found = next((x for variant in report.variants for x in variant.load), None)
    what = f"a request is {found.workload}, the target {1e3 * found.target:g} ms" if found else ""
    return Table(
        "load",
        f"Requests arrive at random, whether the model is ready or not; {what}. In time: the highest "
        "rate at which 95 % are answered within the target, waiting included; in parentheses the least "
        "and the most of the rounds. Capacity: where every caller waits for the answer before.",
        ("Variant", "At once", "In time, requests/s", "Capacity, requests/s"),
        tuple(rows),
    )


def quality_table(report: BenchmarkReport) -> Table:
    """Return one row per metric and variant."""
    rows = []
    for metric in dict.fromkeys(x.metric for v in report.variants for x in v.quality):
        for variant in report.variants:
            x = quality_of(variant, metric)
            if x is None:
                continue
            interval = ""
            if x.interval is not None:
                low, high = (signed(end, x.value) for end in x.interval)
                interval = f"{low} to {high}" if low != high else ""
            change = Cell(NONE)
            if x.difference is not None and variant.name != report.baseline:
                change = Cell(difference(x), x.difference, interval)
            better = "higher" if x.higher_is_better else "lower"
            rows.append(
                (
                    Cell(variant.name, variant.name),
                    Cell(metric_label(x), x.metric),
                    Cell(score(x.value), x.value),
                    change,
                    Cell(better, better),
                )
            )
    config = report.config
    data = config.get("eval") or "no data"
    examples = next((x.examples for v in report.variants for x in v.quality), 0)
    return Table(
        "quality",
        f"Measured on {data}, {examples:,} examples. In parentheses: 95 % interval of the "
        "difference, paired by example, where the metric follows from values per example.",
        ("Variant", "Metric", "Value", f"Difference to {report.baseline}", "Better"),
        tuple(rows),
    )


def resources_table(report: BenchmarkReport) -> Table:
    """Return one row per variant: bytes on disk, in memory, and how to recognise the file."""
    base = report.variant(report.baseline)
    rows = []
    for variant in report.variants:
        share = f"{100 * variant.size_bytes / max(base.size_bytes, 1):.0f} %"
        load = variant.load_seconds
        digests = " ".join(digest[:12] for digest in variant.sha256.values())
        rows.append(
            (
                Cell(variant.name, variant.name),
                Cell(megabytes(variant.size_bytes), variant.size_bytes, share),
                _memory(variant),
                Cell(NONE if load is None else f"{number(load)} s", load),
                Cell(", ".join(variant.providers) or NONE, ", ".join(variant.providers)),
                Cell(digests or NONE, digests),
            )
        )
    columns = ("Variant", "Size", "Peak memory", "Load time", "Runs on", "sha256")
    caption = (
        f"In parentheses: share of {report.baseline}. Peak memory is the most that the process has "
        "held, its runtime and libraries included."
    )
    return Table("resources", caption, columns, tuple(rows))


def attribution_table(report: BenchmarkReport) -> Table:
    """Return one row per stage, or several at once: what it did to speed, size and quality."""
    place, metric = headline(report), main_metric(report)
    rows = []
    for step in attribution.steps(report):
        speed = _factor_cell(step.speedup(place) if place else None)
        ratio = step.variant.size_bytes / max(step.parent.size_bytes, 1)
        change = step.quality(metric)
        worth = quality_of(step.variant, metric)
        rows.append(
            (
                Cell(step.variant.name, step.variant.name),
                Cell(" → ".join(step.stages), " ".join(step.stages)),
                Cell(step.parent.name, step.parent.name),
                speed,
                Cell(f"{100 * ratio:.0f} %", ratio),
                Cell(NONE)
                if change is None or worth is None
                else Cell(signed(change, worth.value), change),
            )
        )
    quality_heading = (metric or "quality").replace("_", " ")
    return Table(
        "attribution",
        f"Each variant against the one it was made from, at {place}. In parentheses: 95 % intervals.",
        ("Variant", "Stage", "Made from", "Faster by", "Size left", f"Change of {quality_heading}"),
        tuple(rows),
    )


def operators_table(report: BenchmarkReport) -> Table:
    """Return one row per variant and operator: what it takes of a run, the costliest first."""
    rows = []
    for variant in report.variants:
        whole = sum(variant.operators.values())
        for operator, seconds in shown_operators(variant.operators):
            share = seconds / whole if whole else 0.0
            rows.append(
                (
                    Cell(variant.name, variant.name),
                    Cell(operator, operator),
                    Cell(f"{number(1e3 * seconds)} ms", seconds),
                    Cell(f"{100 * share:.0f} %", share),
                )
            )
    where = []
    for variant in report.variants:
        if variant.placed:
            nodes = ", ".join(f"{count} on {name}" for name, count in variant.placed.items())
            where.append(f"{variant.name}: {nodes}, {variant.copies} copies between devices")
    return Table(
        "operators",
        f"Of one run at {headline(report)}, profiled apart from the timing. Nodes: {'; '.join(where)}.",
        ("Variant", "Operator", "Time", "Share"),
        tuple(rows),
    )


def shown_operators(operators: dict[str, float], most: int = 6) -> list[tuple[str, float]]:
    """Return the costliest operators and what all others come to."""
    ordered = sorted(operators.items(), key=lambda pair: -pair[1])
    rest = sum(seconds for _, seconds in ordered[most:])
    return ordered[:most] + ([("others", rest)] if rest else [])


def history_table(reports: Sequence[BenchmarkReport]) -> Table:
    """Return one row per report, in their order: what each variant of the last one was in it.

    Cells are the speed-up at the last report's headline, or its time where a report has no factor.
    """
    last = reports[-1]
    place, metric = headline(last), main_metric(last)
    rows = []
    for report in reports:
        cells = [Cell(report.created[:16].replace("T", " "), report.created)]
        for variant in last.variants:
            then = report.find(variant.name)
            latency = latency_at(then, place) if then else None
            quality = quality_of(then, metric) if then else None
            note = "" if quality is None else score(quality.value)
            if latency is None:
                cells.append(Cell(NONE, None, note))
            elif latency.speedup is None:
                cells.append(Cell(f"{number(1e3 * latency.typical)} ms", latency.typical, note))
            else:
                cells.append(Cell(times(latency.speedup.value), latency.speedup.value, note))
        rows.append(tuple(cells))
    shown = "" if metric is None else f" In parentheses: {metric.replace('_', ' ')}."
    caption = f"At {place}: how many times faster than the baseline of the same report.{shown}"
    return Table("history", caption, ("Report", *(v.name for v in last.variants)), tuple(rows))


def environment_rows(report: BenchmarkReport) -> list[tuple[str, str]]:
    """Return the conditions of the measurement as (name, value)."""
    here, config = report.environment, report.config
    rows = [
        ("Processor", f"{here.cpu}, {here.cores} cores usable"),
        ("Threads", f"{' and '.join(map(str, config.get('threads') or [here.threads]))} per model"),
        ("Memory", f"{here.memory_bytes / 1e9:.0f} GB"),
        ("Provider", here.provider),
        ("GPU", here.gpu),
        ("System", here.system),
        ("Python", here.python),
        ("Packages", ", ".join(f"{name} {version}" for name, version in here.versions.items())),
        ("Load before", None if here.load_average is None else str(here.load_average)),
        (
            "Method",
            f"{config.get('rounds')} rounds of {config.get('seconds')} s at least, and more until "
            f"{100 * config.get('precision', 0):g} % precise or {config.get('max_time')} s are over; "
            "variants interleaved in shuffled order, one process each, warm-up until times settle, "
            f"seed {config.get('seed')}",
        ),
        ("Measured", report.created),
    ]
    return [(name, value) for name, value in rows if value]


# --- cells ---------------------------------------------------------------------------------------


def _role(variant: VariantReport, base: VariantReport) -> str:
    if variant.status == "failed":
        return "failed"
    return "baseline" if variant is base else ""


def _speedup(latency: Latency | None, is_baseline: bool) -> Cell:
    if latency is None:
        return Cell(NONE)
    if is_baseline and latency.speedup is None:
        return Cell("1 ×", 1.0)
    return _factor_cell(latency.speedup)


def _factor_cell(speedup: SpeedUp | None) -> Cell:
    if speedup is None:
        return Cell(NONE)
    text = times(speedup.value) if speedup.different else NO_DIFFERENCE
    return Cell(text, speedup.value, span(*speedup.interval))


def _milliseconds(seconds: float | None, unit: str = " ms") -> Cell:
    return Cell(NONE if seconds is None else number(1e3 * seconds) + unit, seconds)


def _memory(variant: VariantReport) -> Cell:
    peak, held = variant.peak_memory_bytes, variant.device_memory_bytes
    note = "" if held is None else f"{megabytes(held)} on the GPU"
    return Cell(NONE if peak is None else megabytes(peak), peak, note)


def _quality(quality: Quality | None) -> Cell:
    if quality is None:
        return Cell(NONE)
    changed = quality.difference is not None and quality.difference != 0
    return Cell(score(quality.value), quality.value, difference(quality) if changed else "")


def _count(value: float | None) -> Cell:
    return Cell(NONE if value is None else number(value), value)
