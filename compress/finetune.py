"""The fine-tuning stage: a model learns a task from data, whole or through an adapter."""

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from calib_data.batches import Batches, Objective
from calib_data.errors import ConfigError, DataError, ModelError
from calib_data.metrics import Measured, accuracy, spearman_of_logits
from calib_data.objectives import Masked, NextToken, Packed, Translation
from compress.adapter_plan import MERGEABLE, AdapterConfig
from compress.adapters import add_adapter, merge_adapter, refuse_adapters
from compress.checkpoint import Checkpoint, StageResult, parameter_count, weights_sha256
from compress.config import StageConfig, one_of, require
from compress.losses import hard_targets
from compress.sparsity import hold_zeros
from compress.tasks import Target
from compress.training import TrainConfig, TrainRun, train_, units

# A full model moves little; what starts from zero has far to go.
RATES = {"full": 5e-5, "lora": 5e-4, "adapter": 5e-4, "ia3": 5e-3, "prefix": 1e-2}
FROM_CONFIG_RATE = 1e-3


@dataclass(frozen=True)
class FinetuneConfig(StageConfig):
    """What is trained, and how; without an adapter the whole model."""

    adapter: AdapterConfig | None = None
    merge: bool = False  # the adapter into the weights, once trained
    train: TrainConfig = field(default_factory=lambda: TrainConfig(dropout=True))

    def __post_init__(self) -> None:
        if isinstance(self.train, dict):
            object.__setattr__(self, "train", TrainConfig.from_json(self.train))
        if isinstance(self.adapter, dict):
            object.__setattr__(self, "adapter", AdapterConfig.from_json(self.adapter))
        require(
            not self.merge or (self.adapter is not None and self.adapter.method in MERGEABLE),
            f"--merge is for --method {' and '.join(MERGEABLE)}; leave it out",
        )


def finetune_config(
    method: str,
    adapter: Mapping[str, Any],
    train: Mapping[str, Any],
    *,
    merge: bool = False,
    rate: float | None = None,
) -> FinetuneConfig:
    """Return the settings for `method`, "full" or an adapter's, from flat ones; None is not given.

    Where `train` has no learning rate it is `rate`, or the method's own of `RATES`. Dropout is on: the
    labels are few beside what a model can learn by heart.
    """
    one_of("--method", method, tuple(RATES))
    given = {name: value for name, value in adapter.items() if value not in (None, ())}
    if method == "full" and given:
        raise ConfigError(f"the method full has no --{min(given).replace('_', '-')}; leave it out")
    chosen = {name: value for name, value in train.items() if value is not None}
    defaults = {"learning_rate": rate or RATES[method], "dropout": True}
    return FinetuneConfig(
        None if method == "full" else AdapterConfig.from_json({"method": method, **given}),
        merge,
        TrainConfig.from_json({**defaults, **chosen}),
    )


def objective_of(checkpoint: Checkpoint, pack: bool) -> Objective:
    """Return what batches of text are made for, by the task's target.

    Raises `ConfigError` where texts are to be packed and the task is not to go on with them.
    """
    target = checkpoint.task_row.target
    require(
        not pack or target == "next-token",
        f"--pack is for text-generation, not for {checkpoint.task}; leave it out",
    )
    return Packed() if pack else _OBJECTIVES.get(target, lambda _: Objective())(checkpoint)


def finetune(
    checkpoint: Checkpoint,
    batches: Batches,
    config: FinetuneConfig,
    evaluation: Batches | None = None,
    progress: Callable[[float], None] = lambda loss: None,
    fresh: Collection[str] = (),
    *,
    run: TrainRun | None = None,
) -> StageResult:
    """Return a copy of `checkpoint` trained on `batches`; the input is untouched.

    `fresh` are the parameters that were drawn at random, which every method trains. `evaluation`
    chooses the best weights and is measured at the end; `run` says where the state is kept. Raises
    `ModelError` for a model that cannot be trained, `ConfigError` for batches longer than it takes.
    """
    if checkpoint.quantization:
        raise ModelError(
            "a quantized model cannot be trained, nor adapted; fine-tune first, then quantize"
        )
    refuse_adapters(checkpoint, "fine-tune")
    if config.adapter is None:
        trained = replace(checkpoint, module=copy.deepcopy(checkpoint.module))
        trained.module.requires_grad_(True)
    else:
        ids = _real_tokens(batches) if config.adapter.method == "prefix" else None
        trained = add_adapter(checkpoint, config.adapter, ids, config.train.seed, fresh)
    _check_lengths(trained, batches)
    counts = _counts(trained)

    def loss_of(batch: Mapping[str, Tensor], step: Mapping[str, float]) -> dict[str, Tensor]:
        total, unit = task_loss(trained, batch)
        return {"task": total / max(step[unit], 1.0)}

    settings = {k: v for k, v in config.to_json().items() if k not in ("train", "merge")}
    with hold_zeros(trained):
        log = train_(
            trained.module,
            loss_of,
            batches,
            config.train,
            progress,
            evaluate=None if evaluation is None else lambda: _figure(evaluate(trained, evaluation)),
            run=replace(run or TrainRun(), identity={"finetune": settings}),
        )
    trained.module.cpu()
    if config.merge:
        trained = merge_adapter(trained)
    metrics: dict[str, Any] = {**log.summary(), **counts}
    if evaluation is not None:
        metrics |= evaluate(trained, evaluation)
    done = trained.with_stage(
        "finetune",
        settings=config.to_json(),
        parent=weights_sha256(checkpoint.backbone),
        data=batches.fingerprint,
        metrics=metrics,
    )
    return StageResult(done, {**log.report(), **metrics})


