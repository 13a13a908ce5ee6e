import itertools
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from calib_data.errors import ConfigError
from compress.allocate import (
    RANKINGS,
    Cost,
    Limits,
    allocate,
    best_units,
    layer_of,
    lowest,
    plan_removal,
)
from compress.blocks import Group, Part
from compress.plan import PrunePlan


def group(name: str, units: int, kind: str = "neurons") -> Group:
    return Group(name, kind, units, (Part(f"{name}.down", False, 1),), f"{name}.down")  # type: ignore[arg-type]


GROUPS = (group("a", 4), group("b", 4), group("c", 2, "heads"))
LOSSES = {
    "a.neurons": torch.tensor([16.0, 1.0, 9.0, 4.0]),
    "b.neurons": torch.tensor([1600.0, 100.0, 900.0, 0.25]),
    "c.heads": torch.tensor([0.01, 0.04]),
}
STACK = tuple(
    group(f"layers.{i}.{name}", units, kind)
    for i in range(3)
    for name, units, kind in (("attention", 4, "heads"), ("mlp", 32, "neurons"))
)
PER_UNIT = {"heads": 2.0, "neurons": 0.25}
STACK_COST = Cost(
    lambda g, n: n * PER_UNIT[g.kind], fixed=3.0, layer={"layers": 1.0}, depth={"layers": 3}
)
FULL = 3 + 3 * (1 + 8 + 8)


