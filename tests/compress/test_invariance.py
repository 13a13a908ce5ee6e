"""How far a row depends on its batch: much, little, not at all."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from compress.checkpoint import Checkpoint
from compress.invariance import drift
from compress.quantize import quantize
from compress.quantize_config import QuantizeConfig
from compress.signature import factory_signature
from tests.tiny import SampledBatches, tiny_checkpoint

FLOAT = 1e-6  # what sums of floats in another order make


@pytest.mark.parametrize("family", ["bart", "bert", "gpt2", "llama", "t5"])
def test_only_ranges_found_at_run_time_let_rows_disturb_each_other(family: str) -> None:
    checkpoint = tiny_checkpoint(family)
    found = {
        scheme: drift(
            quantize(checkpoint, QuantizeConfig(scheme), SampledBatches(checkpoint)).checkpoint
        )
        for scheme in ("dynamic", "static", "weight-only")
    }
    assert all(value > 1e-4 for value in found["dynamic"].values())
    for scheme in ("static", "weight-only"):
        assert set(found[scheme]) == {"batch_drift", "padding_drift"}
        assert all(value < FLOAT for value in found[scheme].values()), scheme


def test_images_have_no_padding() -> None:
    made = quantize(tiny_checkpoint("vit"), QuantizeConfig()).checkpoint
    assert set(drift(made)) == {"batch_drift"}


def test_a_batch_of_ones_own() -> None:
    made = quantize(tiny_checkpoint("bert"), QuantizeConfig()).checkpoint
    batch = made.signature.sample(3, 9)
    assert set(drift(made, batch)) == {"batch_drift"}  # nothing is padded
    batch["attention_mask"][1, 5:] = 0
    assert set(drift(made, batch)) == {"batch_drift", "padding_drift"}
    del batch["token_type_ids"]
    assert drift(made, batch)["batch_drift"] > 0


def test_float_models_hardly_drift() -> None:
    assert all(value < FLOAT for value in drift(tiny_checkpoint("bert")).values())


class Centred(nn.Module):
    """Takes the mean of the batch away: a row alone is zero."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=0)


def test_the_share_is_of_the_row_alone() -> None:
    module = Centred()
    example = torch.tensor([[1.0], [3.0]])
    checkpoint = Checkpoint(module, "custom", factory_signature(module, {"x": example}, None))
    assert drift(checkpoint, {"x": example})["batch_drift"] > 1

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (1 + 0.1 * (len(x) > 1))

    scaled = replace(checkpoint, module=Scaled())
    assert drift(scaled, {"x": example})["batch_drift"] == pytest.approx(0.1)
