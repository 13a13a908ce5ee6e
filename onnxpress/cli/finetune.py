"""`compress finetune | merge`."""

from pathlib import Path
from typing import Any

import click

from onnxpress.cli.options import (
    Output,
    common,
    data_options,
    model_argument,
    out_option,
    pack_option,
    task_option,
    trust_option,
)
from onnxpress.cli.training import training_options
from onnxpress.stages import (
    DataChoice,
    ModelChoice,
    Run,
    StartChoice,
    finetune_model,
    merge_model,
)
from onnxpress.training import TrainingChoice

_METHODS = ["full", "lora", "prefix", "ia3", "adapter"]


@click.command("finetune")
@click.argument("model", required=False)
@click.option(
    "--from-config", type=click.Path(path_type=Path),
    help="Or: a config.json with model_type; weights are drawn at random.",
)  # fmt: skip
@click.option(
    "--tokenizer",
    help="With --from-config: a directory, or 'characters' for one made of the data's; default: "
    "the one beside the file.",
)
@data_options
@pack_option
@task_option
@trust_option
@click.option("--new-head", is_flag=True, help="Learn the data's classes from the start.")
@click.option("--method", type=click.Choice(_METHODS), default="full", show_default=True)
@click.option("--rank", type=int, help="lora: of the two factors; default 8.")
@click.option("--alpha", type=float, help="lora: the product counts alpha / rank; default 16.")
@click.option("--lora-dropout", type=float, help="lora: before the factors; default 0.05.")
@click.option("--bottleneck", type=int, help="adapter: neurons of each; default 48.")
@click.option(
    "--placement", help="adapter: houlsby, after attention and feed-forward (default), or pfeiffer."
)
@click.option("--virtual-tokens", type=int, help="prefix: positions of it; default 20.")
@click.option(
    "--targets", multiple=True, help="Pattern of linear layers to adapt; repeat for several."
)
@click.option("--merge", is_flag=True, help="lora, ia3: make it part of the weights once trained.")
@out_option
@common
@training_options
def finetune_command(
    model: str | None,
    from_config: Path | None,
    tokenizer: str | None,
    data: DataChoice,
    pack: bool,
    task: str | None,
    trust_remote_code: bool,
    new_head: bool,
    method: str,
    merge: bool,
    train: dict[str, Any],
    training: TrainingChoice,
    out: Path,
    run: Run,
    output: Output,
    **adapter: Any,
) -> None:
    """Train MODEL on labels, pairs or text: whole, or an adapter beside its weights.

    The task is the one that the data has labels for, else the model's own; a model for another task
    gets a new head.
    """
    from compress.finetune import FROM_CONFIG_RATE, finetune_config

    rate = FROM_CONFIG_RATE if from_config else None
    config = finetune_config(method, adapter, train, merge=merge, rate=rate)
    start = StartChoice(model, from_config, tokenizer, task, new_head, trust_remote_code)
    result = finetune_model(start, data, pack, config, out, run, training)
    output.show(result, _finetune_text)


@click.command("merge")
@model_argument
@out_option
@common
def merge_command(model: ModelChoice, out: Path, run: Run, output: Output) -> None:
    """Make the LoRA or IA³ adapter of MODEL part of its weights."""
    output.show(
        merge_model(model, out, run),
        lambda r: f"{r['path']}: {r['method']} merged into {r['modules']} modules",
    )


def _finetune_text(result: dict[str, Any]) -> str:
    measured = [
        f"{name.removeprefix('eval_')} {result[name]:.4g}"
        for name in ("eval_loss", "accuracy", "spearman", "perplexity")
        if name in result
    ]
    return (
        f"{result['path']}: {result['task']}, loss {result['loss_first']:.4g} → "
        f"{result['loss_last']:.4g} in {result['steps']} steps; {result['trained']:,} of "
        f"{result['parameters']:,} parameters trained ({result['trained_percent']:.2f} %)"
        + (f"\nevaluation: {', '.join(measured)}" if measured else "")
    )