def importance(seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {g.key: torch.rand(g.units, generator=random).double() for g in STACK}


def lost(plan: PrunePlan, scores: Mapping[str, Tensor]) -> float:
    return sum(
        float(scores[key].sum() - scores[key][list(units)].sum())
        for key, units in plan.keep.items()
    )


# --- shares --------------------------------------------------------------------------------------


def test_units_compete_across_layers() -> None:
    plan = plan_removal(GROUPS, LOSSES, "neurons", 0.5)
    assert plan.keep == {"a.neurons": (0,), "b.neurons": (0, 1, 2)}


def test_every_layer_keeps_its_minimum() -> None:
    plan = plan_removal(GROUPS, LOSSES, "neurons", 0.99)
    assert plan.keep == {"a.neurons": (0,), "b.neurons": (0,)}
    assert plan_removal(GROUPS, LOSSES, "heads", 0.9).keep == {"c.heads": (1,)}
    three = plan_removal(GROUPS, LOSSES, "neurons", 0.99, Limits(minimum={"neurons": 3}))
    assert three.keep == {"a.neurons": (0, 2, 3), "b.neurons": (0, 1, 2)}


def test_nothing_to_remove_names_no_group() -> None:
    assert plan_removal(GROUPS, LOSSES, "neurons", 0.0).keep == {}


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_sizes_are_multiples_of_the_step(share: float) -> None:
    groups = (group("a", 32), group("b", 32))
    scores = {g.key: torch.rand(32, generator=torch.Generator().manual_seed(1)) for g in groups}
    plan = plan_removal(groups, scores, "neurons", share, Limits(steps={"neurons": 8}))
    kept = [len(plan.keep.get(g.key, range(32))) for g in groups]
    assert all(count % 8 == 0 and count > 0 for count in kept)
    assert sum(kept) == 64 * (1 - share)


def test_uneven_sizes_come_down_to_multiples() -> None:
    plan = plan_removal(
        (group("a", 10),), {"a.neurons": torch.arange(10.0)}, "neurons", 0.4,
        Limits(steps={"neurons": 4}),
    )  # fmt: skip
    assert plan.keep["a.neurons"] == (6, 7, 8, 9)


def test_too_small_a_share_is_refused() -> None:
    with pytest.raises(ConfigError, match="lower --round-to"):
        plan_removal(GROUPS, LOSSES, "neurons", 0.1, Limits(steps={"neurons": 4}))


def test_uniform_keeps_the_same_number_everywhere() -> None:
    plan = plan_removal(GROUPS, LOSSES, "neurons", 0.5, Limits(ranking="uniform"))
    assert plan.keep == {"a.neurons": (0, 2), "b.neurons": (0, 2)}


# --- budgets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("share", [0.35, 0.5, 0.8, 1.0])
def test_plans_stay_within_their_budget(ranking: str, share: float) -> None:
    limits = Limits({"heads": 1, "neurons": 8}, {"neurons": 8}, ranking)
    plan = allocate(STACK, importance(), STACK_COST, share * FULL, limits)
    spent = STACK_COST.total(STACK, plan)
    assert share * FULL - (6 if ranking == "uniform" else 2) <= spent <= share * FULL + 1e-9
    assert not plan.layers


def test_the_plan_loses_least() -> None:
    groups, scores = STACK[:4], importance()
    limits = Limits(steps={"neurons": 8})
    cost = Cost(STACK_COST.group)
    plan = allocate(groups, scores, cost, 20.0, limits)
    tried = (
        PrunePlan({g.key: best_units(scores[g.key], n) for g, n in zip(groups, counts)})
        for counts in itertools.product(*(limits.choices(g) for g in groups))
    )
    best = min(lost(p, scores) for p in tried if cost.total(groups, p) <= 20)
    assert lost(plan, scores) == pytest.approx(best)
    uniform = allocate(groups, scores, cost, 20.0, Limits(steps={"neurons": 8}, ranking="uniform"))
    assert lost(uniform, scores) >= best


def test_dear_units_go_first_among_equals() -> None:
    flat = {g.key: torch.ones(g.units) for g in STACK}
    plan = allocate(STACK, flat, STACK_COST, FULL - 10, Limits(steps={"neurons": 1}))
    assert {key.rpartition(".")[2] for key in plan.keep} == {"heads"}
    assert STACK_COST.total(STACK, plan) == FULL - 10


@pytest.mark.parametrize("ranking", RANKINGS)
def test_whole_layers_go_where_that_costs_least(ranking: str) -> None:
    layers = {"layers": torch.tensor([5.0, 0.0, 4.0])}
    limits = Limits(steps={"neurons": 8}, ranking=ranking)
    plan = allocate(STACK, importance(), STACK_COST, FULL - 17, limits, layers)
    assert plan == PrunePlan({}, {"layers": (0, 2)})
    assert STACK_COST.total(STACK, plan) == FULL - 17
    # and not where they matter
    layers = {"layers": torch.tensor([1e3, 1e3, 1e3])}
    assert not allocate(STACK, importance(), STACK_COST, FULL - 17, limits, layers).layers


@pytest.mark.parametrize("ranking", RANKINGS)
def test_a_stack_keeps_its_best_layer(ranking: str) -> None:
    layers = {"layers": torch.tensor([1e-9, 3e-9, 2e-9])}
    limits = Limits(steps={"neurons": 8}, ranking=ranking)
    least = lowest(STACK, STACK_COST, limits, layers)
    assert least == 3 + 1 + 2 + 2
    plan = allocate(STACK, importance(), STACK_COST, least, limits, layers)
    assert plan.layers == {"layers": (1,)}
    assert set(plan.keep) == {"layers.1.attention.heads", "layers.1.mlp.neurons"}


@pytest.mark.parametrize("ranking", RANKINGS)
def test_a_budget_that_nothing_fits_says_the_least(ranking: str) -> None:
    limits = Limits(ranking=ranking)
    least = lowest(STACK, STACK_COST, limits)
    assert least == 3 + 3 * (1 + 2 + 0.25)
    assert allocate(STACK, importance(), STACK_COST, least, limits).keep
    with pytest.raises(ConfigError, match=r"budget of 12\.7 is below 12\.75"):
        allocate(STACK, importance(), STACK_COST, 12.7, limits)


def test_layers_are_told_from_names() -> None:
    assert layer_of(STACK[2], ["layers"]) == ("layers", 1)
    assert layer_of(STACK[2], ["layer", "other"]) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"ranking": "best"}, "--ranking"), ({"minimum": {"heads": 0}}, "heads must be at least 1")],
)
def test_bad_limits_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Limits(**settings)
