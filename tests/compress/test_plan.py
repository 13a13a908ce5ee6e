import json

import pytest
import torch

from calib_data.errors import ConfigError
from compress.blocks import Group, Part
from compress.plan import PrunePlan, check_plan, plan_removal


def group(name: str, units: int, kind: str = "neurons") -> Group:
    return Group(name, kind, units, (Part(f"{name}.down", False, 1),), f"{name}.down")  # type: ignore[arg-type]


GROUPS = (group("a", 4), group("b", 4), group("c", 2, "heads"))
SCORES = {
    "a.neurons": torch.tensor([4.0, 1.0, 3.0, 2.0]),
    "b.neurons": torch.tensor([40.0, 10.0, 30.0, 0.5]),
    "c.heads": torch.tensor([0.1, 0.2]),
}


def test_units_compete_across_layers() -> None:
    plan = plan_removal(GROUPS, SCORES, "neurons", 0.5)
    assert plan.keep == {"a.neurons": (0,), "b.neurons": (0, 1, 2)}


def test_every_layer_keeps_one() -> None:
    plan = plan_removal(GROUPS, SCORES, "neurons", 0.99)
    assert plan.keep == {"a.neurons": (0,), "b.neurons": (0,)}
    assert plan_removal(GROUPS, SCORES, "heads", 0.9).keep == {"c.heads": (1,)}


def test_nothing_to_remove_names_no_group() -> None:
    assert plan_removal(GROUPS, SCORES, "neurons", 0.0).keep == {}


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_sizes_are_multiples_of_round_to(share: float) -> None:
    groups = (group("a", 32), group("b", 32))
    scores = {g.key: torch.rand(32, generator=torch.Generator().manual_seed(1)) for g in groups}
    plan = plan_removal(groups, scores, "neurons", share, round_to=8)
    kept = [len(plan.keep.get(g.key, range(32))) for g in groups]
    assert all(count % 8 == 0 and count > 0 for count in kept)
    assert sum(kept) == 64 * (1 - share)


def test_uneven_sizes_keep_the_rest() -> None:
    groups = (group("a", 10),)
    plan = plan_removal(groups, {"a.neurons": torch.arange(10.0)}, "neurons", 0.8, round_to=4)
    assert plan.keep["a.neurons"] == (4, 5, 6, 7, 8, 9)  # 2 would be less than a step


def test_too_small_a_share_is_refused() -> None:
    with pytest.raises(ConfigError, match="lower --round-to"):
        plan_removal(GROUPS, SCORES, "neurons", 0.1, round_to=4)


def test_round_trips_through_json() -> None:
    plan = plan_removal(GROUPS, SCORES, "neurons", 0.5)
    assert PrunePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"z.heads": (0,)}, "names z.heads"),
        ({"a.neurons": ()}, "empty"),
        ({"a.neurons": (0, 4)}, "below 4"),
        ({"a.neurons": (1, 0)}, "ascending"),
        ({"a.neurons": (1, 1)}, "ascending"),
        ({"a.neurons": (-1, 1)}, "below 4"),
    ],
)
def test_impossible_plans_are_refused(keep: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_plan(PrunePlan(keep), GROUPS)


def test_possible_plans_pass() -> None:
    check_plan(PrunePlan({"a.neurons": (0, 3), "c.heads": (1,)}), GROUPS)
