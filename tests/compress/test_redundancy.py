from typing import Any

import pytest
import torch

from compress.apply_plan import apply_plan
from compress.blocks import find_groups
from compress.criteria import unit_importance
from compress.moments import Moment, moments
from compress.plan import PrunePlan
from compress.reconstruct import reconstruct_
from compress.redundancy import stand_in_costs
from tests.tiny import FAMILIES, SampledBatches, tiny_checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_costs_are_no_more_than_the_scores(family: str) -> None:
    checkpoint = tiny_checkpoint(family)
    groups = find_groups(checkpoint.backbone)
    batches = SampledBatches(checkpoint)
    scores = unit_importance(checkpoint, groups, batches)
    costs = stand_in_costs(checkpoint, groups, scores, moments(checkpoint, groups, batches))
    for group in groups:
        own, plain = costs[group.key], scores[group.key]
        assert own.shape == plain.shape
        assert bool((own >= 0).all())
        assert float(own.sum()) < float(plain.sum())
        assert float(own.max()) <= float(plain.max()) * 1.001


def test_units_that_share_nothing_keep_their_scores() -> None:
    checkpoint = tiny_checkpoint("bert")
    groups = find_groups(checkpoint.backbone)
    scores = {g.key: torch.rand(g.units, dtype=torch.float64) for g in groups}
    seen = {}
    for group in groups:
        down: Any = checkpoint.backbone.get_submodule(group.down)
        seen[group.key] = Moment(torch.diag(torch.rand(down.in_features + 1) + 0.1), 5)
    costs = stand_in_costs(checkpoint, groups, scores, seen)
    for key, plain in scores.items():
        torch.testing.assert_close(costs[key], plain, rtol=1e-6, atol=0)


def test_the_last_of_two_alike_is_dear() -> None:
    checkpoint = tiny_checkpoint("llama")
    group = next(g for g in find_groups(checkpoint.backbone) if g.kind == "neurons")
    gram = torch.eye(group.units)
    gram[0, 1] = gram[1, 0] = 1  # one is what the other is
    scores = {group.key: torch.full((group.units,), 0.5, dtype=torch.float64)}
    scores[group.key][:2] = 1
    costs = stand_in_costs(checkpoint, (group,), scores, {group.key: Moment(gram, 9)})[group.key]
    assert float(costs[:2].min()) < 0.2
    assert float(costs[:2].max()) == pytest.approx(1)
    torch.testing.assert_close(costs[2:], torch.full_like(costs[2:], 0.5), rtol=1e-6, atol=0)


def test_what_is_removed_by_them_can_be_made_up_for() -> None:
    checkpoint = tiny_checkpoint("gpt2")
    group = next(g for g in find_groups(checkpoint.backbone) if g.kind == "neurons")
    batches = SampledBatches(checkpoint, 8)
    seen = moments(checkpoint, (group,), batches)
    scores = unit_importance(checkpoint, (group,), batches, "wanda")
    errors = {}
    for name, chosen in (
        ("plain", scores),
        ("costs", stand_in_costs(checkpoint, (group,), scores, seen)),
    ):
        keep = chosen[group.key].argsort(descending=True)[:32].sort().values
        plan = PrunePlan({group.key: tuple(keep.tolist())})
        pruned = apply_plan(checkpoint, plan)
        errors[name] = reconstruct_(pruned, checkpoint, plan, seen)[group.key].after
    assert errors["costs"] < errors["plain"]


def test_what_was_not_seen_keeps_its_scores() -> None:
    checkpoint = tiny_checkpoint("bert")
    groups = find_groups(checkpoint.backbone)
    scores = {g.key: torch.rand(g.units, dtype=torch.float64) for g in groups}
    unseen = {groups[0].key: Moment(torch.zeros(0, 0), 0)}
    costs = stand_in_costs(checkpoint, groups, scores, unseen)
    assert all(costs[key].equal(plain) for key, plain in scores.items())
