"""`benchmark report` and `benchmark compare`."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from calib_data.errors import ConfigError
from onnxpress.cli.options import (
    Group,
    Output,
    columns_option,
    common,
    out_option,
)
from onnxpress.processor import warn_where_inexact
from onnxpress.stages import ALSO, ReportChoice, Run, redraw_reports, report_bundles
from onnxpress.target import parse_shapes

if TYPE_CHECKING:
    from benchmarks.compare import Comparison


@click.group(cls=Group)
def benchmark_group() -> None:
    """Measure finished graphs, and compare what was measured."""


@benchmark_group.command("report")
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...")
@click.option("--baseline", help="A model to compare with, measured in PyTorch.")
@click.option(
    "--also", multiple=True, type=click.Choice(ALSO),
    help="The baseline by torch.compile as well, or as PyTorch's exporter writes it.",
)  # fmt: skip
@click.option("--eval", "evaluation", help="Data to measure quality on.")
@columns_option
@click.option("--limit", type=int, help="Use at most this many examples of the data.")
@click.option("--metric", "metrics", multiple=True, help="Instead of what task and data allow.")
@click.option(
    "--provider", type=click.Choice(["cpu", "cuda", "tensorrt"]), default="cpu", show_default=True,
    help="Execution provider; not obtaining it is an error.",
)  # fmt: skip
@click.option(
    "--transfers", is_flag=True, help="On a GPU, time the way from and to the host as well."
)
@click.option(
    "--cuda-graphs", is_flag=True, help="Record each input's kernels, launch them together."
)
@click.option("--threads", default="", help="Per model, as in 1,2; by default all cores.")
@click.option("--streams", default="", help="Requests answered at once, as in 1,2.")
@click.option(
    "--target-latency", "target", type=float, metavar="MS",
    help="With --streams: how many requests per second are answered in this time.",
)  # fmt: skip
@click.option("--shapes", default="1x32,8x128", show_default=True, help="Batch x length, …")
@click.option("--traffic", help="Texts to measure as they come, in the batch sizes of --shapes.")
@click.option("--traffic-columns", help="As --columns, for --traffic.")
@click.option(
    "--prompts", default="", help="Lengths of prompts that decoding starts from, as in 32,256."
)
@click.option("--new-tokens", type=int, default=32, show_default=True, help="After each prompt.")
@click.option(
    "--rounds", type=int, default=12, show_default=True, help="Interleaved rounds, at least."
)
@click.option(
    "--precision", type=float, default=0.03, show_default=True,
    help="Half of a speed-up's interval, as a share of it, that ends the rounds.",
)  # fmt: skip
@click.option(
    "--max-time", type=float, default=300, show_default=True,
    help="Seconds that rounds may take on a machine too noisy for --precision.",
)  # fmt: skip
@click.option("--title", help="Of the report.")
@out_option
@common
def report_command(
    bundles: tuple[str, ...],
    baseline: str | None,
    also: tuple[str, ...],
    evaluation: str | None,
    columns: str | None,
    limit: int | None,
    metrics: tuple[str, ...],
    provider: str,
    transfers: bool,
    cuda_graphs: bool,
    threads: str,
    streams: str,
    target: float | None,
    shapes: str,
    traffic: str | None,
    traffic_columns: str | None,
    prompts: str,
    new_tokens: int,
    rounds: int,
    precision: float,
    max_time: float,
    title: str | None,
    out: Path,
    run: Run,
    output: Output,
) -> None:
    """Compare BUNDLEs, and a PyTorch baseline, in latency, size and quality.

    A BUNDLE is a directory, or an .onnx file by any tool, or name=BUNDLE to say what the report calls
    it. A report.json made before adds to the trend; of those alone, the newest is drawn again and
    nothing is measured.
    """
    past = tuple(Path(text) for text in bundles if text.endswith(".json"))
    if len(past) == len(bundles):
        _refuse_settings({"bundles", "title", "out", "as_json", "overwrite", "verbose"})
        redraw_reports(past, title, out, run)
        show_report(out, output)
        return
    settings = {
        "shapes": parse_shapes(shapes),
        "traffic": traffic,
        "traffic_columns": traffic_columns,
        "prompts": _numbers("--prompts", prompts),
        "new_tokens": new_tokens,
        "rounds": rounds,
        "precision": precision,
        "max_time": max_time,
        "threads": _numbers("--threads", threads),
        "streams": _numbers("--streams", streams),
        "target": target,
        "provider": provider,
        "transfers": transfers,
        "cuda_graphs": cuda_graphs,
        "eval": evaluation,
        "columns": columns,
        "limit": limit,
        "metrics": metrics,
    }
    choice = ReportChoice(
        bundles=tuple(_named(text) for text in bundles if not text.endswith(".json")),
        earlier=past,
        baseline=baseline,
        also=also,
        title=title,
        command=shlex.join(["onnxpress", "benchmark", "report", *_arguments()]),
        config=settings,
    )
    for _, path in choice.bundles:
        warn_where_inexact(Path(path))
    report_bundles(choice, out, run)
    show_report(out, output)


@benchmark_group.command("compare")
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option(
    "--fail-on", multiple=True, default=("5%",), show_default=True, metavar="[KIND=]SHARE",
    help="By how much a figure may become worse; KIND is latency, size, memory or quality.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
def compare_command(old: Path, new: Path, fail_on: tuple[str, ...], as_json: bool) -> None:
    """Tell what became faster, slower, larger or worse from report.json OLD to NEW.

    Exit code 7 where a figure is worse by more than its threshold and by more than its noise, or a
    variant, a time or a metric is missing, or a variant fails.
    """
    from benchmarks.compare import RegressionError, compare, parse_thresholds
    from benchmarks.report import read_report

    thresholds = parse_thresholds(fail_on)
    found = compare(read_report(old), read_report(new), thresholds)
    Output(as_json).show(found.to_json(), lambda _: comparison_text(found))
    if found.regressions:
        others = len(found.regressions) - 1
        more = f", and {others} more" if others else ""
        raise RegressionError(f"{found.regressions[0]}{more}; raise --fail-on if that is accepted")


def comparison_text(found: "Comparison") -> str:
    """Return a comparison as lines, the figures of a variant together, what failed marked."""
    from benchmarks.compare import describe

    lines = []
    for change in found.changes:
        mark = "!" if change.regression else " "
        lines.append(f"{mark} {change.variant}: {describe(change)}")
    lines += [f"! {line}" for line in found.missing]
    lines += [f"  {note}" for note in found.notes]
    return "\n".join(lines)


def _refuse_settings(but: set[str]) -> None:
    """Raise `ConfigError` for an option of this command that was typed, but for some."""
    context = click.get_current_context()
    for option in context.command.params:
        name = str(option.name)
        typed = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if typed and name not in but:
            raise ConfigError(
                f"a finished report is drawn as it was measured; leave {option.opts[0]} out, or name "
                "a BUNDLE to measure"
            )


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(f"{option} must be whole numbers as in 1,2, got {text}") from error


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
