import copy

import pytest
import torch

from calib_data.errors import DataError, ModelError
from compress.stream_importance import hidden_importance, layer_importance
from compress.students import layer_stacks
from tests.tiny import SampledBatches, tiny_checkpoint

STACKED = ("bert", "gpt2", "llama", "vit", "t5", "bart", "modernbert", "distilbert")


@pytest.mark.parametrize("family", STACKED)
def test_a_layer_costs_what_leaving_it_out_changes(family: str) -> None:
    checkpoint = tiny_checkpoint(family)
    stacks = layer_stacks(checkpoint.backbone)
    batches = SampledBatches(checkpoint, 2)
    scores = layer_importance(checkpoint, stacks, batches)
    assert {name: len(scores[name]) for name in stacks} == {n: len(s) for n, s in stacks.items()}
    name = list(stacks)[-1]
    without = copy.deepcopy(checkpoint.module)
    del without.get_submodule(name)[1]  # the second: T5's first holds what the others need
    total = 0.0
    for batch in batches:
        before = checkpoint.predict(batch)[checkpoint.output]
        with torch.no_grad():
            after = without(**batch)[checkpoint.output].numpy()
        change = before - after
        if "attention_mask" in batch and "decoder_input_ids" not in batch:
            change = change * batch["attention_mask"].unsqueeze(-1).numpy()
        total += float((change.astype("float64") ** 2).sum())
    assert float(scores[name][1]) == pytest.approx(total / 8, rel=1e-3)
    assert all(not m._forward_hooks for m in checkpoint.module.modules())


def test_distributions_are_compared_by_their_divergence() -> None:
    checkpoint = tiny_checkpoint("gpt2", "text-generation")
    stacks = layer_stacks(checkpoint.backbone)
    batch = checkpoint.signature.sample(2, 6)
    (scores,) = layer_importance(checkpoint, stacks, [batch]).values()
    before = torch.from_numpy(checkpoint.predict(batch)["logits"]).log_softmax(dim=-1)
    del next(iter(stacks.values()))[0]
    after = torch.from_numpy(checkpoint.predict(batch)["logits"]).log_softmax(dim=-1)
    expected = float((before.exp() * (before - after)).sum())
    assert float(scores[0]) == pytest.approx(expected, rel=1e-4)  # twice it, for two examples


@pytest.mark.parametrize("family", STACKED)
def test_channels_that_are_never_anything_are_worth_nothing(family: str) -> None:
    checkpoint = tiny_checkpoint(family)
    stacks = layer_stacks(checkpoint.backbone)
    batches = SampledBatches(checkpoint, 2)
    first, again, other = (
        hidden_importance(checkpoint, stacks, batches, seed) for seed in (0, 0, 1)
    )
    assert first.shape == (32,)
    assert first.dtype == torch.float64
    assert bool((first > 0).all())
    assert first.equal(again)
    assert not first.equal(other)
    with torch.no_grad():  # whatever writes to the stream leaves the channel 3 alone
        for name, value in checkpoint.backbone.named_parameters():
            if value.dim() == 1 and len(value) == 32:
                value[3] = 0
            elif value.dim() == 1 or "norm" in name.lower():
                continue
            elif value.shape[-1] == 32 and ("embed" in name or "wte" in name or "wpe" in name):
                value[..., 3] = 0
    if family in ("bert", "distilbert"):  # a layer norm ends each layer, so all is said
        assert hidden_importance(checkpoint, stacks, batches)[3] == 0


def test_bad_calls_are_refused() -> None:
    checkpoint = tiny_checkpoint("bert")
    stacks = layer_stacks(checkpoint.backbone)
    for score in (layer_importance, hidden_importance):
        with pytest.raises(DataError, match="no calibration batch"):
            score(checkpoint, stacks, [])
    with torch.no_grad():
        checkpoint.module.embeddings.word_embeddings.weight.fill_(float("nan"))
    batch = checkpoint.signature.sample(2, 5)
    for score in (layer_importance, hidden_importance):
        with pytest.raises(ModelError, match="not finite"):
            score(checkpoint, stacks, [batch])
