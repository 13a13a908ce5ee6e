import json
from typing import Any

import pytest

from calib_data.errors import ConfigError
from compress.plan import PrunePlan, check_plan
from tests.tiny import tiny_model

HEADS, NEURONS = "encoder.layer.0.attention.self.heads", "encoder.layer.1.neurons"
QUERIES, PAIRS = "layers.0.self_attn.queries", "layers.0.self_attn.heads"


PLANS = {
    "nothing": (PrunePlan(), {"keep": {}}),
    "units": (
        PrunePlan({"a": (0,), "b": (0, 1, 2, 5, 7, 8)}),
        {"keep": {"a": "0", "b": "0-2,5,7-8"}},
    ),
    "all": (
        PrunePlan({"a": (3, 4)}, {"encoder.layer": (0, 2)}, (1, 2, 3, 9)),
        {"keep": {"a": "3-4"}, "layers": {"encoder.layer": "0,2"}, "hidden": "1-3,9"},
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_is_json_that_a_person_can_read(name: str) -> None:
    plan, expected = PLANS[name]
    assert plan.to_json() == expected
    assert PrunePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_a_plan_may_be_written_by_hand() -> None:
    plan = PrunePlan.from_json(
        {"keep": {"a": [0, 2, 3], "b": " 0 - 2, 7 ,"}, "layers": {"s": [1]}, "hidden": "0-3"}
    )
    assert plan == PrunePlan({"a": (0, 2, 3), "b": (0, 1, 2, 7)}, {"s": (1,)}, (0, 1, 2, 3))
    assert PrunePlan.from_json({"hidden": [4]}) == PrunePlan(hidden=(4,))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "a plan holds keep, layers, hidden"),
        ({"keeps": {}}, "nothing like .*keeps"),
        ({"keep": [1]}, '"keep" must be an object'),
        ({"keep": {"a": 3}}, "a must be a list"),
        ({"keep": {"a": [True]}}, "a must be a list"),
        ({"keep": {"a": [0.5]}}, "a must be a list"),
        ({"keep": {"a": "3-1"}}, "a has '3-1'"),
        ({"keep": {"a": "x"}}, "a has 'x'"),
        ({"keep": {"a": "-1"}}, "a has '-1'"),
        ({"keep": {"a": "0-400000000"}}, "a names more units than any model has"),
        ({"keep": {"a": "9" * 5000}}, "a has '999"),
        ({"keep": {"a": ""}}, "leaves a empty"),
        ({"keep": {"a": "0-3,2"}}, "a must be ascending"),
        ({"keep": {"a": [1, 0]}}, "a must be ascending"),
        ({"keep": {"a": [1, 1]}}, "a must be ascending"),
        ({"keep": {"a": [-1, 1]}}, "a must be ascending from 0"),
        ({"layers": {"s": []}}, "leaves s empty"),
        ({"hidden": []}, "leaves hidden empty"),
        ({"hidden": [2, 1]}, "hidden must be ascending"),
    ],
)
def test_nonsense_is_refused_by_name(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        PrunePlan.from_json(value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "plan", "message"),
    [
        (
            "bert",
            {"keep": {"z.heads": "0"}},
            "names z.heads, which the model does not have; it has",
        ),
        ("bert", {"keep": {HEADS: "0,4"}}, f"{HEADS} must be below 4, got 4"),
        ("bert", {"layers": {"layer": "0"}}, "no stack of the model's; it has encoder.layer"),
        ("bert", {"layers": {"encoder.layer": "0-2"}}, "encoder.layer must be below 2, got 2"),
        (
            "mpnet",
            {"keep": {"encoder.layer.0.attention.attn.heads": "0"}},
            "shares a bias per head",
        ),
        ("bert", {"keep": {HEADS.replace("heads", "queries"): "0"}}, "does not have"),
        (
            "llama",
            {"keep": {QUERIES: "0,1,2"}},
            "same number of query heads.* keeps 2 of 0, 1 of 1",
        ),
        ("llama", {"keep": {QUERIES: "0,1"}}, "keeps 2 of 0, 0 of 1"),
        ("llama", {"keep": {QUERIES: "0", PAIRS: "1"}}, "keeps 0 of 1"),
    ],
)
def test_plans_that_do_not_fit_the_model_are_refused(
    family: str, plan: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_plan(PrunePlan.from_json(plan), tiny_model(family))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "plan"),
    [
        ("bert", {"keep": {HEADS: "0-3", NEURONS: "1"}, "layers": {"encoder.layer": "1"}}),
        ("llama", {"keep": {QUERIES: "0,3"}}),
        ("llama", {"keep": {QUERIES: "0,2-3", PAIRS: "1"}}),
        ("bart", {"layers": {"encoder.layers": "0", "decoder.layers": "1"}}),
    ],
)
def test_possible_plans_pass(family: str, plan: dict[str, Any]) -> None:
    check_plan(PrunePlan.from_json(plan), tiny_model(family))
