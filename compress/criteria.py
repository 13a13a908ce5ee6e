"""Importance of units."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from compress.blocks import Group
from compress.checkpoint import Checkpoint
from compress.importance import gradient_importance

CRITERIA = ("fisher", "taylor", "gradient", "magnitude", "wanda", "random")


def unit_importance(
    checkpoint: Checkpoint,
    groups: Sequence[Group],
    batches: Iterable[Mapping[str, Tensor]],
    criterion: str = "fisher",
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Return what removing each unit costs."""
    found = gradient_importance(checkpoint, tuple(groups), batches, seed, progress)
    return {key: value.square() for key, value in found.items()}
