from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compress.loading import open_checkpoint
from compress.patches import Patches, as_convolution, as_patches, is_over_patches
from compress.quantize import SCHEMES, dequantized, prepare, quantize, quantize_only
from compress.quantize_config import QuantizeConfig
from tests.tiny import VISION, SampledBatches, tiny_checkpoint, write


def conv(*sizes: int, **settings: object) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(*sizes, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(4, 4), (2, 3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("image", [(12, 12), (13, 14)], ids=["whole", "with a rest"])
def test_patches_equal_the_convolution(
    size: tuple[int, int], bias: bool, image: tuple[int, int]
) -> None:
    source = conv(3, 5, kernel_size=size, stride=size, bias=bias)
    assert is_over_patches(source)
    made = as_patches(source)
    x = torch.randn(2, 3, *image)
    torch.testing.assert_close(made(x), source(x), rtol=1e-5, atol=1e-6)
    again = as_convolution(made)
    assert again(x).equal(source(x))
    assert made.weight.equal(source.weight)
    assert (made.bias is None) == (source.bias is None)


@pytest.mark.parametrize(
    "settings",
    [
        {"stride": 2},
        {"stride": 4, "padding": 1},
        {"stride": 4, "dilation": 2},
        {"stride": 4, "groups": 2},
    ],
)
def test_other_convolutions_are_not_over_patches(settings: dict) -> None:
    assert not is_over_patches(conv(2, 4, kernel_size=4, **settings))


def convolutions(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize("family", VISION)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_convolution_is_quantized_saved_and_loaded(
    family: str, scheme: str, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint(family)
    made = quantize(checkpoint, QuantizeConfig(scheme), SampledBatches(checkpoint)).checkpoint
    assert len(convolutions(checkpoint.module)) == 1
    assert convolutions(made.module) == []
    (patches,) = (m for m in made.module.modules() if isinstance(m, Patches))
    assert isinstance(patches.linear, SCHEMES[scheme].linear)
    assert patches.weight.is_floating_point()  # CLIP turns its pixels into this type
    sample = checkpoint.signature.sample(3)
    again = open_checkpoint(str(write(made, tmp_path / "small")))
    exact = dequantized(made)
    (plain,) = (m for m in exact.module.modules() if isinstance(m, Patches))
    assert plain.weight.equal(patches.weight)
    for name, value in made.predict(sample).items():
        assert np.array_equal(again.predict(sample)[name], value)
        source = checkpoint.predict(sample)[name]
        assert 0 < np.abs(exact.predict(sample)[name] - source).max() < 0.5 * np.abs(source).max()


def test_convolution_that_stays_float_stays_a_convolution(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("vit")
    name = "embeddings.patch_embeddings.projection"
    skipped = quantize(checkpoint, QuantizeConfig(skip=(name,))).checkpoint
    prepared = prepare(checkpoint, QuantizeConfig())
    assert f"{name}.linear" in prepared.names
    fewer = quantize_only(
        prepared, [n for n in prepared.names if "patch" not in n], QuantizeConfig()
    )
    for made in (skipped, fewer):
        (kept,) = convolutions(made.module)
        assert kept.weight.equal(checkpoint.module.get_submodule(name).weight)
    again = open_checkpoint(str(write(fewer, tmp_path / "small")))
    assert len(convolutions(again.module)) == 1
