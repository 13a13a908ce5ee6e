"""Modules of a user's own that say where their heads, neurons and layers are."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from calib_data.errors import ModelError
from compress.apply_plan import apply_plan
from compress.blocks import find_groups
from compress.loading import open_checkpoint
from compress.plan import PrunePlan
from compress.stacks import droppable_stacks
from compress.surgery import resize_
from tests.compress.factories import Fused, Slots, Step, Steps
from tests.compress.test_apply_plan import masked_outputs, same
from tests.compress.test_prune import random_plan, worst
from tests.tiny import write

STEPS = "tests.compress.factories:steps"


def test_what_is_described_is_found() -> None:
    groups = find_groups(Steps())
    assert {group.key: group.units for group in groups} == {
        "steps.0.look.heads": 4,
        "steps.0.neurons": 24,
        "steps.1.look.heads": 4,
        "steps.1.neurons": 24,
        "steps.2.look.heads": 2,
        "steps.2.neurons": 24,
    }
    assert {name: len(stack) for name, stack in droppable_stacks(Steps()).items()} == {"steps": 3}


@pytest.mark.parametrize("layers", [{}, {"steps": (0, 2)}, {"steps": (1,)}])
def test_it_is_pruned_and_reopens(layers: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(STEPS)
    plan = PrunePlan(random_plan(checkpoint).keep, layers)
    pruned = apply_plan(checkpoint, plan)
    sample = checkpoint.signature.sample(3, 7)
    expected = masked_outputs(checkpoint, plan, sample)
    assert worst(pruned.predict(sample), expected) < 1e-5
    assert worst(checkpoint.predict(sample), expected) > 1e-3
    again = open_checkpoint(write(pruned, tmp_path / "pruned"), trust_remote_code=True)
    assert same(pruned, again)
    assert dict(again.structure) == dict(pruned.structure)


def test_layers_that_differ_are_dropped_twice(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(STEPS)
    once = apply_plan(checkpoint, PrunePlan(layers={"steps": (1, 2)}))
    twice = apply_plan(once, PrunePlan({"steps.1.neurons": (0, 5)}, {"steps": (1,)}))
    assert twice.structure == {"steps.layers": [2], "steps.0.neurons": 2}
    assert same(twice, open_checkpoint(write(twice, tmp_path / "twice"), trust_remote_code=True))


def test_a_manifest_that_does_not_fit_is_refused() -> None:
    for structure in ({"steps.layers": [3]}, {"steps.layers": []}, {"step.layers": [0]}):
        with pytest.raises(ModelError, match="cannot hold"):
            resize_(Steps(), structure)


def test_a_description_may_be_put_on_a_module_from_elsewhere() -> None:
    plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    plain.onnxpress_blocks = {"neurons": {"up": ["0"], "down": "2"}}  # type: ignore[assignment]
    (group,) = find_groups(plain)
    assert (group.key, group.units) == (".neurons", 6)


def test_layers_that_nothing_tells_of_stay() -> None:
    checkpoint = open_checkpoint("tests.compress.factories:mixer")
    with pytest.raises(Exception, match="no stack of the model's"):
        apply_plan(checkpoint, PrunePlan(layers={"fc1": (0,)}))


HEADS: dict[str, Any] = Slots.onnxpress_blocks["heads"]


@pytest.mark.parametrize(
    ("kind", "told", "message"),
    [
        (Slots, ["heads"], "onnxpress_blocks must be a dict"),
        (Slots, {"head": {}}, "with heads, neurons or layers"),
        (Slots, {"heads": ["ask"]}, r'\["heads"\] must be a dict'),
        (Slots, {"heads": {"query": "ask"}}, r"has query; it needs query, key"),
        (Slots, {"heads": HEADS | {"fused": "ask"}}, "or fused, copies"),
        (Slots, {"heads": HEADS | {"width": "size"}}, "width 'size' is no number of features"),
        (Slots, {"heads": HEADS | {"width": 0}}, "width 0 is no number"),
        (Slots, {"heads": HEADS | {"width": 5}}, "mix is no linear layer.* correct"),
        (Slots, {"heads": HEADS | {"key": "offers"}}, "offers is no linear layer"),
        (Slots, {"heads": HEADS | {"out": "ask"}}, "ask is no linear layer.*not as wide"),
        (Fused, {"heads": Fused.onnxpress_blocks["heads"] | {"copies": 2}}, "not as wide"),
        (Step, {"neurons": {"up": "grow", "down": "shrink"}}, "needs a list up and a name down"),
        (Step, {"neurons": {"up": ["grow"], "down": "shrink"}}, "shrink is no linear layer"),
        (Steps, {"layers": ["table"]}, "table is no ModuleList"),
    ],
)
def test_wrong_descriptions_are_refused(
    kind: type, told: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Steps()
    monkeypatch.setattr(kind, "onnxpress_blocks", told)
    look = droppable_stacks if "layers" in told else find_groups
    with pytest.raises(ModelError, match=message) as caught:
        look(model)
    assert "\n" not in str(caught.value)
