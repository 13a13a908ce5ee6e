"""What each layer costs: against the plain way of measuring it, and where it must show."""

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from calib_data.errors import DataError
from compress.checkpoint import Checkpoint
from compress.mixture import Mixture
from compress.quantize import prepare, quantize_only
from compress.quantize_config import QuantizeConfig
from compress.sensitivity import passes, sensitivity
from tests.tiny import SampledBatches, tiny_checkpoint

EIGHT = QuantizeConfig("weight-only", bits=8)


def mixture_of(checkpoint: Checkpoint, config: QuantizeConfig = EIGHT) -> Mixture:
    return Mixture(prepare(checkpoint, config, SampledBatches(checkpoint)), config)


def plain(checkpoint: Checkpoint, name: str, config: QuantizeConfig) -> dict[str, float]:
    """Return the noise of one layer, nothing played back, over the tokens that are real."""
    prepared = prepare(checkpoint, config, SampledBatches(checkpoint))
    changed = quantize_only(prepared, [name], config)
    sums: dict[str, np.ndarray] = {}
    for batch in SampledBatches(checkpoint):
        exact, found = checkpoint.predict(batch), changed.predict(batch)
        for output, y in exact.items():
            values = found[output]
            if y.shape[:2] == tuple(batch["attention_mask"].shape):
                y, values = (x[batch["attention_mask"].bool().numpy()] for x in (y, values))
            pair = [np.square(x, dtype=np.float64).sum() for x in (values - y, y)]
            sums[output] = sums.get(output, np.zeros(2)) + np.array(pair)
    return {output: difference / signal for output, (difference, signal) in sums.items()}


@pytest.mark.parametrize("scheme", ["dynamic", "static", "weight-only"])
@pytest.mark.parametrize("family", ["albert", "bert", "gpt2", "llama"])
def test_costs_are_those_of_whole_passes(family: str, scheme: str) -> None:
    checkpoint, config = tiny_checkpoint(family), QuantizeConfig(scheme)
    costs = sensitivity(mixture_of(checkpoint, config), SampledBatches(checkpoint))
    assert [c.noise for c in costs] == sorted((c.noise for c in costs), reverse=True)
    for cost in (costs[0], costs[len(costs) // 2], costs[-1]):
        expected = plain(checkpoint, cost.module, config)
        assert cost.outputs == pytest.approx(expected, rel=1e-3, abs=1e-13)
        assert cost.noise == cost.outputs[checkpoint.output]


@pytest.mark.parametrize("family", ["bart", "swin", "t5", "vit"])
def test_every_layer_of_other_families_is_measured(family: str) -> None:
    checkpoint = tiny_checkpoint(family)
    mixture = mixture_of(checkpoint)
    batches = list(SampledBatches(checkpoint, count=1))
    steps: list[int] = []
    costs = sensitivity(mixture, batches, lambda: steps.append(1))
    assert len(steps) == passes(mixture, batches)
    assert {cost.module for cost in costs} == set(mixture.names)
    assert any(cost.noise > 0 for cost in costs)


def test_what_lies_before_a_layer_is_not_computed_again() -> None:
    checkpoint = tiny_checkpoint("bert", num_hidden_layers=4)
    mixture = mixture_of(checkpoint)
    calls: list[int] = []
    for layer in checkpoint.backbone.encoder.layer:
        layer.attention.self.query.register_forward_hook(lambda *_: calls.append(1))
    (batch,) = SampledBatches(checkpoint, count=1)
    sensitivity(mixture, [batch])
    whole = 4 * (1 + len(mixture.names))
    assert 0 < len(calls) < 0.7 * whole


def test_a_damaged_layer_is_the_costliest() -> None:
    checkpoint = tiny_checkpoint("bert")
    damaged = "encoder.layer.0.output.dense"
    mixture = mixture_of(checkpoint)
    mixture.with_quantized_((damaged,)).backbone.get_submodule(damaged).scale *= 1.2
    costs = sensitivity(mixture, SampledBatches(checkpoint))
    assert costs[0].module == damaged
    assert costs[0].noise > 10 * costs[1].noise


def padded(checkpoint: Checkpoint, change: Callable[[torch.Tensor], torch.Tensor]) -> float:
    batch = checkpoint.signature.sample(4, 12, ragged=True)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    batch["input_ids"] = torch.where(mask == 1, ids, change(ids))
    return sensitivity(mixture_of(checkpoint), [batch])[0].noise


def test_padding_does_not_count() -> None:
    checkpoint = tiny_checkpoint("bert")
    one, other = (padded(checkpoint, lambda ids, n=n: ids * 0 + n) for n in (7, 50))
    assert one == pytest.approx(other, rel=1e-4)
    rows = checkpoint.signature.sample(4, 12, ragged=True)
    rows["attention_mask"] = torch.ones_like(rows["attention_mask"])
    assert sensitivity(mixture_of(checkpoint), [rows])[0].noise != pytest.approx(one, rel=1e-4)


def test_outputs_that_are_not_finite_come_first_and_can_be_written() -> None:
    checkpoint = tiny_checkpoint("bert")
    mixture = mixture_of(checkpoint)
    name = "encoder.layer.0.attention.self.query"
    mixture.with_quantized_((name,)).backbone.get_submodule(name).scale.fill_(math.inf)
    costs = sensitivity(mixture, SampledBatches(checkpoint))
    assert (costs[0].module, costs[0].noise) == (name, math.inf)
    assert costs[0].to_json()["noise"] is None
    json.dumps([cost.to_json() for cost in costs], allow_nan=False)


def test_the_input_is_left_as_it_was() -> None:
    checkpoint = tiny_checkpoint("gpt2")
    before = {name: vars(module).copy() for name, module in checkpoint.backbone.named_modules()}
    sensitivity(mixture_of(checkpoint), SampledBatches(checkpoint))
    for name, module in checkpoint.backbone.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_no_batch_is_an_error() -> None:
    with pytest.raises(DataError, match="no batch"):
        sensitivity(mixture_of(tiny_checkpoint("bert")), [])
