"""The losses of distillation, one row each: what it compares, its formula, its usual weight."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from calib_data.errors import ConfigError
from compress import losses, matching
from compress.matching import Kind, Match, Scene
from compress.observe import Need


class Formulas(Protocol):
    """The numbers in the formulas."""

    @property
    def temperature(self) -> float:
        """Of softened logits."""

    @property
    def beta(self) -> float:
        """The teacher's share in the mixture of jsd."""

    @property
    def contrast_temperature(self) -> float:
        """Of the cosines of contrastive."""

    @property
    def relation_heads(self) -> int:
        """How many heads relations are cut into; 0 for as many as fit."""


@dataclass(frozen=True)
class Loss:
    """A row: `values` gives a number per position of a match."""

    kind: Kind
    values: Callable[[Match, Formulas], Tensor]
    weight: float = 1.0


def _relations(match: Match, settings: Formulas) -> Tensor:
    heads = relation_heads(match.student, match.teacher, settings.relation_heads)
    return losses.relation_divergence(match.student, match.teacher, heads, match.mask)


LOSSES: dict[str, Loss] = {
    "logits": Loss(
        matching.DISTRIBUTION, lambda m, s: losses.forward_kl(m.student, m.teacher, s.temperature)
    ),
    "reverse-kl": Loss(
        matching.DISTRIBUTION, lambda m, s: losses.reverse_kl(m.student, m.teacher, s.temperature)
    ),
    "jsd": Loss(
        matching.DISTRIBUTION,
        lambda m, s: losses.jensen_shannon(m.student, m.teacher, s.temperature, s.beta),
    ),
    "logits-mse": Loss(
        matching.LOGITS, lambda m, s: losses.squared_error(m.student, m.teacher)
    ),
    "hard": Loss(
        matching.LABELS, lambda m, s: F.cross_entropy(m.student, m.teacher, reduction="none")
    ),
    "hidden": Loss(matching.LAYERS, lambda m, s: losses.relative_error(m.student, m.teacher)),
    "hidden-cosine": Loss(
        matching.LAYERS, lambda m, s: losses.cosine_distance(m.student, m.teacher)
    ),
    "attention": Loss(matching.MAPS, lambda m, s: losses.map_divergence(m.student, m.teacher)),
    "relations": Loss(matching.RELATIONS, _relations),
    "embedding": Loss(
        matching.SAME_VECTOR, lambda m, s: losses.cosine_distance(m.student, m.teacher)
    ),
    "similarity": Loss(
        matching.VECTOR, lambda m, s: losses.similarity_difference(m.student, m.teacher)
    ),
    "contrastive": Loss(
        matching.SAME_VECTOR,
        lambda m, s: losses.neighbour_divergence(m.student, m.teacher, s.contrast_temperature),
    ),
}  # fmt: skip
# mixed with the labels' loss by alpha
SOFT = ("logits", "reverse-kl", "jsd")


def needs(weights: Mapping[str, float], of: str) -> frozenset[Need]:
    """Return what must be seen `of` the "student" or the "teacher" for these losses."""
    found = (LOSSES[name].kind for name in weights)
    return frozenset().union(*(kind.student if of == "student" else kind.teacher for kind in found))


def loss_terms(
    scene: Scene, weights: Mapping[str, float], settings: Formulas, step: Mapping[str, float]
) -> dict[str, Tensor]:
    """Return the weighted losses by name, each a scalar: its sum over the batch by the step's units.

    The terms of a step's batches therefore add up to those of one large batch; but similarity and
    contrastive compare the rows of one batch with each other, and see no further than that.
    """
    terms = {}
    for name, weight in weights.items():
        loss = LOSSES[name]
        parts = [
            match.share * match.total(loss.values(match, settings)) / max(step[match.unit], 1.0)
            for match in loss.kind.match(scene)
        ]
        terms[name] = weight * torch.stack(parts).sum()
    return terms


def relation_heads(student: Tensor, teacher: Tensor, asked: int = 0) -> int:
    """Return how many relation heads to cut two tensors (B, H, T, D) into: `asked`, if it is not 0.

    By itself the largest number, up to the teacher's heads, that divides both widths. Raises
    `ConfigError` where `asked` does not.
    """
    widths = [x.shape[1] * x.shape[3] for x in (student, teacher)]
    common = math.gcd(*widths)
    if asked and common % asked:
        fitting = [heads for heads in range(1, common + 1) if common % heads == 0]
        raise ConfigError(
            f"--relation-heads {asked} does not divide the widths {widths[0]} (student) and "
            f"{widths[1]} (teacher); use one of {', '.join(map(str, fitting))}"
        )
    return asked or max(h for h in range(1, teacher.shape[1] + 1) if common % h == 0)
