"""The distillation stage: a student learns to behave like its teacher."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from calib_data.batches import Batches
from calib_data.errors import ConfigError, ModelError
from compress import losses
from compress.checkpoint import Checkpoint, StageResult, parameter_count, weights_sha256
from compress.config import StageConfig, require
from compress.students import captured_layers, evenly_spaced, layer_stack
from compress.training import TrainConfig, TrainRun, train_, training_device, units

LOSSES = ("logits", "hidden", "embedding", "similarity")
# what is matched when --losses is not given, by the task's output
_DEFAULT = {"sentence_embedding": ("embedding", "similarity", "hidden"), "logits": ("logits",)}


@dataclass(frozen=True)
class DistillConfig(StageConfig):
    """What the student matches, and how it is trained."""

    losses: tuple[str, ...] = ()  # name or name=weight; empty: the task's default
    temperature: float = 3.0  # of the softened logits
    alpha: float = 0.7  # weight of the softened logits; 1 − alpha that of the labels
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if isinstance(self.train, dict):
            object.__setattr__(self, "train", TrainConfig.from_json(self.train))
        require(self.temperature > 0, f"--temperature must be above 0, got {self.temperature}")
        require(0 <= self.alpha <= 1, f"--alpha must be in [0, 1], got {self.alpha}")
        self.weights(())

    def weights(self, default: tuple[str, ...]) -> dict[str, float]:
        """Return the losses' weights by name, `default` where none are set."""
        weights = {}
        for text in self.losses or default:
            name, _, value = text.partition("=")
            require(name in LOSSES, f"unknown loss {name!r}; there are {', '.join(LOSSES)}")
            try:
                weights[name] = float(value) if value else 1.0
            except ValueError as error:
                raise ConfigError(
                    f"the weight of the loss {name} is no number: {value!r}"
                ) from error
        return weights


def distill(
    teacher: Checkpoint,
    student: Checkpoint,
    batches: Batches,
    config: DistillConfig,
    progress: Callable[[float], None] = lambda loss: None,
    *,
    evaluate: Callable[[Checkpoint], float] | None = None,
    run: TrainRun | None = None,
) -> StageResult:
    """Return a trained copy of `student` that matches `teacher` on `batches`; both are untouched.

    `evaluate` judges the student in training (see `train_`); `run` says where its state is kept.
    Raises `ModelError` where the two cannot be compared: different tasks, label sets, vocabularies
    or widths for the losses chosen.
    """
    weights = config.weights(_DEFAULT.get(teacher.output, ("hidden",)))
    _check_pair(teacher, student, weights, batches)
    trained = replace(student, module=copy.deepcopy(student.module))
    teacher.module.to(training_device())
    teacher_hash = weights_sha256(teacher.backbone)
    losses_config = {k: v for k, v in config.to_json().items() if k != "train"}
    run = replace(run or TrainRun(), identity={"teacher": teacher_hash, "distill": losses_config})
    for parameter in trained.module.parameters():
        parameter.requires_grad_(True)

    def loss_of(batch: Mapping[str, Tensor], step: Mapping[str, float]) -> dict[str, Tensor]:
        return distillation_terms(teacher, trained, batch, weights, config, step)

    log = train_(
        trained.module,
        loss_of,
        batches,
        config.train,
        progress,
        evaluate=(lambda: evaluate(trained)) if evaluate else None,
        run=run,
    )
    teacher.module.cpu()
    trained.module.cpu()
    report = {
        **log.report(),
        "parameters_teacher": parameter_count(teacher.backbone),
        "parameters_student": parameter_count(trained.backbone),
    }
    return StageResult(
        trained.with_stage(
            "distill",
            settings={**config.to_json(), "weights": weights},
            parent=weights_sha256(student.backbone),
            teacher=teacher_hash,
            data=batches.fingerprint,
            metrics=log.summary(),
        ),
        report,
    )


