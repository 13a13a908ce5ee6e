"""Bottleneck adapters: small layers after the projections of a model that itself stays as it is."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.blocks import features


class BottleneckAdapter(nn.Module):
    """A linear layer whose output y becomes y + up(gelu(down(y))).

    Houlsby et al. 2019, arXiv:1902.00751: such layers after the attention's and the feed-forward's
    output projections, before the residual connection; Pfeiffer et al. 2021, arXiv:2005.00247: after
    the feed-forward's alone. `up` starts at zero, so that nothing changes at first.
    """

    def __init__(self, base_layer: Any, bottleneck: int) -> None:
        super().__init__()
        width, like = features(base_layer)[1], base_layer.weight
        self.base_layer = base_layer
        self.down = nn.Linear(width, bottleneck, device=like.device, dtype=like.dtype)
        self.up = nn.Linear(bottleneck, width, device=like.device, dtype=like.dtype)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    @property
    def weight(self) -> Tensor:
        """The projection's own weight: some models read its dtype."""
        weight: Tensor = self.base_layer.weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, inputs) to (…, outputs)."""
        y = self.base_layer(x)
        return torch.add(y, self.up(F.gelu(self.down(y))))
