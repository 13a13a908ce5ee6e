"""`compress distill | finetune | merge | prune | quantize | inspect`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxpress.cli.distillation import loss_options, text_options
from onnxpress.cli.finetune import finetune_command, merge_command
from onnxpress.cli.options import (
    Group,
    Output,
    cache_option,
    common,
    data_options,
    layer_lines,
    model_argument,
    out_option,
    student_options,
    task_option,
    trust_option,
)
from onnxpress.cli.pruning import prune_command
from onnxpress.cli.quantization import quantize_command
from onnxpress.cli.training import training_options
from onnxpress.stages import (
    DataChoice,
    ModelChoice,
    Run,
    distill_model,
)
from onnxpress.training import TrainingChoice

if TYPE_CHECKING:
    from compress.sizes import StudentShape


@click.group(cls=Group)
def compress_group() -> None:
    """Make a model smaller: distill, prune, quantize, in any order that makes sense."""


compress_group.add_command(finetune_command)
compress_group.add_command(merge_command)
compress_group.add_command(prune_command)
compress_group.add_command(quantize_command)


@compress_group.command("distill")
@click.option("--teacher", required=True, help="The model to learn from.")
@click.option(
    "--student",
    help="The model that learns: a directory, pruned or not; without a head it gets the teacher's.",
)
@student_options
@data_options
@task_option
@trust_option
@loss_options
@cache_option
@text_options
@out_option
@common
@training_options
def distill_command(
    teacher: str,
    student: str | None,
    shape: "StudentShape",
    data: DataChoice,
    task: str | None,
    trust_remote_code: bool,
    matching: dict[str, Any],
    cache_teacher: bool,
    pack: bool,
    generate: dict[str, Any] | None,
    train: dict[str, Any],
    training: TrainingChoice,
    out: Path,
    run: Run,
    output: Output,
) -> None:
    """Train a student to behave like its teacher."""
    from compress.distill_config import DistillConfig
    from compress.train_config import TrainConfig

    config = DistillConfig(**matching, train=TrainConfig(**train))
    result = distill_model(
        ModelChoice(teacher, task, trust_remote_code),
        ModelChoice(student, task, trust_remote_code) if student else None,
        shape,
        data,
        config,
        out,
        run,
        training,
        pack=pack,
        generate=generate,
        cache_teacher=cache_teacher,
    )
    output.show(
        result,
        lambda r: (
            f"{r['path']}: loss {r['loss_first']:.4g} → {r['loss_last']:.4g} in {r['steps']} steps; "
            f"{r['parameters_student']:,} parameters, the teacher {r['parameters_teacher']:,}"
        ),
    )


@compress_group.command("inspect")
@model_argument
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw what each layer keeps: a .png, .svg or .pdf file.",
)
@common
def inspect_command(model: ModelChoice, plot: Path | None, run: Run, output: Output) -> None:
    """Show what a model is, what each layer keeps, and how it came about."""
    from onnxpress.inspection import describe, draw

    found = describe(model.open())
    if plot is not None:
        draw(found, plot, run.overwrite)
    output.show(found, _inspect_text)


def _inspect_text(found: dict[str, Any]) -> str:
    lines = [
        f"task        {found['task']}",
        f"model       {found['class']}, {found['parameters']:,} parameters, "
        f"{found['bytes'] / 1e6:.1f} MB",
        f"inputs      {', '.join(found['inputs'])}",
        f"outputs     {', '.join(found['outputs'])}",
        f"max length  {found['max_length'] or 'no limit'}",
        *_quantization_lines(found["quantization"]),
        *(
            [f"sparse      {found['zeros']:.1%} of the blocks' weights are zero"]
            if found["zeros"]
            else []
        ),
        *([f"adapter     {found['adapter']}, not merged"] if found["adapter"] else []),
        *_kept_lines(found),
    ]
    for stage in found["lineage"]:
        settings = ", ".join(f"{k}={v}" for k, v in (stage.get("settings") or {}).items())
        lines.append(f"stage       {stage['stage']} {settings or stage.get('model', '')}")
    return "\n".join(lines)


def _kept_lines(found: dict[str, Any]) -> list[str]:
    """Return what is kept of the residual stream, the stacks and each layer, as it was first named."""
    from compress.plan import ranges

    hidden = found["hidden"]
    lines = [f"hidden      {hidden['kept']} of {hidden['units']}"] if hidden else []
    lines += [
        f"layers      {stack} {ranges(row['kept'])}, {len(row['kept'])} of {row['of']}"
        for stack, row in found["stacks"].items()
    ]
    return lines + layer_lines(found["layers"])


def _quantization_lines(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return ["quantized   no"]
    settings = {k: v for k, v in found["settings"].items() if v not in (None, [], False)}
    lines = [
        f"quantized   {found['scheme']}, {len(found['modules'])} modules",
        f"settings    {', '.join(f'{k}={v}' for k, v in settings.items())}",
    ]
    if found["calibration"]:
        samples = (
            f", {found['calibration_samples']} samples" if found["calibration_samples"] else ""
        )
        lines.append(f"calibrated  on {found['calibration'][:12]}{samples}")
    kept = set(found["kept_float"])
    lines += [
        f"float       {name}{', for the sake of --max-drop' if name in kept else ''}"
        for name in found["float"]
    ]
    return lines