def evaluate(checkpoint: Checkpoint, batches: Batches) -> dict[str, float]:
    """Return the task's mean loss on `batches` as `eval_loss`, and what people ask for besides.

    Classes: `accuracy` in percent; scores: `spearman` × 100; tokens: `perplexity`.
    """
    _check_lengths(checkpoint, batches)
    sum_of, unit = _LOSSES[_target(checkpoint)]
    measure = _MEASURES.get(_target(checkpoint))
    module = checkpoint.module
    device, training = next(module.parameters()).device, module.training
    total, count = 0.0, 0.0
    kept: list[np.ndarray] = []
    module.eval()
    with torch.inference_mode():
        for batch in batches:
            moved = {name: value.to(device) for name, value in batch.items()}
            logits = checkpoint.forward(moved)["logits"].float()
            total, count = total + float(sum_of(logits, moved)), count + units(batch)[unit]
            if measure is not None:
                kept.append(logits.cpu().numpy())
    module.train(training)
    loss = total / max(count, 1.0)
    if measure is None:
        return {
            "eval_loss": loss,
            "perplexity": float(torch.tensor(loss, dtype=torch.float64).exp()),
        }
    again = iter(kept)
    found = measure(lambda inputs: {"logits": next(again)}, batches)
    return {"eval_loss": loss, found.name: found.value}


def _figure(measured: Mapping[str, float]) -> float:
    """Return what is to be as high as possible: a metric if the task has one, else less loss."""
    found = [measured[name] for name in ("accuracy", "spearman") if name in measured]
    return found[0] if found else -measured["eval_loss"]


# --- what each target is ------------------------------------------------------------------------


def task_loss(checkpoint: Checkpoint, batch: Mapping[str, Tensor]) -> tuple[Tensor, str]:
    """Return the task's loss summed over a batch, and the unit of `training.units` it is a mean over."""
    sum_of, unit = _LOSSES[_target(checkpoint)]
    return sum_of(checkpoint.forward(batch)["logits"].float(), batch), unit


def _label_loss(target: Target) -> Callable[[Tensor, Mapping[str, Tensor]], Tensor]:
    """Return what sums the cross entropy of a batch's labels, as `hard_targets` finds them."""

    def total(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        found = hard_targets(target, {"logits": logits}, batch)
        if found is None:
            raise DataError("the batch has no labels for the task; give --data with labels")
        return F.cross_entropy(*found, reduction="sum")

    return total


def _score_loss(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Sum the squared difference of logits (B, 1) and scores (B,)."""
    return F.mse_loss(logits[:, 0], batch["scores"], reduction="sum")


# target → its loss summed over a batch, and what that is divided by
_LOSSES: dict[str, tuple[Callable[[Tensor, Mapping[str, Tensor]], Tensor], str]] = {
    "class": (_label_loss("class"), "labels"),
    "score": (_score_loss, "rows"),
    "next-token": (_label_loss("next-token"), "next"),
    "masked-token": (_label_loss("masked-token"), "labels"),
    "translation": (_label_loss("translation"), "labels"),
}
_OBJECTIVES: dict[str, Callable[[Checkpoint], Objective]] = {
    "class": lambda checkpoint: Objective(),
    "next-token": lambda checkpoint: NextToken(),
    "masked-token": lambda checkpoint: Masked(checkpoint.processor),
    "translation": lambda checkpoint: Translation(_decoder_start(checkpoint)),
}
_MEASURES: dict[str, Callable[[Any, Batches], Measured]] = {
    "class": accuracy,
    "score": spearman_of_logits,
}


def _target(checkpoint: Checkpoint) -> str:
    """Return the row of `_LOSSES`: the task's target, with scores where there are no classes."""
    target = checkpoint.task_row.target
    if target == "class" and checkpoint.config.num_labels == 1:
        return "score"
    if target not in _LOSSES:
        raise ModelError(f"a model for {checkpoint.task} cannot be fine-tuned; pass --task")
    return target


def _decoder_start(checkpoint: Checkpoint) -> int:
    start = getattr(checkpoint.config, "decoder_start_token_id", None)
    if start is None:
        raise ModelError(
            "the config names no decoder_start_token_id, which training a decoder needs; "
            "add it to config.json"
        )
    return int(start)


# --- checks and counts --------------------------------------------------------------------------


def _real_tokens(batches: Batches) -> Tensor:
    """Return (1, tokens) ids of the first batch, padding left out."""
    batch = next(iter(batches), {})
    if "input_ids" not in batch:
        raise ModelError("a prefix stands before a text, and this model reads images; use lora")
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    return ids[mask == 1].unsqueeze(0)


def _check_lengths(checkpoint: Checkpoint, batches: Batches) -> None:
    longest, limit = batches.longest, checkpoint.signature.longest
    if limit is not None and longest > limit:
        used = (checkpoint.adapters or {}).get("virtual_tokens")
        why = f", of which the prefix uses {used}" if used else ""
        raise ConfigError(
            f"{batches.examples.spec} has a text of {longest} tokens, the model takes {limit}{why}; "
            f"pass --max-length {limit} or less"
        )


def _counts(checkpoint: Checkpoint) -> dict[str, float]:
    """Return how many parameters there are, how many of them are trained, and that in percent."""
    total = parameter_count(checkpoint.module)
    trained = sum(p.numel() for p in checkpoint.module.parameters() if p.requires_grad)
    return {"parameters": total, "trained": trained, "trained_percent": 100 * trained / total}
