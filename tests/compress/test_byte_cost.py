import pytest

from compress.apply_plan import apply_plan
from compress.blocks import find_groups
from compress.byte_cost import byte_cost, weight_bytes
from compress.plan import PrunePlan
from tests.compress.test_prune import random_plan
from tests.tiny import FAMILIES, tiny_checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cost_of_a_plan_is_what_its_model_weighs(family: str) -> None:
    checkpoint = tiny_checkpoint(family)
    cost, groups = byte_cost(checkpoint.backbone), find_groups(checkpoint.backbone)
    assert cost.total(groups, PrunePlan({})) == pytest.approx(weight_bytes(checkpoint.backbone))
    plan = random_plan(checkpoint)
    pruned = apply_plan(checkpoint, plan)
    assert cost.total(groups, plan) == pytest.approx(weight_bytes(pruned.backbone))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit"])
def test_layers_weigh_what_is_gone_with_them(family: str) -> None:
    checkpoint = tiny_checkpoint(family)
    cost, groups = byte_cost(checkpoint.backbone), find_groups(checkpoint.backbone)
    (stack,) = cost.depth
    plan = PrunePlan({}, {stack: (1,)})
    pruned = apply_plan(checkpoint, plan)
    assert cost.total(groups, plan) == pytest.approx(weight_bytes(pruned.backbone))
