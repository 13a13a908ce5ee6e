"""The distillation stage: a student learns to behave like its teacher."""

import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from calib_data.batches import Batches
from compress.checkpoint import Checkpoint, StageResult, parameter_count, weights_sha256
from compress.distill_config import DistillConfig
from compress.loss_table import loss_terms
from compress.matching import Scene
from compress.observe import Observed, Observer, observe
from compress.pairing import Pairing, pair_up, teacher_side
from compress.sparsity import hold_zeros
from compress.teacher_cache import TeacherCache, kept_for
from compress.training import TrainConfig, TrainRun, train_

__all__ = [
    "AskTeacher",
    "DistillConfig",
    "Distillation",
    "cached_teacher",
    "distill",
    "prepare",
    "running_teacher",
]


@dataclass(frozen=True)
class Distillation:
    """A student beside its teacher, as a loss of batches."""

    student: Checkpoint
    teacher: Observer
    pairing: Pairing
    config: DistillConfig

    def terms(self, batch: Mapping[str, Tensor], step: Mapping[str, float]) -> dict[str, Tensor]:
        """Return the losses on one batch, weighted, each a scalar; `step` are its step's units."""
        pairing = self.pairing
        theirs = self.teacher(batch) if pairing.teacher_needs else Observed()
        mine = observe(self.student, batch, pairing.student_needs)
        scene = Scene(batch, mine, theirs, pairing.setup)
        return loss_terms(scene, pairing.weights, self.config, step)


# How a teacher is asked for what the losses need to see of it.
AskTeacher = Callable[[Checkpoint, Pairing], Observer]


def running_teacher(teacher: Checkpoint, pairing: Pairing) -> Observer:
    """Return what runs `teacher` on a batch, without gradients, where the batch is."""

    @torch.no_grad()  # not inference mode: its tensors cannot meet those of a backward pass
    def ask(batch: Mapping[str, Tensor]) -> Observed:
        device = next(iter(batch.values())).device
        weights = itertools.chain(teacher.module.parameters(), teacher.module.buffers())
        if next(weights).device != device:
            teacher.module.to(device)
        return observe(teacher, teacher_side(batch), pairing.teacher_needs)

    return ask


def cached_teacher(batches: Batches, folder: Path, train: TrainConfig) -> AskTeacher:
    """Return what runs a teacher once for each row of `batches` and remembers in `folder`.

    The batches that are trained on must say their rows (`Batches.numbered`). Raises what
    `TeacherCache` and `kept_for` raise, once the teacher is asked for.
    """
    epochs = train.total_steps(len(batches)) * train.accumulate / len(batches)

    def ask(teacher: Checkpoint, pairing: Pairing) -> Observer:
        return TeacherCache(
            teacher,
            running_teacher(teacher, pairing),
            batches,
            kept_for(pairing),
            folder,
            settings={"precision": train.precision},
            reached=epochs,
        )

    return ask


def distill(
    teacher: Checkpoint,
    student: Checkpoint,
    batches: Batches,
    config: DistillConfig,
    progress: Callable[[float], None] = lambda loss: None,
    ask_teacher: AskTeacher = running_teacher,
    *,
    evaluate: Callable[[Checkpoint], float] | None = None,
    run: TrainRun | None = None,
) -> StageResult:
    """Return a trained copy of `student` that matches `teacher` on `batches`; both are untouched.

    Learned projections between layers of different widths are trained beside the student and
    dropped. `evaluate` judges the student in training (see `train_`); `run` says where its state is
    kept. Raises `ModelError` where the two cannot be compared: different tasks, label sets,
    vocabularies or widths for the losses chosen; `DataError` for missing labels.
    """
    trained = replace(student, module=copy.deepcopy(student.module))
    teacher_hash = weights_sha256(teacher.backbone)
    losses_config = {k: v for k, v in config.to_json().items() if k != "train"}
    run = replace(run or TrainRun(), identity={"teacher": teacher_hash, "distill": losses_config})
    for parameter in trained.module.parameters():
        parameter.requires_grad_(True)
    made = prepare(teacher, trained, batches, config, ask_teacher)
    projections = made.pairing.setup.projections
    module = nn.ModuleDict({"student": trained.module, "projections": projections})
    try:
        with hold_zeros(trained):
            log = train_(
                module,
                made.terms,
                batches,
                config.train,
                progress,
                evaluate=(lambda: evaluate(trained)) if evaluate else None,
                run=run,
            )
    finally:
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
            settings={**config.to_json(), "weights": made.pairing.weights},
            parent=weights_sha256(student.backbone),
            teacher=teacher_hash,
            data=batches.fingerprint,
            metrics=log.summary(),
        ),
        report,
    )


def prepare(
    teacher: Checkpoint,
    student: Checkpoint,
    batches: Batches,
    config: DistillConfig,
    ask_teacher: AskTeacher = running_teacher,
) -> Distillation:
    """Return the loss that trains `student`; raises what `distill` raises before it trains."""
    pairing = pair_up(teacher, student, batches, config)
    asked = ask_teacher(teacher, pairing)
    return Distillation(student, asked, pairing, config)
