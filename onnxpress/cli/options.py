"""Options that several commands share, one decorator each, and how errors reach the user."""

import functools
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from calib_data.errors import ConfigError, OnnxPressError
from compress.processes import is_main
from onnxpress.stages import Advance, DataChoice, ModelChoice, Run

Command = Callable[..., Any]
OUT = click.Path(path_type=Path)


def _failure(message: str, exit_code: int) -> click.ClickException:
    failure = click.ClickException(message)
    vars(failure)["exit_code"] = exit_code  # click reads it off the instance
    return failure


class Group(click.Group):
    """A group whose errors are one line on stderr and a documented exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command; translate what it raises."""
        try:
            return super().invoke(ctx)
        except OnnxPressError as error:
            raise _failure(" ".join(str(error).split()), error.exit_code) from error
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if "-v" in sys.argv or "--verbose" in sys.argv:
                traceback.print_exc()
            line = (str(error).strip().splitlines() or [""])[0][:300]
            raise _failure(
                f"unexpected {type(error).__name__}: {line} (-v shows where; please report it)", 1
            ) from error


@dataclass(frozen=True)
class Output:
    """How a command tells its result."""

    as_json: bool

    def show(self, result: dict[str, Any], text: Callable[[dict[str, Any]], str]) -> None:
        """Print `result` as one JSON document, or as `text` makes it; of several processes one does."""
        if is_main():
            click.echo(json.dumps(result, indent=2) if self.as_json else text(result))


def common(command: Command) -> Command:
    """Add --json, --seed, --overwrite and -v; the command takes `run` and `output`."""

    @click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
    @click.option("--seed", type=int, default=0, show_default=True, help="Of everything random.")
    @click.option("--overwrite", is_flag=True, help="Replace the destination if it exists.")
    @click.option("-v", "--verbose", is_flag=True, help="Show warnings, and where an error arose.")
    @functools.wraps(command)
    def wrapped(
        *args: Any, as_json: bool, seed: int, overwrite: bool, verbose: bool, **kwargs: Any
    ) -> Any:
        if not verbose:
            warnings.simplefilter("ignore")
        run = Run(seed, overwrite, progress=progress_bar)
        return command(*args, run=run, output=Output(as_json), **kwargs)

    return wrapped


def model_argument(command: Command) -> Command:
    """Add MODEL, --task and --trust-remote-code; the command takes `model`."""

    @click.argument("model")
    @task_option
    @trust_option
    @functools.wraps(command)
    def wrapped(
        *args: Any, model: str, task: str | None, trust_remote_code: bool, **kwargs: Any
    ) -> Any:
        return command(*args, model=ModelChoice(model, task, trust_remote_code), **kwargs)

    return wrapped


task_option = click.option(
    "--task", help="What the model is for; without it, config.json's architectures tell."
)
trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Run code that comes with the model."
)
provider_option = click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Execution provider; not obtaining it is an error.",
)
out_option = click.option("-o", "--out", type=OUT, required=True, help="Directory to write.")


cache_option = click.option(
    "--cache-teacher", is_flag=True, help="Keep the teacher's answers on disk for later epochs."
)


pack_option = click.option(
    "--pack", is_flag=True, help="Join the texts and cut blocks of --max-length (text-generation)."
)


DATA_HELP = (
    "train.jsonl, dev.csv, pairs.tsv, x.parquet, lines.txt, train.de+train.en, images.npz, "
    "whole:FILE[:train|:test], hf:NAME[/CONFIG]:SPLIT, pydoc[:train|:test], "
    "docstrings[:train|:test] or digits[:train|:test]; or the texts of several, joined by commas, "
    "those of 5*SPEC five times, of 5~SPEC once and four times altered."
)


def data_options(command: Command) -> Command:
    """Add --data and how it is read; the command takes `data`."""
    return _data_options(command, required=True)


def optional_data_options(command: Command) -> Command:
    """Add the same, of which nothing need be given; the command takes `data`, which may be None."""
    return _data_options(command, required=False)


def _data_options(command: Command, required: bool) -> Command:
    @click.option("--data", required=required, help=DATA_HELP)
    @columns_option
    @click.option("--limit", type=int, help="Use at most this many examples, chosen by the seed.")
    @click.option("--batch-size", type=int, default=32, show_default=True)
    @click.option(
        "--max-length", type=int, default=128, show_default=True, help="Tokens per text at most."
    )
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        data: str | None,
        columns: str | None,
        limit: int | None,
        batch_size: int,
        max_length: int,
        **kwargs: Any,
    ) -> Any:
        choice = DataChoice(data, columns, limit, batch_size, max_length) if data else None
        return command(*args, data=choice, **kwargs)

    return wrapped


def layer_numbers(text: str) -> tuple[int, ...]:
    """Return the layers that --keep-layers names, as in 0,2,5."""
    try:
        return tuple(int(layer) for layer in text.split(",") if text)
    except ValueError as error:
        raise ConfigError(f"--keep-layers must be as in 0,2,5, got {text}") from error


def layer_lines(layers: dict[str, Any]) -> list[str]:
    """Return a line for each block: how many of its units it kept."""
    width = max((len(name) for name in layers), default=0)
    return [f"{name:<{width}}  {row['kept']:>5} of {row['units']}" for name, row in layers.items()]


def student_options(command: Command) -> Command:
    """Add what a student has of its teacher: --layers … --ffn; the command takes `shape`."""

    @click.option("--layers", type=int, help="Or: so many of the teacher's layers, evenly spaced.")
    @click.option(
        "--keep-layers", default="", help="Or: these of the teacher's layers, as in 0,2,5."
    )
    @click.option("--hidden", type=int, help="Width of the student's hidden states.")
    @click.option("--heads", type=int, help="Attention heads of each of the student's layers.")
    @click.option("--ffn", type=int, help="Feed-forward neurons of each of the student's layers.")
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        layers: int | None,
        keep_layers: str,
        hidden: int | None,
        heads: int | None,
        ffn: int | None,
        **kwargs: Any,
    ) -> Any:
        from compress.sizes import StudentShape

        kept = layer_numbers(keep_layers)
        return command(*args, shape=StudentShape(layers, kept, hidden, heads, ffn), **kwargs)

    return wrapped


columns_option = click.option(
    "--columns",
    help="text,text_pair,score for a file without a header, or role=column for one with.",
)


@contextmanager
def progress_bar(label: str, total: int | None) -> Iterator[Advance]:
    """Show a bar with rate and time left on stderr; yield what advances it.

    `advance()` counts one step; `advance(loss)` shows a number with it;
    `advance(what, done, total)` sets all three.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    shown = console.is_terminal and is_main()
    with Progress(*columns, console=console, disable=not shown) as progress:
        task = progress.add_task(label, total=total, rate="")

        def advance(*told: Any) -> None:
            state = progress.tasks[0]
            speed = f"{state.speed:.2f}/s" if state.speed else ""
            if len(told) == 3:
                what, done, of = told
                progress.update(task, description=f"{label}: {what}", completed=done, total=of)
            else:
                progress.advance(task)
            if len(told) == 1:
                speed = f"{speed} loss {told[0]:.4g}"
            progress.update(task, rate=speed)

        yield advance
