"""Stacks of transformer layers."""

from torch import nn


def droppable_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the stacks whose layers can be dropped."""
    return {}
