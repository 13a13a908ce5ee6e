"""`benchmark report`."""

import shlex
import sys
from pathlib import Path

import click

from onnxpress.cli.options import (
    Group,
    Output,
    columns_option,
    common,
    out_option,
    provider_option,
)
from onnxpress.stages import ReportChoice, Run, report_bundles
from onnxpress.target import parse_shapes


@click.group(cls=Group)
def benchmark_group() -> None:
    """Measure finished graphs."""


@benchmark_group.command("report")
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...")
@click.option("--baseline", help="A model to compare with, measured in PyTorch.")
@click.option("--eval", "evaluation", help="Data to measure quality on.")
@columns_option
@click.option("--limit", type=int, help="Use at most this many examples of the data.")
@click.option("--metric", "metrics", multiple=True, help="Instead of what task and data allow.")
@provider_option
@click.option("--threads", type=int, help="Per model; by default all cores.")
@click.option("--shapes", default="1x32,8x128", show_default=True, help="Batch x length, …")
@click.option("--rounds", type=int, default=10, show_default=True, help="Interleaved rounds.")
@click.option("--title", help="Of the report.")
@out_option
@common
def report_command(
    bundles: tuple[str, ...],
    baseline: str | None,
    evaluation: str | None,
    columns: str | None,
    limit: int | None,
    metrics: tuple[str, ...],
    provider: str,
    threads: int | None,
    shapes: str,
    rounds: int,
    title: str | None,
    out: Path,
    run: Run,
    output: Output,
) -> None:
    """Compare BUNDLEs, and a PyTorch baseline, in latency, size and quality.

    A BUNDLE is a directory, or name=directory to say what the report calls it.
    """
    settings = {
        "shapes": parse_shapes(shapes),
        "rounds": rounds,
        "threads": threads,
        "provider": provider,
        "eval": evaluation,
        "columns": columns,
        "limit": limit,
        "metrics": metrics,
    }
    choice = ReportChoice(
        bundles=tuple(_named(text) for text in bundles),
        baseline=baseline,
        title=title,
        command=shlex.join(["onnxpress", "benchmark", "report", *_arguments()]),
        config=settings,
    )
    report_bundles(choice, out, run)
    show_report(out, output)


def show_report(directory: Path, output: Output) -> None:
    """Print a finished report: its JSON, or the table and where the page lies."""
    from benchmarks.render import render_table
    from benchmarks.report import read_report

    if output.as_json:
        click.echo((directory / "report.json").read_text(encoding="utf-8"))
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(render_table(read_report(directory / "report.json")))
    click.echo(f"{directory / 'report.html'}")


def _named(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    return (name, path) if equals else (Path(text).name or text, text)


def _arguments() -> list[str]:
    """Return this command's own arguments as typed; absolute paths by their last part."""
    words = sys.argv[sys.argv.index("report") + 1 :] if "report" in sys.argv else []
    return [Path(word).name if word.startswith("/") else word for word in words]