def distillation_terms(
    teacher: Checkpoint,
    student: Checkpoint,
    batch: Mapping[str, Tensor],
    weights: Mapping[str, float],
    config: DistillConfig,
    step: Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """Return the chosen losses on one batch, weighted, each a scalar.

    `step` are the units of the whole step (`training.units`); None: of this batch alone.
    """
    layers = "hidden" in weights
    with torch.no_grad():
        theirs, their_layers = _run(teacher, batch, layers)
    mine, my_layers = _run(student, batch, layers)
    mask = batch.get("attention_mask")
    output = student.output
    parts: dict[str, Tensor] = {}
    if "logits" in weights:
        logits, wanted = mine["logits"], theirs["logits"]
        token_mask = mask if logits.dim() == 3 else None
        soft = losses.soft_cross_entropy(logits, wanted, config.temperature, token_mask)
        hard = losses.hard_loss(student.task_row.target, mine, batch)
        parts["logits"] = soft if hard is None else config.alpha * soft + (1 - config.alpha) * hard
    if "embedding" in weights:
        parts["embedding"] = losses.embedding_loss(mine[output], theirs[output])
    if "similarity" in weights:
        parts["similarity"] = losses.similarity_loss(mine[output], theirs[output])
    if layers:
        parts["hidden"] = torch.stack(
            [
                losses.hidden_state_loss(my_layers[i], their_layers[j], mask)
                for i, j in enumerate(layer_map(len(my_layers), len(their_layers)))
            ]
        ).mean()
    own = units(batch)
    whole = step or own
    kind = {"logits": "tokens" if mine["logits"].dim() == 3 else "rows"} if "logits" in mine else {}
    kind |= {"embedding": "rows", "similarity": "rows", "hidden": "tokens"}
    return {
        name: weights[name] * own[kind[name]] / whole[kind[name]] * value
        for name, value in parts.items()
    }


def layer_map(student: int, teacher: int) -> list[int]:
    """Return, for each student layer, the teacher layer it matches: evenly spaced, last to last."""
    if student > teacher:
        raise ModelError(f"the student has {student} layers, the teacher only {teacher}")
    if student == 1:
        return [teacher - 1]
    return evenly_spaced(teacher, student)


def _run(
    checkpoint: Checkpoint, batch: Mapping[str, Tensor], layers: bool
) -> tuple[dict[str, Tensor], list[Tensor]]:
    if not layers:
        return checkpoint.forward(batch), []
    with captured_layers(checkpoint.backbone) as captured:
        return checkpoint.forward(batch), captured


def _check_pair(
    teacher: Checkpoint, student: Checkpoint, weights: Mapping[str, Any], batches: Batches
) -> None:
    if teacher.task != student.task:
        raise ModelError(
            f"the teacher is for {teacher.task}, the student for {student.task}; pass --task"
        )
    if student.quantization or any(p.dtype == torch.int8 for p in student.module.buffers()):
        raise ModelError("a quantized student cannot be trained; distill first, then quantize")
    sizes = [c.signature.vocabulary for c in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"the student knows {sizes[0]} token ids, the teacher {sizes[1]}; "
            "both must belong to one tokenizer"
        )
    sample = student.signature.sample(batch=2, sequence=4)
    mine, theirs = student.predict(sample), teacher.predict(sample)
    for name, needed in (("logits", "logits"), ("embedding", student.output)):
        if name in weights and (needed not in mine or mine[needed].shape != theirs[needed].shape):
            raise ModelError(
                f"the loss {name!r} needs the same {needed} of both: the student gives "
                f"{mine[needed].shape[1:] if needed in mine else 'none'}, the teacher "
                f"{theirs[needed].shape[1:] if needed in theirs else 'none'}"
            )
    for name in ("embedding", "similarity"):
        if name in weights and mine[student.output].ndim != 2:
            raise ModelError(f"the loss {name!r} needs one vector per example, as encoders give")
    if "hidden" in weights:
        widths = {_width(c.backbone) for c in (teacher, student)}
        if len(widths) > 1:
            raise ModelError(f"the loss 'hidden' needs equal widths, got {sorted(widths)}")
        layer_map(len(layer_stack(student.backbone)[1]), len(layer_stack(teacher.backbone)[1]))


def _width(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.hidden_size)
