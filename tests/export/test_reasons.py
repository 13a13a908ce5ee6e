import pytest
import torch
from torch import Tensor, nn

from calib_data.errors import ExportError
from compress.checkpoint import Checkpoint
from compress.signature import factory_signature
from export.graph import ExportConfig, build_graph


class Wide(nn.Module):
    """Takes a last axis of 3."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Positions(nn.Module):
    """Takes 7 positions: one more or less fails in PyTorch already."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 7, 3))

    def forward(self, scale: Tensor, x: Tensor) -> Tensor:
        return (x + self.positions) * scale[:, None]


class OneLength(nn.Module):
    """Does something else at the length of its example."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[1] == 7 else x


class Sign(nn.Module):
    """Looks at the values."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Count(nn.Module):
    """Loops as often as a value says."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.abs().max())):
            x = x + 1
        return x


FRAMES = {0: "batch", 1: "frames"}


@pytest.mark.parametrize(
    ("module", "axes", "message"),
    [
        (Wide(), {2: "width"}, r"axis 2 \(width\) of x is asked to be dynamic, .* fixes it at 3$"),
        (Positions(), {0: "batch", 1: "sequence"}, r"axis 1 \(sequence\) of x .* fixes it at 7$"),
        (Positions(), FRAMES, r"axis 1 \(frames\) of x .* fixes it at 7$"),
        (OneLength(), FRAMES, r"axis 1 \(frames\) of x .* fixes it at 7$"),
        (Sign(), FRAMES, "depends on the values of its inputs, not on their shapes"),
        (Count(), FRAMES, "depends on the values of its inputs, not on their shapes"),
    ],
)
def test_what_cannot_be_exported_is_one_line_in_the_modules_names(
    module: nn.Module, axes: dict[int, str], message: str
) -> None:
    examples = {"x": torch.randn(2, 7, 3)}
    if isinstance(module, Positions):
        examples = {"scale": torch.randn(2, 3), **examples}
    named = {name: axes if name == "x" else {0: "batch"} for name in examples}
    signature = factory_signature(module, examples, named)
    with pytest.raises(ExportError, match=message) as caught:
        build_graph(Checkpoint(module.eval(), "custom", signature), ExportConfig())
    assert str(caught.value).startswith(f"{type(module).__name__} cannot be exported: ")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 9
