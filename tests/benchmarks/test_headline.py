from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.headline import (
    RECIPES,
    Goal,
    Recipe,
    comparison_table,
    fidelities,
    fidelity_table,
    recipes,
    table,
)
from calib_data.errors import OnnxPressError
from onnxpress.recipe import read_recipe
from tests.benchmarks.reports import make_report


def test_every_recipe_is_there_with_its_variables_and_graphs() -> None:
    for recipe in recipes(Path("data"), Path("out")):
        path = RECIPES / f"{recipe.name}.yaml"
        steps = {step.name: step for step in read_recipe(path, recipe.variables).steps}
        assert {goal.graph for goal in recipe.goals} <= set(steps["report"].settings["bundles"])
        for graph, checkpoint in recipe.encoders.items():
            assert steps[graph].inputs == (checkpoint,)
        assert read_recipe(path).steps  # without --set, too


def test_goals_are_held_against_the_report() -> None:
    goals = (
        Goal("int8", "speed-up at 8 × 128", 4),
        Goal("int8", "speed-up at 1 × 128", 5),
        Goal("int8", "MB", 24.2),
        Goal("int8", "spearman", 86.5),
        Goal("int8", "% of spearman", 99.9),
    )
    lines = list(table(Recipe("r", {}, goals, minutes=90), make_report(), 5401))
    assert [line.split("|")[5].strip() for line in lines[2:]] == [
        "met", "**missed**", "**missed**", "met", "**missed**", "**missed**",
    ]  # fmt: skip
    assert "| int8 | MB | ≤ 24.2 | 24.30 |" in lines[4]
    assert "| int8 | % of spearman | ≥ 99.9 | 99.76 |" in lines[6]
    assert lines[7].startswith("| all | minutes | ≤ 90 | 90 |")


def test_a_graph_that_failed_has_reached_nothing() -> None:
    with pytest.raises(OnnxPressError, match="broken failed: its process was killed"):
        Goal("broken", "MB", 99).reached(make_report())


def test_fidelities_below_the_goal_are_named() -> None:
    found = {
        "x12": {"STS-B dev": 86.3, "trec": 0.971, "pydoc": 0.9},
        "x20": {"STS-B dev": 85.3, "trec": 0.969, "pydoc": 0.99},
    }
    lines = list(fidelity_table(found))
    assert lines[2] == "| x12 | 86.3 | 0.971 | 0.9 |"
    assert lines[-1] == "Below 0.97: x12 on pydoc, x20 on trec."


def test_an_encoder_is_judged_once_as_long_as_its_graph_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe("r", {}, (), encoders={"int8": "int8-checkpoint", "float": "model"})
    judged: list[str] = []

    def judge(subject: object, model: str) -> dict[str, float]:
        judged.append(Path(model).name)
        return {"STS-B dev": 86.0, "trec": len(judged) / 10}

    monkeypatch.setattr("benchmarks.pruning_subjects.judge", judge)
    first = make_report()
    assert fidelities(recipe, first, tmp_path, tmp_path)["int8"]["trec"] == 0.1
    assert judged == ["int8-checkpoint"]  # all the report's graphs have one hash
    other = {"model.onnx": "f" * 64}
    variants = [replace(v, sha256=other) if v.name == "float" else v for v in first.variants]
    again = fidelities(recipe, replace(first, variants=variants), tmp_path, tmp_path)
    assert judged == ["int8-checkpoint", "model"]
    assert (again["int8"]["trec"], again["float"]["trec"]) == (0.1, 0.2)


def test_times_are_shares_of_other_graphs_round_by_round() -> None:
    lines = list(comparison_table(make_report(), ["int8 pruned"], ["float", "int8"]))
    assert lines[3].startswith("| int8 pruned | 8 × 128 | 1/4.1")
    assert "| 1/1.8" in lines[3]
    assert len(lines) == 4
