"""Modules by factory, as users hand them over: `tests.compress.factories:mixer`."""

from typing import Any, ClassVar

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


class Slots(nn.Module):
    """Attention under names of its own, that a description tells."""

    onnxpress_blocks: ClassVar = {
        "heads": {
            "query": "ask",
            "key": "offer",
            "value": "give",
            "out": "mix",
            "width": "per_slot",
            "follow": ["slots"],
        }
    }

    def __init__(self, slots: int, per_slot: int) -> None:
        super().__init__()
        self.slots, self.per_slot = slots, per_slot
        wide = slots * per_slot
        self.ask, self.offer, self.give = (nn.Linear(16, wide) for _ in range(3))
        self.mix = nn.Linear(wide, 16)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, sequence, 16) to the same."""
        q, k, v = (
            f(x).reshape(*x.shape[:2], self.slots, self.per_slot).transpose(1, 2)
            for f in (self.ask, self.offer, self.give)
        )
        found = nn.functional.scaled_dot_product_attention(
            q, k, v
        )  # (batch, slots, sequence, width)
        return self.mix(found.transpose(1, 2).flatten(2))


class Fused(nn.Module):
    """Attention whose one projection holds each head's query, key and value side by side."""

    onnxpress_blocks: ClassVar = {"heads": {"fused": "all", "copies": 1, "out": "mix", "width": 4}}

    def __init__(self) -> None:
        super().__init__()
        self.all, self.mix = nn.Linear(16, 3 * 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, sequence, 16) to the same."""
        q, k, v = self.all(x).unflatten(-1, (-1, 12)).transpose(1, 2).split(4, dim=-1)
        found = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.mix(found.transpose(1, 2).flatten(2))


class Step(nn.Module):
    """A block: attention and a gated feed-forward one."""

    onnxpress_blocks: ClassVar = {"neurons": {"up": ["grow"], "down": "shrink", "copies": 2}}

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.look = attention
        self.grow, self.shrink = nn.Linear(16, 2 * 24), nn.Linear(24, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, sequence, 16) to the same."""
        x = x + self.look(self.norm(x))
        gate, up = self.grow(x).chunk(2, dim=-1)
        return x + self.shrink(gate.sigmoid() * up)


class Steps(nn.Module):
    """Blocks of unusual names on a residual stream."""

    onnxpress_blocks: ClassVar = {"layers": ["steps"]}

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.steps = nn.ModuleList([Step(Slots(4, 6)), Step(Fused()), Step(Slots(2, 8))])
        self.out = nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (batch, sequence) to scores (batch, sequence, 5)."""
        x = self.table(ids)
        for step in self.steps:
            x = step(x)
        return self.out(x)


def steps() -> Any:
    """A transformer that describes its blocks."""
    torch.manual_seed(0)
    axes = {"ids": {0: "batch", 1: "sequence"}}
    return Steps(), {"ids": torch.arange(12).reshape(2, 6)}, axes
