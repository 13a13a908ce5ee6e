"""The report for people: Markdown, one HTML page, a table for the terminal."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import summary
from benchmarks.report import BenchmarkReport
from benchmarks.summary import Table

if TYPE_CHECKING:
    from rich.table import Table as RichTable


def write_report(report: BenchmarkReport, directory: Path) -> None:
    """Write report.json, report.md and report.html into an existing directory."""
    files = {
        "report.json": json.dumps(report.to_json(), ensure_ascii=False, allow_nan=False) + "\n",
        "report.md": render_markdown(report),
        "report.html": render_html(report),
    }
    for name, content in files.items():
        (Path(directory) / name).write_text(content, encoding="utf-8")


def render_html(report: BenchmarkReport) -> str:
    """Return the report as one page that loads nothing from anywhere."""
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
        scatters={name: plot for name, plot in scatters.items() if plot is not None},
        lineages=[(v.name, summary.lineage_chain(v)) for v in report.variants],
        environment=summary.environment_rows(report),
        data=report.to_json(),
    )


_WIDTHS = {"wide": 760, "narrow": 350}  # pixels; the page shows the one that fits


def render_markdown(report: BenchmarkReport) -> str:
    """Return the report as Markdown that pastes into a pull request."""
    parts = [f"# {_escape(report.title)}", f"**{_escape(summary.verdict(report))}.**"]
    if notes := summary.notes(report):
        parts.append("\n".join(f"- {_escape(note)}." for note in notes))
    titles = {"latency": "Latency", "quality": "Quality", "resources": "Size and memory"}
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
            + " → ".join(
                _escape(f"{stage} ({settings})" if settings else stage)
                for stage, settings in summary.lineage_chain(variant)
            )
            for variant in report.variants
        )
    )
    parts.append("## Environment")
    rows = summary.environment_rows(report)
    parts.append("\n".join(f"- {name}: {_escape(value)}" for name, value in rows))
    if report.command:
        parts.append(f"Repeat it:\n\n    {' '.join(report.command.split())}")
    return "\n\n".join(parts) + "\n"


def render_table(report: BenchmarkReport) -> "RichTable":
    """Return the summary as a table for the terminal."""
    from rich.table import Table as RichTable
    from rich.text import Text

    table = summary.summary_table(report)
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
        summary.summary_table(report),
        summary.latency_table(report),
        summary.quality_table(report),
        summary.resources_table(report),
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
