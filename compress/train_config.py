"""The settings of a training run, and the learning rate and parameter groups they make."""

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from compress.config import StageConfig, one_of, require


@dataclass(frozen=True)
class TrainConfig(StageConfig):
    """How long and how to train."""

    steps: int = 300
    epochs: float | None = None  # passes over the data; where given, they decide and not `steps`
    learning_rate: float = 2e-4
    warmup: float = 0.1  # share of the steps in which the rate rises from zero
    schedule: str = "cosine"  # how it falls to zero after that
    weight_decay: float = 0.01  # on matrices only: not on biases and norms
    clip: float = 1.0  # largest gradient norm
    accumulate: int = 1  # batches per step
    precision: str = "no"  # or bf16, fp16
    dropout: bool = False  # a teacher's answer is exact: noise in the student only slows it down
    ema: float = 0.0  # decay of the averaged weights that are returned; 0: the last weights
    gradient_checkpointing: bool = False  # compute activations twice instead of keeping them
    eval_every: int = 100  # steps between evaluations, where there is something to evaluate
    patience: int = 0  # evaluations in a row without a new best that end training; 0: none do
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"--steps must be at least 1, got {self.steps}")
        require(
            self.epochs is None or self.epochs > 0, f"--epochs must be above 0, got {self.epochs}"
        )
        require(self.learning_rate > 0, f"--lr must be above 0, got {self.learning_rate}")
        require(0 <= self.warmup <= 1, f"--warmup must be in [0, 1], got {self.warmup}")
        require(
            self.weight_decay >= 0, f"--weight-decay must not be negative, got {self.weight_decay}"
        )
        require(self.clip > 0, f"--clip must be above 0, got {self.clip}")
        require(self.accumulate >= 1, f"--accumulate must be at least 1, got {self.accumulate}")
        require(0 <= self.ema < 1, f"--ema must be in [0, 1), got {self.ema}")
        require(self.eval_every >= 1, f"--eval-every must be at least 1, got {self.eval_every}")
        require(self.patience >= 0, f"--patience must not be negative, got {self.patience}")
        one_of("--schedule", self.schedule, ("cosine", "linear"))
        one_of("--precision", self.precision, ("no", "bf16", "fp16"))

    def total_steps(self, batches: int) -> int:
        """Return how many steps training takes on an epoch of `batches` batches."""
        if self.epochs is None:
            return self.steps
        return max(1, math.ceil(self.epochs * batches / self.accumulate))


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Return the rate of a step, counted from 0: linear warm-up, then cosine or linear to zero.

    The cosine is that of Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts.
    """
    warm = max(1, round(steps * config.warmup))
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    factor = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * factor


def parameter_groups(module: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Return the trained parameters for an optimizer: matrices decay, biases and norms do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    require(bool(trained), "nothing to train: every parameter of the model is frozen")
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
