from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calib_data.errors import ConfigError, DataError, ModelError
from compress.apply_plan import apply_plan
from compress.blocks import Group, find_groups
from compress.checkpoint import Checkpoint, weights_sha256
from compress.moments import Moment, moments
from compress.plan import PrunePlan
from compress.reconstruct import reconstruct_
from tests.compress.test_prune import random_plan
from tests.tiny import FAMILIES, SampledBatches, tiny_checkpoint


def half(checkpoint: Checkpoint) -> PrunePlan:
    """Return a plan that keeps the first half of each group."""
    groups = find_groups(checkpoint.backbone)
    return PrunePlan({g.key: tuple(range(g.units // 2)) for g in groups})


def outputs_of(checkpoint: Checkpoint, name: str, batches: Any) -> Tensor:
    """Return what the module `name` gives on real tokens, (n, out)."""
    found = []

    def see(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        found.append(output.detach())

    handle = checkpoint.backbone.get_submodule(name).register_forward_hook(see)
    kept = []
    for batch in batches:
        checkpoint.predict(batch)
        y = found.pop()
        if "attention_mask" in batch and y.shape[:-1] == batch["attention_mask"].shape:
            y = y[batch["attention_mask"].bool()]
        kept.append(y.reshape(-1, y.shape[-1]))
    handle.remove()
    return torch.cat(kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_nearer_to_what_they_were(family: str) -> None:
    checkpoint = tiny_checkpoint(family)
    before = weights_sha256(checkpoint.module)
    batches = SampledBatches(checkpoint)
    groups = find_groups(checkpoint.backbone)
    plan = random_plan(checkpoint)
    pruned = apply_plan(checkpoint, plan)
    seen = moments(checkpoint, groups, batches)
    fits = reconstruct_(pruned, checkpoint, plan, seen)
    assert set(fits) == {g.key for g in groups if len(plan.keep[g.key]) < g.units}
    for fit in fits.values():
        assert 0 < fit.after < fit.before
    assert weights_sha256(checkpoint.module) == before
    # and the model is nearer too: what it gives, not only each block alone
    sample = checkpoint.signature.sample(4, 12, seed=99)
    plain = apply_plan(checkpoint, plan).predict(sample)
    whole, fitted = checkpoint.predict(sample), pruned.predict(sample)
    name = checkpoint.output
    error = ((fitted[name] - whole[name]) ** 2).sum(), ((plain[name] - whole[name]) ** 2).sum()
    assert error[0] < error[1]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_the_fit_is_the_weighted_least_squares_solution(family: str) -> None:
    checkpoint = tiny_checkpoint(family)
    checkpoint.module.double()
    (batch,) = batches = [checkpoint.signature.sample(4, 16)]
    group = next(g for g in find_groups(checkpoint.backbone) if g.kind == "neurons")
    plan = PrunePlan({group.key: tuple(range(20))})
    pruned = apply_plan(checkpoint, plan)
    down: Any = checkpoint.backbone.get_submodule(group.down)
    given: list[Tensor] = []
    handle = down.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].clone()))
    with torch.no_grad():
        checkpoint.forward(batch)
    handle.remove()
    x = given[0].reshape(-1, group.units)
    y = down(x).detach()
    kept = x[:, :20]
    if down.bias is not None:
        kept = torch.cat([kept, torch.ones(len(x), 1)], dim=1)
    power = y.square().mean(dim=1, keepdim=True)
    root = (power + 0.1 * power.median()).rsqrt()
    expected = torch.linalg.lstsq(kept * root, y * root).solution

    reconstruct_(pruned, checkpoint, plan, moments(checkpoint, (group,), batches), ridge=1e-7)
    mine: Any = pruned.backbone.get_submodule(group.down)
    torch.testing.assert_close(mine(x[:, :20]).detach(), kept @ expected, rtol=1e-2, atol=1e-3)


def test_units_that_others_can_stand_in_for_are_not_missed() -> None:
    checkpoint = tiny_checkpoint("llama")
    group = next(g for g in find_groups(checkpoint.backbone) if g.kind == "neurons")
    batches = SampledBatches(checkpoint)
    with torch.no_grad():  # the last half does what the first half does
        for part in group.parts:
            weight = checkpoint.backbone.get_submodule(part.module).weight
            if part.outputs:
                weight[32:] = weight[:32]
    plan = PrunePlan({group.key: tuple(range(32))})
    pruned = apply_plan(checkpoint, plan)
    fits = reconstruct_(
        pruned, checkpoint, plan, moments(checkpoint, (group,), batches), ridge=1e-6
    )
    assert fits[group.key].before > 0.1
    assert fits[group.key].after < 1e-6
    sample = checkpoint.signature.sample(2, 8)
    for name, value in checkpoint.predict(sample).items():
        assert abs(pruned.predict(sample)[name] - value).max() < 1e-3 * abs(value).max()


def test_what_is_whole_stays_as_it_is() -> None:
    checkpoint = tiny_checkpoint("bert")
    groups = find_groups(checkpoint.backbone)
    seen = moments(checkpoint, groups, SampledBatches(checkpoint))
    plan = PrunePlan({groups[0].key: tuple(range(groups[0].units))})
    same = apply_plan(checkpoint, plan)
    assert reconstruct_(same, checkpoint, plan, seen) == {}
    assert weights_sha256(same.module) == weights_sha256(checkpoint.module)


def test_passes_are_split_where_memory_is_short() -> None:
    checkpoint = tiny_checkpoint("bert")
    groups = find_groups(checkpoint.backbone)
    batches = SampledBatches(checkpoint)
    told: list[None] = []
    whole = moments(checkpoint, groups, batches, lambda: told.append(None))
    assert (whole.passes, told) == (1, [])  # nobody asked for one yet
    assert whole[groups[0].key].count
    assert len(told) == len(batches)
    parts = moments(checkpoint, groups, batches, lambda: told.append(None), limit=22_000)
    assert parts.passes == 2
    assert list(parts) == list(whole) == [g.key for g in groups]
    for key in whole:
        assert parts[key].gram.equal(whole[key].gram)
        assert parts[key].count == whole[key].count
    assert len(told) == 3 * len(batches)
    with pytest.raises(KeyError):
        whole["nothing"]


def test_padding_does_not_count() -> None:
    checkpoint = tiny_checkpoint("distilbert")
    groups = find_groups(checkpoint.backbone)
    short = checkpoint.signature.sample(2, 5)
    padded = {name: nn.functional.pad(value, (0, 4)) for name, value in short.items()}
    first, second = (moments(checkpoint, groups, [batch]) for batch in (short, padded))
    for key in first:
        assert first[key].count == second[key].count == 10
        torch.testing.assert_close(first[key].gram, second[key].gram, rtol=1e-3, atol=1e-4)


def test_layers_that_were_dropped_shift_the_names() -> None:
    checkpoint = tiny_checkpoint("bert")
    groups = find_groups(checkpoint.backbone)
    batches = SampledBatches(checkpoint)
    plan = half(checkpoint)
    pruned = apply_plan(checkpoint, plan)
    seen = moments(checkpoint, groups, batches)
    expected = reconstruct_(pruned, checkpoint, plan, seen)

    dropped = PrunePlan(plan.keep, {"encoder.layer": (1,)})
    shorter = apply_plan(checkpoint, dropped)
    fits = reconstruct_(shorter, checkpoint, dropped, seen)
    assert fits == {k: v for k, v in expected.items() if ".1." in k}
    assert shorter.module.encoder.layer[0].output.dense.weight.equal(
        pruned.module.encoder.layer[1].output.dense.weight
    )


def test_features_that_are_never_anything_keep_their_weights() -> None:
    checkpoint = tiny_checkpoint("bert")
    group: Group = find_groups(checkpoint.backbone)[0]
    plan = PrunePlan({group.key: (0, 1)})
    pruned = apply_plan(checkpoint, plan)
    width = group.units
    down: Any = pruned.backbone.get_submodule(group.down)
    before = down.weight.detach().clone()
    gram = torch.eye(width + 1 if group.kind == "neurons" else down.in_features * 2 + 1)
    gram[1, 1] = 0
    fits = reconstruct_(pruned, checkpoint, plan, {group.key: Moment(gram, 3)})
    assert set(fits) == {group.key}
    assert down.weight.isfinite().all()
    torch.testing.assert_close(down.weight[:, 1], before[:, 1])


def test_bad_calls_are_refused() -> None:
    checkpoint = tiny_checkpoint("bert")
    groups = find_groups(checkpoint.backbone)
    with pytest.raises(DataError, match="no calibration batch"):
        moments(checkpoint, groups, [])[groups[0].key]
    plan = half(checkpoint)
    seen = moments(checkpoint, groups, SampledBatches(checkpoint))
    with pytest.raises(ConfigError, match="reconstruct with the plan that pruned it"):
        reconstruct_(checkpoint, checkpoint, plan, seen)
    with torch.no_grad():
        checkpoint.module.encoder.layer[0].intermediate.dense.weight.fill_(float("inf"))
    with pytest.raises(ModelError, match=r"layer\.0\.output\.dense.*not finite"):
        moments(checkpoint, groups, SampledBatches(checkpoint))[groups[0].key]
