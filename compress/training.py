"""The one training loop: distillation, healing and fine-tuning hand it a loss and batches."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calib_data.batches import Batches
from calib_data.errors import DataError, TrainingError
from compress.config import StageConfig, one_of, require


@dataclass(frozen=True)
class TrainConfig(StageConfig):
    """How long and how to train."""

    steps: int = 300
    learning_rate: float = 2e-4
    warmup: float = 0.1  # share of the steps in which the rate rises from zero
    schedule: str = "cosine"  # how it falls to zero after that
    weight_decay: float = 0.01  # on matrices only: not on biases and norms
    clip: float = 1.0  # largest gradient norm
    accumulate: int = 1  # batches per step
    precision: str = "no"  # or bf16, fp16
    dropout: bool = False  # a teacher's answer is exact: noise in the student only slows it down
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"--steps must be at least 1, got {self.steps}")
        require(self.learning_rate > 0, f"--lr must be above 0, got {self.learning_rate}")
        require(0 <= self.warmup <= 1, f"--warmup must be in [0, 1], got {self.warmup}")
        require(self.clip > 0, f"the gradient clip must be above 0, got {self.clip}")
        require(self.accumulate >= 1, f"--accumulate must be at least 1, got {self.accumulate}")
        one_of("schedule", self.schedule, ("cosine", "linear"))
        one_of("--precision", self.precision, ("no", "bf16", "fp16"))


# One batch, and the units of the whole step it belongs to, in; the named terms of the loss out.
LossOf = Callable[[Mapping[str, Tensor], Mapping[str, float]], dict[str, Tensor]]


def units(batch: Mapping[str, Tensor]) -> dict[str, float]:
    """Return what the terms of a loss are means over, counted in one batch.

    `rows`; `tokens` that are not padding; `next`, the tokens that follow another; `labels` that are
    not −100. A term is its sum divided by the *step's* units, so that a step of several batches, or
    of several processes, has the gradient of one large batch.
    """
    first = next(iter(batch.values()))
    found = {"rows": float(first.shape[0]), "tokens": float(first.shape[0])}
    if "attention_mask" in batch:
        found["tokens"] = float(batch["attention_mask"].sum())
    elif "input_ids" in batch:
        found["tokens"] = float(batch["input_ids"].numel())
    found["next"] = found["tokens"] - found["rows"]
    if "labels" in batch:
        found["labels"] = float((batch["labels"] != -100).sum())
    return found


@dataclass(frozen=True)
class TrainLog:
    """What happened: the loss of every step, and how many epochs they made."""

    losses: tuple[float, ...]
    epochs: float

    def summary(self, last: int = 20) -> dict[str, float]:
        """Return the mean loss of the first and the last steps."""
        head, tail = self.losses[:last], self.losses[-last:]
        return {
            "loss_first": sum(head) / len(head),
            "loss_last": sum(tail) / len(tail),
            "steps": len(self.losses),
            "epochs": self.epochs,
        }


def train_(
    module: nn.Module,
    loss_of: LossOf,
    batches: Batches,
    config: TrainConfig,
    progress: Callable[[float], None] = lambda loss: None,
) -> TrainLog:
    """Train `module` in place on the sum of `loss_of`'s terms and leave it in eval mode.

    `progress` is told each step's loss. Raises `TrainingError` for a loss that is not finite or a
    batch that does not fit in memory, `DataError` for no batches.
    """
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    if len(batches) == 0:
        raise DataError("there is no batch to train on; give --data at least one row")
    set_seed(config.seed)
    accelerator = Accelerator(mixed_precision=config.precision, cpu=not torch.cuda.is_available())
    optimizer = torch.optim.AdamW(_parameter_groups(module, config), lr=config.learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config))
    model, optimizer, scheduler = accelerator.prepare(module, optimizer, scheduler)
    module.train(config.dropout)
    losses: list[float] = []
    stream = _stream(batches)
    seen = 0
    try:
        for step in range(config.steps):
            total = 0.0
            optimizer.zero_grad()
            parts = [next(stream) for _ in range(config.accumulate)]
            step_units: Counter[str] = Counter()
            for part in parts:
                step_units.update(units(part))
            for part in parts:
                batch = {k: v.to(accelerator.device) for k, v in part.items()}
                seen += 1
                with accelerator.autocast():
                    loss = torch.stack(list(loss_of(batch, step_units).values())).sum()
                accelerator.backward(loss)
                total += float(loss.detach())
            if not torch.isfinite(torch.tensor(total)):
                raise TrainingError(
                    f"the loss is {total} at step {step}; lower --lr (now {config.learning_rate}) "
                    f"or look at the data (fingerprint {batches.fingerprint[:12]})"
                )
            accelerator.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            scheduler.step()
            losses.append(total)
            progress(total)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            "a batch does not fit in memory; lower --batch-size and raise --accumulate"
        ) from error
    finally:
        module.eval()
    return TrainLog(tuple(losses), seen / len(batches))


def _parameter_groups(module: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]


def _rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate's factor: linear warm-up, then cosine or linear to zero."""
    warm = max(1, round(config.steps * config.warmup))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, config.steps - warm)
    if config.schedule == "linear":
        return 1 - done
    return 0.5 * (1 + torch.cos(torch.tensor(torch.pi * done)).item())


def _stream(batches: Batches) -> Iterator[Mapping[str, Tensor]]:
    epoch = 0
    while True:
        yield from batches.iterate(epoch)
        epoch += 1
