"""The report for people and their tools: Markdown, CSV, one HTML page, a table for the terminal."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import lineage, summary, tables
from benchmarks.report import BenchmarkReport, Interval, VariantReport
from benchmarks.tables import Table

if TYPE_CHECKING:
    from rich.table import Table as RichTable


def write_report(
    report: BenchmarkReport, directory: Path, earlier: Sequence[BenchmarkReport] = ()
) -> None:
    """Write report.json, .md, .csv and .html into an existing directory.

    `earlier` reports, oldest first, draw a trend.
    """
    files = {
        "report.json": json.dumps(report.to_json(), ensure_ascii=False, allow_nan=False) + "\n",
        "report.md": render_markdown(report),
        "report.csv": render_csv(report),
        "report.html": render_html(report, earlier),
    }
    for name, content in files.items():
        (Path(directory) / name).write_text(content, encoding="utf-8")


def render_html(report: BenchmarkReport, earlier: Sequence[BenchmarkReport] = ()) -> str:
    """Return the report as one page that loads nothing from anywhere.

    Where there are `earlier` reports, oldest first, it shows how this one's variants have changed.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    from benchmarks import plots

    environment = Environment(
        loader=PackageLoader("benchmarks"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["drawing"] = lambda plot: Markup(plot.svg)  # matplotlib escapes its text
    scatters = {name: plots.quality_plot(report, width) for name, width in _WIDTHS.items()}
    operators = {name: plots.operator_plot(report, width) for name, width in _WIDTHS.items()}
    winner = summary.best(report)
    environment.globals["winner"] = winner.name if winner else None  # macros see only globals
    return environment.get_template("report.html.j2").render(
        report=report,
        verdict=summary.verdict(report),
        highlights=summary.highlights(report),
        notes=summary.notes(report),
        headline=summary.headline(report),
        tables={table.name: table for table in _tables(report)},
        latency=plots.latency_plots(report),
        resources=plots.resource_plots(report),
        training=plots.training_plots(report),
        operators={name: plot for name, plot in operators.items() if plot is not None},
        load=plots.load_plots(report),
        trends=plots.trend_plots([*earlier, report]),
        history=tables.history_table([*earlier, report]),
        scatters={name: plot for name, plot in scatters.items() if plot is not None},
        lineage=lineage.tree(report.variants),
        environment=tables.environment_rows(report),
        data=report.to_json(),
    )


_WIDTHS = {"wide": 760, "narrow": 350}  # pixels; the page shows the one that fits


def render_markdown(report: BenchmarkReport) -> str:
    """Return the report as Markdown that pastes into a pull request."""
    parts = [f"# {_escape(report.title)}", f"**{_escape(summary.verdict(report))}.**"]
    if notes := summary.notes(report):
        parts.append("\n".join(f"- {_escape(note)}." for note in notes))
    titles = {
        "latency": "Latency",
        "load": "Requests in time",
        "quality": "Quality",
        "resources": "Size and memory",
        "attribution": "What each stage did",
        "operators": "Time by operator",
    }
    for table in _tables(report):
        if not table.rows:
            continue
        if table.name in titles:
            parts.append(f"## {titles[table.name]}")
        parts.append(_markdown_table(table))
        if table.name != "summary":
            parts.append(_escape(table.caption))
    parts.append("## Lineage")
    parts.append(
        "\n".join(
            f"- **{_escape(variant.name)}**: "
            + " → ".join(_escape(stage) for stage in _stages(variant))
            for variant in report.variants
        )
    )
    parts.append("## Environment")
    rows = tables.environment_rows(report)
    parts.append("\n".join(f"- {name}: {_escape(value)}" for name, value in rows))
    if report.command:
        parts.append(f"Repeat it:\n\n    {' '.join(report.command.split())}")
    return "\n\n".join(parts) + "\n"


def _stages(variant: VariantReport) -> Iterator[str]:
    for entry in variant.lineage:
        stage, settings = str(entry.get("stage", "stage")), lineage.settings(entry)
        yield f"{stage} ({settings})" if settings else stage


def render_csv(report: BenchmarkReport) -> str:
    """Return every figure as a line: whose, what, at which workload, its interval and its unit."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("variant", "quantity", "workload", "value", "low", "high", "unit"))
    for variant in report.variants:
        for quantity, workload, value, interval, unit in _figures(variant):
            if value is not None:
                writer.writerow((variant.name, quantity, workload, value, *interval, unit))
    return file.getvalue()


_NO_INTERVAL = ("", "")
_Figure = tuple[str, str, float | None, Interval | tuple[str, str], str]


def _figures(variant: VariantReport) -> Iterator[_Figure]:
    """Yield (quantity, workload, value, interval, unit) of all that was measured of a variant."""
    yield "size", "", variant.size_bytes, _NO_INTERVAL, "bytes"
    yield "peak memory", "", variant.peak_memory_bytes, _NO_INTERVAL, "bytes"
    yield "device memory", "", variant.device_memory_bytes, _NO_INTERVAL, "bytes"
    yield "load time", "", variant.load_seconds, _NO_INTERVAL, "s"
    for x in variant.latency:
        at = x.workload
        yield "typical", at, x.typical, x.interval, "s"
        yield "p50", at, x.p50, _NO_INTERVAL, "s"
        yield "p95", at, x.p95, _NO_INTERVAL, "s"
        yield "p99", at, x.p99, _NO_INTERVAL, "s"
        yield "throughput", at, x.examples_per_second, _NO_INTERVAL, "examples/s"
        yield "throughput", at, x.tokens_per_second, _NO_INTERVAL, "tokens/s"
        if x.speedup is not None:
            yield "speed-up", at, x.speedup.value, x.speedup.interval, "×"
        yield "energy", at, x.joules, _NO_INTERVAL, "J"
        unit = "share of tokens" if x.kind == "decoding" else "cosine"
        yield "agreement", at, x.agreement, _NO_INTERVAL, unit
    for load in variant.load:
        at = f"{load.workload}, {load.streams} at once"
        yield "requests in time", at, load.sustained, load.interval, "1/s"
        yield "capacity", at, load.capacity, _NO_INTERVAL, "1/s"
    for quality in variant.quality:
        yield quality.metric, "", quality.value, _NO_INTERVAL, quality.unit
        interval = quality.interval or _NO_INTERVAL
        yield f"{quality.metric}, difference", "", quality.difference, interval, quality.unit


def render_table(report: BenchmarkReport) -> "RichTable":
    """Return the summary as a table for the terminal."""
    from rich.table import Table as RichTable
    from rich.text import Text

    table = tables.summary_table(report)
    # As text, for rich would read [red] in a variant's name as markup.
    verdict = Text(summary.verdict(report), style="bold")
    drawn = RichTable(title=verdict, title_justify="left", caption_justify="left")
    for i, column in enumerate(table.columns):
        drawn.add_column(Text(column), justify="right" if i else "left", overflow="fold")
    for row in table.rows:
        shown = (f"{cell.text}\n{cell.note}".strip() for cell in row)  # 80 columns are few
        drawn.add_row(*(Text(text) for text in shown))
    if notes := summary.notes(report):
        drawn.caption = Text("\n".join(notes))
    return drawn


def _tables(report: BenchmarkReport) -> list[Table]:
    return [
        tables.summary_table(report),
        tables.latency_table(report),
        tables.load_table(report),
        tables.quality_table(report),
        tables.resources_table(report),
        tables.attribution_table(report),
        tables.operators_table(report),
    ]


def _markdown_table(table: Table) -> str:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    rule = [":--"] + ["--:"] * (len(table.columns) - 1)
    lines = [line(map(_escape, table.columns)), line(rule)]
    lines += [line(_escape(cell.full) for cell in row) for row in table.rows]
    return "\n".join(lines)


def _escape(text: str) -> str:
    """Return text that Markdown shows as it is, in a table cell too."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    for character in "\\`*_[]|":
        text = text.replace(character, f"\\{character}")
    return text
