"""A module around a transformer that changes what goes in and out, not what is computed inside."""

from typing import Any

from torch import nn


class Wrapper(nn.Module):
    """Holds a whole transformer as `backbone`: names of its modules and weights stay the same there."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    @property
    def config(self) -> Any:
        """The transformer's config."""
        return self.backbone.config
