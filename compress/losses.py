"""The formulas of distillation, and the tasks' own losses: functions of tensors, each with its source.

A formula gives one number per position (a row, a token), not their mean: what a step's mean is over
is known only to the step (see `training.units`). Half precision is computed in float32.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.tasks import Target

_SMALL = 1e-9  # below it a probability is taken for zero


def hard_loss(
    target: Target, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]
) -> Tensor | None:
    """Return the task's mean cross entropy, or None where the task or the batch has no labels."""
    found = hard_targets(target, outputs, batch)
    return None if found is None else F.cross_entropy(*found)


def hard_targets(
    target: Target, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor] | None:
    """Return the logits (N, classes) and labels (N,) that count, or None where there are no labels.

    Labels (batch,) or (batch, sequence) have the logits' shape but for the classes, and −100 where
    none counts. For next tokens they are the ids (or `labels`) one further on, padding left out.
    """
    logits, labels = outputs.get("logits"), batch.get("labels")
    if logits is None:
        return None
    if target == "next-token":
        following = next_labels(batch)
        logits, labels = logits[:, :-1], following
    if labels is None or labels.shape != logits.shape[:-1]:
        return None
    counts = labels != -100
    return logits[counts], labels[counts]


def next_labels(batch: Mapping[str, Tensor]) -> Tensor:
    """Return what follows each token but the last, (batch, sequence − 1); −100 next to padding.

    That is the next id, or where the batch holds `labels` (batch, sequence) the next of those: with
    −100 for a prompt only its continuation counts.
    """
    ids, labels, mask = batch["input_ids"], batch.get("labels"), batch.get("attention_mask")
    following = (ids if labels is None or labels.shape != ids.shape else labels)[:, 1:]
    if mask is None:
        return following
    return following.masked_fill(mask[:, 1:] * mask[:, :-1] == 0, -100)


# --- distributions: logits (…, classes) in, (…) out -------------------------------------------------


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T² × KL(teacher ‖ student) of the logits softened by T.

    Hinton et al. 2015, arXiv:1503.02531: T² keeps the gradients' size independent of T.
    """
    log_student, log_teacher = (
        _log_softmax(student, temperature),
        _log_softmax(teacher, temperature),
    )
    return temperature**2 * _kl(log_teacher, log_student)


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T² × KL(student ‖ teacher), which seeks the teacher's modes.

    Gu et al. 2023 (MiniLLM), arXiv:2306.08543: a small student that cannot cover all that a
    generative teacher might say puts its weight on what the teacher finds likely.
    """
    log_student, log_teacher = (
        _log_softmax(student, temperature),
        _log_softmax(teacher, temperature),
    )
    return temperature**2 * _kl(log_student, log_teacher)


def jensen_shannon(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, beta: float = 0.5
) -> Tensor:
    """Return T² × the generalised Jensen–Shannon divergence, at most T² × log 2.

    β KL(teacher ‖ m) + (1 − β) KL(student ‖ m) with m = β teacher + (1 − β) student: Agarwal et al.
    2023 (GKD), arXiv:2306.13649. Towards β = 0 it behaves as the forward, towards 1 as the reverse
    divergence.
    """
    log_student, log_teacher = (
        _log_softmax(student, temperature),
        _log_softmax(teacher, temperature),
    )
    log_beta, log_rest = (torch.tensor(x, dtype=log_student.dtype).log() for x in (beta, 1 - beta))
    mixture = torch.logaddexp(log_teacher + log_beta, log_student + log_rest)
    divergence = beta * _kl(log_teacher, mixture) + (1 - beta) * _kl(log_student, mixture)
    return temperature**2 * divergence


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference over the last axis: of logits, or of one predicted number.

    Ba and Caruana 2014, arXiv:1312.6184.
    """
    return (_full(student) - _full(teacher)).square().mean(dim=-1)


# --- hidden states and embeddings: (…, width) in, (…) out -------------------------------------------


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Return |student − teacher|² / |teacher|² over the last axis.

    The squared error of Romero et al. 2015 (FitNets), arXiv:1412.6550, relative so that layers, and
    tokens within a layer, weigh alike whatever their size: a decoder's first token may be a thousand
    times larger than the rest.
    """
    teacher = _full(teacher)
    error = (_full(student) - teacher).square().sum(dim=-1)
    return error / teacher.square().sum(dim=-1).clamp(min=1e-12)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 − cosine over the last axis.

    Of hidden states: Sanh et al. 2019 (DistilBERT), arXiv:1910.01108.
    """
    return 1 - F.cosine_similarity(_full(student), _full(teacher), dim=-1)


def similarity_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Return, per row, the mean squared difference of its cosines with the batch's other rows, (B,).

    What retrieval sees (Tung and Mori 2019, arXiv:1907.09682, there with row-normalised products);
    widths may differ. A batch of one has no pairs and gives 0.
    """
    rows = student.shape[0]
    mine, theirs = (F.normalize(_full(x), dim=-1) for x in (student, teacher))
    squares = (mine @ mine.t() - theirs @ theirs.t()).square()  # (B, B)
    others = ~torch.eye(rows, dtype=torch.bool, device=student.device)
    return (squares * others).sum(dim=1) / max(rows - 1, 1)


