import json

import pytest

from calib_data.errors import ConfigError
from compress.blocks import Group, Part
from compress.plan import PrunePlan, check_plan


def group(name: str, units: int, kind: str = "neurons") -> Group:
    return Group(name, kind, units, (Part(f"{name}.down", False, 1),), f"{name}.down")  # type: ignore[arg-type]


GROUPS = (group("a", 4), group("b", 4), group("c", 2, "heads"))


def test_round_trips_through_json() -> None:
    plan = PrunePlan({"a.neurons": (0, 2)})
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
