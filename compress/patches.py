"""Convolutions over patches as what they are: one linear layer on each patch."""

from typing import cast

import torch
from torch import Tensor, nn


class Patches(nn.Module):
    """A convolution whose kernels lie side by side: pixels are cut into patches, and `linear` maps each.

    `linear` takes (…, channels × height × width of a patch), and may be float or quantized.
    """

    def __init__(self, linear: nn.Module, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.linear, self.channels, self.size = linear, channels, size

    @property
    def weight(self) -> Tensor:
        """The float kernels (out, channels, height, width): CLIP gives its pixels their dtype."""
        linear = self.linear
        matrix = linear.weight if isinstance(linear, nn.Linear) else linear.dequantize()  # type: ignore[operator]
        return matrix.unflatten(1, (self.channels, *self.size))

    @property
    def bias(self) -> Tensor | None:
        """The float bias (out,)."""
        linear = self.linear
        found = linear.bias if isinstance(linear, nn.Linear) else linear.dequantized_bias()  # type: ignore[operator]
        return found

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (batch, channels, H, W) to (batch, out, H / height, W / width), a rest cut off."""
        down, across = pixels.shape[2] // self.size[0], pixels.shape[3] // self.size[1]
        pixels = pixels[:, :, : down * self.size[0], : across * self.size[1]]
        cut = pixels.unflatten(3, (across, self.size[1])).unflatten(2, (down, self.size[0]))
        rows = cut.permute(0, 2, 4, 1, 3, 5)  # (batch, down, across, channels, height, width)
        vectors: Tensor = self.linear(rows.flatten(3))  # (batch, down, across, out)
        return vectors.permute(0, 3, 1, 2)


def is_over_patches(module: nn.Module) -> bool:
    """Whether `module` is a convolution of images that sees each pixel once, in one patch."""
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == module.stride
        and module.padding in ((0, 0), "valid")
        and module.dilation == (1, 1)
        and module.groups == 1
    )


def as_patches(conv: nn.Conv2d) -> Patches:
    """Return a module that computes the same as `conv`, with a copy of its weights."""
    height, width = conv.kernel_size
    with torch.device(conv.weight.device):
        linear = nn.Linear(
            conv.in_channels * height * width, conv.out_channels, conv.bias is not None
        )
    linear.weight.data = conv.weight.detach().flatten(1).clone()
    if conv.bias is not None:
        linear.bias.data = conv.bias.detach().clone()
    return Patches(linear, conv.in_channels, (height, width))


def as_convolution(patches: Patches) -> nn.Conv2d:
    """Return the convolution that `as_patches` was given: the way back for one that stays float."""
    weight, bias = patches.weight, patches.bias
    with torch.device(weight.device):
        conv = nn.Conv2d(
            patches.channels, len(weight), patches.size, patches.size, bias=bias is not None
        )
    conv.weight.data = weight.detach().clone()
    if bias is not None:
        assert conv.bias is not None
        conv.bias.data = bias.detach().clone()
    return conv


def unfold_patches_(model: nn.Module, only: str | None = None) -> None:
    """Make convolutions over patches `Patches`: all, or the one whose linear layer `only` names."""
    for name, module in list(model.named_modules()):
        if is_over_patches(module) and only in (None, f"{name}.linear"):
            _put_(model, name, as_patches(cast(nn.Conv2d, module)))


def fold_float_patches_(model: nn.Module) -> None:
    """Make those `Patches` convolutions again whose linear layer was left float."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Patches) and isinstance(module.linear, nn.Linear):
            _put_(model, name, as_convolution(module))


def shown_names(model: nn.Module) -> dict[str, str]:
    """Return the names of linear layers in `Patches`, each with that of the convolution it was."""
    named = model.named_modules()
    return {f"{name}.linear": name for name, module in named if isinstance(module, Patches)}


def _put_(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