def neighbour_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return, per row, how far the student ranks the batch's teacher embeddings as the teacher does.

    KL(p ‖ q) with p the softmax of the teacher's cosines of this row with all rows' teacher
    embeddings, its own among them, and q the same with the student's embedding of this row: InfoNCE
    (arXiv:1807.03748) whose positives are the teacher's own embedding and, softly, its neighbours,
    as in Fang et al. 2021 (SEED), arXiv:2101.04731, with the batch for their queue. Its gradient is
    that of their cross entropy; the divergence is 0 where the two agree.
    """
    mine, theirs = (F.normalize(_full(x), dim=-1) for x in (student, teacher))
    return _kl(
        _log_softmax(theirs @ theirs.t(), temperature), _log_softmax(mine @ theirs.t(), temperature)
    )


# --- attention: (B, heads, T, …) in, (B, T) out -----------------------------------------------------


def map_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher ‖ student) of attention maps (B, H, T, T), averaged over heads.

    Wang et al. 2020 (MiniLM), arXiv:2002.10957. Where the numbers of heads differ, each side's maps
    are averaged over its heads first: a mean of distributions is one.
    """
    if student.shape[1] != teacher.shape[1]:
        student, teacher = (x.mean(dim=1, keepdim=True) for x in (student, teacher))
    student, teacher = _full(student), _full(teacher)
    difference = teacher.clamp(min=_SMALL).log() - student.clamp(min=_SMALL).log()
    return (teacher * difference).sum(dim=-1).mean(dim=1)


def relation_divergence(
    student: Tensor, teacher: Tensor, heads: int, mask: Tensor | None = None
) -> Tensor:
    """Return KL(teacher ‖ student) of self-attention relations, averaged over relation heads.

    Of queries, keys or values (B, H, T, D): all heads side by side are cut into `heads` relation
    heads anew, so numbers of heads and widths may differ; a relation is the softmax of the scaled
    products of every token's vector with every other's. Wang et al. 2021 (MiniLMv2),
    arXiv:2012.15828. Tokens where `mask` (B, T) is 0 are related to by none.
    """
    log_student, log_teacher = (_log_relations(x, heads, mask) for x in (student, teacher))
    return _kl(log_teacher, log_student).mean(dim=1)


def _log_relations(x: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """Return the logarithm of the relations, (B, heads, T, T)."""
    batch, _, length, _ = x.shape
    x = _full(x).transpose(1, 2).reshape(batch, length, heads, -1).transpose(1, 2)  # (B, R, T, d)
    scores = x @ x.transpose(-1, -2) / x.shape[-1] ** 0.5
    if mask is not None:  # half the lowest: the difference of two such is still a number
        lowest = torch.finfo(scores.dtype).min / 2
        scores = scores.masked_fill(mask[:, None, None, :] == 0, lowest)
    return F.log_softmax(scores, dim=-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p ‖ q) over the last axis."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(_full(logits) / temperature, dim=-1)


def _full(x: Tensor) -> Tensor:
    """Return half precision as float32: a sum over thousands of classes needs the digits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
