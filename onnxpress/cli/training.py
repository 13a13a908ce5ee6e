"""The options of every command that trains."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from calib_data.errors import ConfigError
from onnxpress.cli.options import Command
from onnxpress.stages import Run
from onnxpress.training import SAVE_EVERY, TrainingChoice


def training_options(command: Command) -> Command:
    """Add how long and how to train; see `loop_options`."""

    @click.option("--steps", type=int, help="Optimizer steps.  [default: 300]")
    @click.option("--epochs", type=float, help="Or: passes over the data.")
    @click.option(
        "--schedule", type=click.Choice(["cosine", "linear"]), default="cosine", show_default=True,
        help="How the rate falls to zero.",
    )  # fmt: skip
    @loop_options
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        steps: int | None,
        epochs: float | None,
        schedule: str,
        train: dict[str, Any],
        **kwargs: Any,
    ) -> Any:
        if steps is not None and epochs is not None:
            raise ConfigError("name either --steps or --epochs")
        given = {"steps": steps, "epochs": epochs, "schedule": schedule}
        train |= {name: value for name, value in given.items() if value is not None}
        return command(*args, train=train, **kwargs)

    return wrapped


def loop_options(command: Command) -> Command:
    """Add how to train; the command takes `train`, settings of a TrainConfig, and `training`.

    Only what was given is in `train`: each stage has defaults of its own. It stands below `common`,
    whose seed it takes.
    """

    @click.option("--lr", type=float, help="Learning rate; default: what suits the stage.")
    @click.option(
        "--warmup", type=float, default=0.1, show_default=True,
        help="Share of the steps in which the rate rises.",
    )  # fmt: skip
    @click.option(
        "--weight-decay", type=float, default=0.01, show_default=True, help="Of matrices."
    )
    @click.option("--clip", type=float, default=1.0, show_default=True, help="Gradient norm.")
    @click.option("--accumulate", type=int, default=1, show_default=True, help="Batches per step.")
    @click.option(
        "--precision", type=click.Choice(["no", "bf16", "fp16"]), default="no", show_default=True,
        help="Mixed precision; fp16 needs a GPU.",
    )  # fmt: skip
    @click.option(
        "--dropout/--no-dropout", default=None,
        help="Train with the model's dropout; default: only to fine-tune.",
    )  # fmt: skip
    @click.option(
        "--ema", type=float, default=0.0, show_default=True,
        help="Return averaged weights, with this decay; 0.999 is usual.",
    )  # fmt: skip
    @click.option(
        "--gradient-checkpointing", is_flag=True, help="Less memory for a third more computing."
    )
    @click.option("--eval", help="Data that judges the model in training; the best is kept.")
    @click.option("--eval-columns", help="As --columns, for --eval.")
    @click.option(
        "--eval-every", type=int, default=100, show_default=True, help="Steps between evaluations."
    )
    @click.option(
        "--patience", type=int, default=0, show_default=True,
        help="Stop after so many evaluations without a new best; 0: never.",
    )  # fmt: skip
    @click.option(
        "--save-every", type=click.IntRange(min=0), default=SAVE_EVERY, show_default=True,
        help="Steps between states saved in OUT.training; 0: none.",
    )  # fmt: skip
    @click.option("--resume", is_flag=True, help="Go on from OUT.training, if it is there.")
    @click.option(
        "--tensorboard", type=click.Path(path_type=Path), help="Directory for TensorBoard's files."
    )
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        run: Run,
        lr: float | None,
        eval: str | None,
        eval_columns: str | None,
        save_every: int,
        resume: bool,
        tensorboard: Path | None,
        **kwargs: Any,
    ) -> Any:
        from compress.train_config import TrainConfig

        if kwargs["patience"] and eval is None:
            raise ConfigError("--patience counts evaluations; add --eval")
        # how long is another decorator's to say
        mine = set(TrainConfig.__dataclass_fields__) - {"steps", "epochs", "schedule"}
        names = mine & set(kwargs)
        given = {"learning_rate": lr, "seed": run.seed}
        given |= {name: kwargs.pop(name) for name in names}
        train = {name: value for name, value in given.items() if value is not None}
        training = TrainingChoice(save_every, tensorboard, eval, eval_columns)
        run = replace(run, resume=resume)
        return command(*args, run=run, train=train, training=training, **kwargs)

    return wrapped
