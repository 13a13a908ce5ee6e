"""Modules by factory, as users hand them over: `tests.compress.factories:mixer`."""

from typing import Any

import torch
from torch import Tensor, nn


class Mixer(nn.Module):
    """An embedding, attention-free mixing, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)
        self.out = nn.Linear(16, 3)

    def forward(self, ids: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """Map ids (batch, sequence) and scale (batch, 16) to scores (batch, 3)."""
        x = self.table(ids)  # (batch, sequence, 16)
        x = x + self.fc2(torch.relu(self.fc1(x)))
        x = x.mean(dim=1) * scale
        return {"scores": self.out(x), "features": x}


def mixer() -> Any:
    """Example inputs as a dict."""
    torch.manual_seed(0)
    return Mixer(), {"ids": torch.arange(12).reshape(2, 6), "scale": torch.randn(2, 16)}


def mixer_tuple() -> Any:
    """Example inputs as a tuple, in the order of forward, and dynamic axes."""
    module, examples = mixer()
    axes = {"ids": {0: "batch", 1: "sequence"}, "scale": {0: "batch"}}
    return module, tuple(examples.values()), axes


def nothing() -> Any:
    """Not what a factory must return."""
    return nn.Linear(2, 2)


def text_examples() -> Any:
    """Inputs that are no tensors."""
    return Mixer(), {"ids": "the cat"}


def failing() -> Any:
    """Raises."""
    raise RuntimeError("the weights\nare elsewhere")


def infinite() -> Any:
    """Weights that are not finite."""
    module, examples = mixer()
    nn.init.constant_(module.out.weight, float("inf"))
    return module, examples
