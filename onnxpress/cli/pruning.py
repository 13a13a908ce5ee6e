"""`compress prune`."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from calib_data.errors import ConfigError
from onnxpress.cli.distillation import loss_options
from onnxpress.cli.options import (
    Command,
    Output,
    cache_option,
    common,
    layer_numbers,
    model_argument,
    optional_data_options,
    out_option,
    pack_option,
    provider_option,
)
from onnxpress.cli.prune_text import prune_text
from onnxpress.cli.training import loop_options
from onnxpress.prune_choice import (
    CALIBRATE,
    SHARE,
    HealChoice,
    PruneChoice,
    VocabularyChoice,
    config_of,
    rounds_of,
    sparsity_of,
)
from onnxpress.pruning import plan_model, prune_model, require_target
from onnxpress.stages import DataChoice, ModelChoice, Run
from onnxpress.target import SHAPE, Target, target_of
from onnxpress.training import TrainingChoice

# by name, so that --help imports no torch; a test holds them to compress
SPARSITY_NAMES = ("sparsegpt", "wanda", "magnitude")
TIMED_SCHEMES = ("dynamic", "weight-only")  # those that need no data
OVER_NAMES = ("graph", "pytorch")
CRITERIA_NAMES = ("fisher", "taylor", "gradient", "magnitude", "wanda", "random")


def amount_options(command: Command) -> Command:
    """Add what goes and what decides; the command takes `settings`, of which shares may be missing."""

    @click.option(
        "--heads", type=float, help=f"Share of attention heads to remove; default {SHARE}."
    )
    @click.option(
        "--ffn", type=float, help=f"Share of feed-forward neurons to remove; default {SHARE}."
    )
    @click.option("--layers", type=float, help="Share of the layers to remove.")
    @click.option("--keep-layers", default="", help="Or: the layers that stay, as in 0,2,5.")
    @click.option("--hidden", type=int, help="Channels of the residual stream that stay.")
    @click.option(
        "--criterion", type=click.Choice(CRITERIA_NAMES), default="fisher", show_default=True,
        help="What tells how much a head or neuron matters; the last three look at no loss.",
    )  # fmt: skip
    @click.option(
        "--ranking", type=click.Choice(["global", "uniform"]), default="global", show_default=True,
        help="Layers compete, or each keeps the same share.",
    )  # fmt: skip
    @click.option(
        "--min-heads", type=int, default=1, show_default=True, help="That every layer keeps."
    )
    @click.option(
        "--min-ffn", type=int, default=1, show_default=True, help="Neurons that every layer keeps."
    )
    @click.option(
        "--round-to", type=int, default=16, show_default=True,
        help="Layers keep neurons in multiples of this, which fill the processor's kernels.",
    )  # fmt: skip
    @click.option(
        "--reconstruct/--no-reconstruct", default=True, show_default=True,
        help="Fit what stays to the unpruned blocks' outputs, by least squares on --data.",
    )  # fmt: skip
    @functools.wraps(command)
    def wrapped(*args: Any, keep_layers: str, **given: Any) -> Any:
        names = (
            "heads", "ffn", "layers", "hidden", "criterion", "ranking", "min_heads", "min_ffn",
            "round_to", "reconstruct",
        )  # fmt: skip
        settings = {name: given.pop(name) for name in names}
        settings["keep_layers"] = layer_numbers(keep_layers) or None
        known = {name: value for name, value in settings.items() if value is not None}
        return command(*args, settings=known, **given)

    return wrapped


def target_options(command: Command) -> Command:
    """Add how fast or small the result is to be; the command takes `target`, which may be None."""

    @click.option(
        "--speedup", type=float, help="Instead: remove what makes the graph so many times faster."
    )
    @click.option("--latency", type=float, help="Instead: milliseconds that a call may take.")
    @click.option("--size", type=float, help="Instead: MB that the weights may take.")
    @provider_option
    @click.option(
        "--shape", "shapes", default=SHAPE, show_default=True,
        help="Batch x length that --speedup is measured on; of several, the mean time counts.",
    )  # fmt: skip
    @click.option("--threads", type=int, help="Of the measured graphs; by default all cores.")
    @click.option(
        "--scheme", type=click.Choice(TIMED_SCHEMES),
        help="Measure graphs that are quantized so, as the result will be; default: float.",
    )  # fmt: skip
    @click.option(
        "--over", type=click.Choice(OVER_NAMES),
        help="What --speedup is over: the model's graph (default), or the model in PyTorch.",
    )  # fmt: skip
    @click.option(
        "--whole-layers", is_flag=True, help="Whole layers may go, where that costs least."
    )
    @click.option(
        "--tables", type=click.Path(path_type=Path, file_okay=False),
        help="Folder of latency tables; default: the user's cache.",
    )  # fmt: skip
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        speedup: float | None,
        latency: float | None,
        size: float | None,
        provider: str,
        shapes: str,
        threads: int | None,
        scheme: str | None,
        over: str | None,
        whole_layers: bool,
        tables: Path | None,
        **kwargs: Any,
    ) -> Any:
        settings = {
            "speedup": speedup, "latency": latency, "size": size, "provider": provider,
            "shape": shapes, "threads": threads, "scheme": scheme, "over": over,
            "whole_layers": whole_layers, "tables": tables,
        }  # fmt: skip
        return command(*args, target=target_of(settings), **kwargs)

    return wrapped


def healing_options(command: Command) -> Command:
    """Add --heal, its rounds and how to train; the command takes `heal`, `rounds` and `training`."""

    @click.option(
        "--heal", "steps", type=int, help="Then distill from the unpruned model for so many steps."
    )
    @click.option(
        "--schedule", type=click.Choice(["one-shot", "iterative"]), default="one-shot",
        show_default=True, help="iterative: prune a part, heal, prune again.",
    )  # fmt: skip
    @click.option(
        "--rounds", type=int, help="Of --schedule iterative, each of --heal steps; default 3."
    )
    @cache_option
    @pack_option
    @loss_options
    @loop_options
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        steps: int | None,
        schedule: str,
        rounds: int | None,
        cache_teacher: bool,
        pack: bool,
        matching: dict[str, Any],
        train: dict[str, Any],
        **kwargs: Any,
    ) -> Any:
        count = rounds_of(schedule, rounds)
        heal = None if steps is None else HealChoice(steps, matching, train, pack, cache_teacher)
        asked = {"--losses": matching["losses"], "--pack": pack, "--cache-teacher": cache_teacher}
        given = [option for option, value in asked.items() if value]
        if heal is None and given:
            raise ConfigError(f"{given[0]} is for healing; add --heal STEPS")
        return command(*args, heal=heal, rounds=count, **kwargs)

    return wrapped


def other_options(command: Command) -> Command:
    """Add what may go besides; the command takes `sparsity` and `vocabulary`, which may be None."""

    @click.option(
        "--sparsity", help="Then make single weights zero: a share as 0.5, or 2:4 for GPUs."
    )
    @click.option(
        "--sparsity-method", type=click.Choice(SPARSITY_NAMES),
        help="What tells which weights; default sparsegpt.",
    )  # fmt: skip
    @click.option(
        "--vocab-from", help="Then drop the tokens that these data, as --data, never use."
    )
    @click.option("--vocab-columns", help="As --columns, for --vocab-from.")
    @click.option("--vocab-min-count", type=int, help="Tokens seen less often go too; default 1.")
    @click.option(
        "--keep-tokens", type=click.Path(path_type=Path, dir_okay=False),
        help="File of tokens, or texts whose tokens, stay as well, one a line.",
    )  # fmt: skip
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        sparsity: str | None,
        sparsity_method: str | None,
        vocab_from: str | None,
        vocab_columns: str | None,
        vocab_min_count: int | None,
        keep_tokens: Path | None,
        **kwargs: Any,
    ) -> Any:
        with_it = {
            "--vocab-columns": vocab_columns,
            "--vocab-min-count": vocab_min_count,
            "--keep-tokens": keep_tokens,
        }
        given = [option for option, value in with_it.items() if value is not None]
        if vocab_from is None and given:
            raise ConfigError(f"{given[0]} goes with --vocab-from; add it")
        vocabulary = None
        if vocab_from is not None:
            vocabulary = VocabularyChoice(
                vocab_from,
                vocab_columns,
                keep_tokens,
                1 if vocab_min_count is None else vocab_min_count,
            )
        zeros = sparsity_of(sparsity, sparsity_method)
        return command(*args, sparsity=zeros, vocabulary=vocabulary, **kwargs)

    return wrapped


@click.command("prune")
@model_argument
@optional_data_options
@click.option(
    "--calibrate", type=int, default=CALIBRATE, show_default=True,
    help="Examples of --data that tell what matters and fit what stays.",
)  # fmt: skip
@amount_options
@target_options
@click.option(
    "--plan", type=click.Path(path_type=Path, dir_okay=False),
    help="Instead: a JSON file that says what stays, made with --plan-only, edited or not.",
)  # fmt: skip
@click.option(
    "--plan-only", is_flag=True, help="Write the plan to the file that -o names, no more."
)
@click.option(
    "--original",
    help="What MODEL was pruned from before: it heals from that, and --speedup is over that.",
)
@other_options
@out_option
@common
@healing_options
def prune_command(
    model: ModelChoice,
    data: DataChoice | None,
    calibrate: int,
    settings: dict[str, Any],
    target: Target | None,
    plan: Path | None,
    plan_only: bool,
    original: str | None,
    sparsity: dict[str, Any] | None,
    vocabulary: VocabularyChoice | None,
    heal: HealChoice | None,
    rounds: int,
    training: TrainingChoice,
    out: Path,
    run: Run,
    output: Output,
) -> None:
    """Remove what matters least: heads, neurons, layers, channels; then single weights, or tokens.

    Exit code 6 where --speedup or --latency is missed by more than 7 %: the result is written all the
    same.
    """
    first = None if original is None else replace(model, name=original)
    choice = PruneChoice(target, plan, first, heal, rounds, calibrate, sparsity, vocabulary)
    config = config_of(settings, choice, run.seed)
    if plan_only:
        result = plan_model(model, data, config, out, run, choice)
    else:
        result = prune_model(model, data, config, out, run, choice, training)
    output.show(result, prune_text)
    require_target(result)
