"""`compress quantize`."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calib_data.errors import ConfigError
from onnxpress.cli.options import (
    DATA_HELP,
    Command,
    Output,
    columns_option,
    common,
    model_argument,
    out_option,
)
from onnxpress.quantization import LIMIT, Budget, QuantizeChoice, require_budget
from onnxpress.stages import DataChoice, ModelChoice, Run, quantize_model

if TYPE_CHECKING:
    from compress.quantize_config import QuantizeConfig


_ROUNDING = 1e-5  # a drift that floats make by themselves


def scheme_options(command: Command) -> Command:
    """Add how to quantize; the command takes `config`."""

    @click.option(
        "--scheme", type=click.Choice(["dynamic", "static", "weight-only"]), default="dynamic",
        show_default=True,
        help="dynamic: int8 weights, uint8 activations whose range is found at run time. static: "
        "their range comes from --data. weight-only: weights of few bits, block by block.",
    )  # fmt: skip
    @click.option(
        "--target", type=click.Choice(["cpu", "cuda", "portable"]), default="cpu", show_default=True,
        help="Where it is to run; cuda takes weight-only.",
    )  # fmt: skip
    @click.option("--bits", type=int, help="weight-only: 4 (default) or 8 bits a weight.")
    @click.option(
        "--block-size", type=int,
        help="weight-only: weights that share a scale, 16 to 256; default 32.",
    )  # fmt: skip
    @click.option(
        "--embedding-bits", type=int, default=8, show_default=True,
        help="Of each number in embedding tables; or 4, in blocks, for little noise.",
    )  # fmt: skip
    @click.option(
        "--embedding-block-size", type=int,
        help="--embedding-bits 4: numbers of a row that share a scale, 16 to 128; fewer are nearer, "
        "and take more bytes; default 32.",
    )  # fmt: skip
    @click.option(
        "--per-channel/--per-tensor", default=None,
        help="dynamic, static: a scale for each output of a layer (default), or one for all.",
    )  # fmt: skip
    @click.option(
        "--weight-range", type=click.Choice(["exact", "full", "reduced"]),
        help="dynamic, static: exact (default) rounds weights so that their sums are right on every "
        "processor; full uses all 8 bits, which processors without VNNI, AMX or the ARM dot product "
        "add up wrongly; reduced has 7 bits.",
    )  # fmt: skip
    @click.option(
        "--activations", type=click.Choice(["uint8", "int8"]),
        help="static: uint8 with a zero point (default), or int8 around zero.",
    )  # fmt: skip
    @click.option(
        "--ranges", type=click.Choice(["mse", "minmax", "percentile", "entropy"]),
        help="static: how an activation's range is chosen; default mse.",
    )  # fmt: skip
    @click.option(
        "--percentile", type=float, help="--ranges percentile: share within it; default 99.99."
    )
    @click.option(
        "--smooth", type=float,
        help="How much of the activations' outliers moves into the weights, 0 to 1; 0.5 is usual.",
    )  # fmt: skip
    @click.option(
        "--bias-correction", is_flag=True, help="Take the mean error of a layer out of its bias."
    )
    @click.option(
        "--rounding", type=click.Choice(["nearest", "gptq"]), default="nearest", show_default=True,
        help="gptq: each weight makes up for the errors of those before it.",
    )  # fmt: skip
    @click.option("--skip", multiple=True, help="Pattern of module names that stay float.")
    @functools.wraps(command)
    def wrapped(*args: Any, **given: Any) -> Any:
        from compress.quantize_config import QuantizeConfig

        settings = {n: given.pop(n) for n in QuantizeConfig.__dataclass_fields__ if n in given}
        if settings["percentile"] is not None and settings["ranges"] != "percentile":
            raise ConfigError("--percentile goes with --ranges percentile")
        known = {name: value for name, value in settings.items() if value is not None}
        return command(*args, config=QuantizeConfig(**known), **given)

    return wrapped


def calibration_options(command: Command) -> Command:
    """Add the data, what it calibrates and judges, and --resume; the command takes `choice`."""

    @click.option("--data", help=f"Data to calibrate on, as the model will meet it: {DATA_HELP}")
    @columns_option
    @click.option(
        "--limit", type=click.IntRange(1), default=LIMIT, show_default=True,
        help="Calibrate on at most this many examples, chosen by the seed.",
    )  # fmt: skip
    @click.option("--batch-size", type=int, default=32, show_default=True)
    @click.option(
        "--max-length", type=int, default=128, show_default=True, help="Tokens per text at most."
    )
    @click.option(
        "--report-sensitivity", type=click.Path(path_type=Path, dir_okay=False),
        help="Measure what quantizing each layer costs, and write it to this JSON file.",
    )  # fmt: skip
    @click.option(
        "--max-drop", type=float,
        help="Keep the fewest, costliest layers in float so that the metric drops no further: a share "
        "of its scale, 0.005 of 1 or 0.5 of 100; of a perplexity, how much higher.",
    )  # fmt: skip
    @click.option("--metric", help="For --max-drop; default: the first that --eval allows.")
    @click.option("--eval", "evaluation", help="For --max-drop: data that the model is judged on.")
    @click.option("--eval-columns", help="As --columns, for --eval.")
    @click.option("--resume", is_flag=True, help="Go on from OUT.calibration, if it is there.")
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        run: Run,
        data: str | None,
        columns: str | None,
        limit: int,
        batch_size: int,
        max_length: int,
        report_sensitivity: Path | None,
        max_drop: float | None,
        metric: str | None,
        evaluation: str | None,
        eval_columns: str | None,
        resume: bool,
        **kwargs: Any,
    ) -> Any:
        source = DataChoice(data, columns, limit, batch_size, max_length) if data else None
        budget = None
        if max_drop is not None and evaluation is None:
            raise ConfigError("--max-drop needs data that the model is judged on; add --eval")
        if max_drop is None and (evaluation or metric):
            raise ConfigError(
                f"{'--eval' if evaluation else '--metric'} judges what --max-drop allows; add it"
            )
        if max_drop is not None and evaluation is not None:
            held_out = DataChoice(evaluation, eval_columns, None, batch_size, max_length)
            budget = Budget(max_drop, held_out, metric)
        choice = QuantizeChoice(source, budget, report_sensitivity)
        return command(*args, run=replace(run, resume=resume), choice=choice, **kwargs)

    return wrapped


@click.command("quantize")
@model_argument
@scheme_options
@out_option
@common
@calibration_options
def quantize_command(
    model: ModelChoice,
    config: "QuantizeConfig",
    choice: QuantizeChoice,
    out: Path,
    run: Run,
    output: Output,
) -> None:
    """Turn linear layers and embedding tables into small ones.

    Exit code 6 where --max-drop cannot be held: the best model found is written all the same.
    """
    result = quantize_model(model, config, out, run, choice)
    output.show(result, _quantize_text)
    require_budget(result)


def _quantize_text(result: dict[str, Any]) -> str:
    lines = [
        f"{result['path']}: {result['modules']} modules quantized, "
        f"{result['bytes_before'] / 1e6:.1f} → {result['bytes_after'] / 1e6:.1f} MB of weights",
        _drift_line(result),
    ]
    if "sensitivity" in result:
        lines += _sensitivity_lines(result["sensitivity"])
    if "budget" in result:
        lines += _budget_lines(result)
    return "\n".join(lines)


def _drift_line(result: dict[str, Any]) -> str:
    """Tell how far a row depends on its batch; what could not be measured is left out."""
    named = {"batch_drift": "the batch's other rows", "padding_drift": "padding"}
    told = [
        f"{100 * result[name]:.2g} % with {what}"
        if result[name] > _ROUNDING
        else f"nothing with {what}"
        for name, what in named.items()
        if name in result
    ]
    return f"of a row's output changes: {', '.join(told)}"


def _sensitivity_lines(sensitivity: dict[str, Any]) -> list[str]:
    rows = [
        (f"{'not finite' if row['noise'] is None else format(row['noise'], '.2g'):>10}", row)
        for row in sensitivity["modules"]
    ]
    on = f"{sensitivity['samples']} examples of {sensitivity['data']}"
    if not sensitivity["samples"]:
        on = "inputs drawn at random, for want of --data"
    return [
        f"costliest layers, by noise in the output ÷ signal, on {on}:",
        *(f"{noise}  {row['module']}" for noise, row in rows),
    ]


def _budget_lines(result: dict[str, Any]) -> list[str]:
    budget, kept = result["budget"], result["kept_float"]
    return [
        f"{budget['metric']}: float {budget['float']:.4g}, quantized {budget['quantized']:.4g}, "
        f"with {len(kept)} layers in float {budget['value']:.4g}: a drop of {budget['drop']:.4f}, "
        f"{budget['max_drop']:g} allowed",
        *(f"in float: {name}" for name in kept),
    ]
