"""Distillation losses and the tasks' own, each a function of tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.tasks import Target


def hard_loss(
    target: Target, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]
) -> Tensor | None:
    """Return the task's cross entropy, or None where the task or the batch has no labels.

    Classes: logits (batch, classes) against labels (batch,). Next tokens: logits
    (batch, sequence, vocabulary) against the ids one further on, padding left out.
    """
    if target == "class" and "labels" in batch:
        return F.cross_entropy(outputs["logits"], batch["labels"])
    if target == "next-token":
        labels = batch["input_ids"][:, 1:]
        if "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
        return F.cross_entropy(outputs["logits"][:, :-1].flatten(0, 1), labels.flatten())
    return None


def soft_cross_entropy(
    student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None = None
) -> Tensor:
    """Return T² × KL(teacher ‖ student) of softened logits (…, classes), averaged over positions.

    Hinton et al. 2015, arXiv:1503.02531: T² keeps the gradients' size independent of T. Positions
    where `mask` (…) is 0 do not count.
    """
    log_student = F.log_softmax(student / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher / temperature, dim=-1)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1)
    return temperature**2 * _masked_mean(divergence, mask)


def hidden_state_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared difference of hidden states (batch, sequence, width), padding left out.

    Divided by the teacher's mean square, so that layers of different size weigh alike.
    """
    difference = _masked_mean((student - teacher).square().mean(dim=-1), mask)
    return difference / _masked_mean(teacher.square().mean(dim=-1), mask).clamp(min=1e-12)


def embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 − cosine of sentence embeddings (batch, width), averaged over the batch."""
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of the batch's cosine similarity matrices.

    What retrieval sees (Tung and Mori 2019, arXiv:1907.09682, there with row-normalised products);
    widths may differ. A batch of one has no pairs and gives 0.
    """
    if student.shape[0] < 2:
        return student.sum() * 0
    mine, theirs = (F.normalize(x, dim=-1) for x in (student, teacher))
    pairs = ~torch.eye(student.shape[0], dtype=torch.bool, device=student.device)
    return (mine @ mine.t() - theirs @ theirs.t())[pairs].square().mean()


def _masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean()
    return (values * mask).sum() / mask.sum().clamp(min=1)
