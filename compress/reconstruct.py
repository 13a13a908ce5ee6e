"""Reconstruction."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from compress.blocks import Group
from compress.checkpoint import Checkpoint
from compress.plan import PrunePlan


def moments(
    checkpoint: Checkpoint,
    groups: Sequence[Group],
    batches: Iterable[Mapping[str, Tensor]],
    progress: Callable[[], None] = lambda: None,
) -> Mapping[str, Any]:
    """Return moments."""
    return {}


def reconstruct_(
    pruned: Checkpoint, source: Checkpoint, plan: PrunePlan, moments: Mapping[str, Any]
) -> dict[str, float]:
    """Update in place."""
    return {}
