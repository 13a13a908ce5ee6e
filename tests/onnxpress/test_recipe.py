"""Recipes: what is run, what is not run again, and what a kill leaves behind."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from calib_data.errors import ConfigError, OnnxPressError
from onnxpress.cli import onnxpress_group
from onnxpress.recipe import read_recipe
from onnxpress.recipe_run import run_recipe
from onnxpress.stages import Run
from tests.tiny import SENTENCES, write_sentence_encoder

RECIPE = """
model: {model}
steps:
  - {{name: pruned, stage: prune, from: model, data: {data}, max_length: 32, round_to: 8}}
  - {{name: healed, stage: distill, from: pruned, data: {data}, max_length: 32, steps: {steps}}}
  - {{name: int8-checkpoint, stage: quantize, from: healed}}
  - {{name: int8, stage: export, from: int8-checkpoint}}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    write_sentence_encoder(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES))
    return write(tmp_path, steps=2)


def write(folder: Path, steps: int) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(model=folder / "model", data=folder / "text.txt", steps=steps))
    return path


def run(path: Path, out: Path) -> list[str]:
    told: list[str] = []
    run_recipe(read_recipe(path), out, Run(), told.append)
    return told


def test_unchanged_steps_are_not_run_again(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not any("unchanged" in line for line in run(recipe_file, out))
    assert (out / "int8" / "model.onnx").is_file()
    assert all("unchanged" in line for line in run(recipe_file, out))


def test_a_change_reruns_what_depends_on_it(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(recipe_file, out)
    again = run(write(tmp_path, steps=3), out)
    assert "pruned: unchanged" in again
    assert sum("unchanged" in line for line in again) == 1


def test_changed_data_reruns(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(recipe_file, out)
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES[:6]))
    assert not any("unchanged" in line for line in run(recipe_file, out)[:2])


def test_a_result_that_was_tampered_with_is_made_again(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(recipe_file, out)
    weights = out / "healed" / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-8])
    again = run(recipe_file, out)
    assert "pruned: unchanged" in again
    assert weights.read_bytes() == good  # same seed, same result: what follows is unchanged
    assert "int8: unchanged" in again


def weights(path: Path) -> dict[str, np.ndarray]:
    return {
        name: value.const_value.numpy()
        for name, value in ir.load(path).graph.initializers.items()
        if value.const_value is not None
    }


@pytest.mark.slow
def test_killed_at_any_moment_a_second_start_finishes(recipe_file: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    run(recipe_file, whole)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "onnxpress", "run", str(recipe_file), "-o", str(out)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    for moment in (4.0, 6.0, 8.0):  # while importing, in a stage, between stages: wherever it hits
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for name in ("pruned", "healed", "int8-checkpoint"):
            present = (out / name).is_dir()
            assert not present or (out / name / "onnxpress.json").is_file()
    run(recipe_file, out)
    made, expected = (weights(folder / "int8" / "model.onnx") for folder in (out, whole))
    assert made.keys() == expected.keys()
    for name, array in made.items():  # training rounds differently from process to process
        atol = 1 if array.dtype == np.int8 else 1e-4
        np.testing.assert_allclose(array.astype(float), expected[name].astype(float), atol=atol)
    assert not list(out.glob(".*.partial-*"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("just words", "a recipe has"),
        ("model: [", "not a YAML recipe"),
        ("model: x\nsteps: []\ncolour: red", "colour"),
        ("steps: []", "no `model`"),
        ("model: x\nsteps: [{name: a, stage: knit}]", "knit"),
        ("model: x\nsteps: [{name: a, stage: export, from: b}]", "no earlier step"),
        ("model: x\nsteps: [{name: ../a, stage: export, from: model}]", "cannot be a step's name"),
        ("model: x\nsteps: [{name: a, stage: export}]", "`from`"),
        ("model: x\nsteps: [{name: a}]", "`stage`"),
        ("model: ${y}\nvariables: {x: 1}\nsteps: []", r"\$\{y\} is not among its `variables`"),
        ("model: x\nvariables: x\nsteps: []", "names with values"),
    ],
)
def test_bad_recipes_are_refused(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told) as caught:
        read_recipe(path)
    assert "\n" not in str(caught.value)


def test_variables_are_set_from_outside(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: ${folder}/m\nvariables: {folder: here, steps: 3, data: pydoc}\nsteps:\n"
        "  - {name: a, stage: prune, from: model, heal: '${steps}', data: '${data}', shape: 8x128}\n"
    )
    plain = read_recipe(path)
    assert plain.origin.model == "here/m"
    assert plain.origin.command == "onnxpress run recipe.yaml -o DIR"
    assert dict(plain.steps[0].settings) == {
        "from": "model", "heal": 3, "data": "pydoc", "shape": "8x128",
    }  # fmt: skip
    given = {"steps": "20", "data": "a b.txt,{x}: y.csv"}
    changed = read_recipe(path, given)
    assert changed.steps[0].settings["heal"] == 20
    assert changed.steps[0].settings["data"] == given["data"]  # not YAML's idea of it
    assert changed.origin.command.endswith("--set steps=20 --set 'data=a b.txt,{x}: y.csv' -o DIR")
    with pytest.raises(ConfigError, match="no variable 'heal'; there are folder, steps, data"):
        read_recipe(path, {"heal": "20"})


def test_a_setting_from_the_command_line_is_one_assignment(recipe_file: Path) -> None:
    result = CliRunner().invoke(onnxpress_group, ["run", str(recipe_file), "--set", "x", "-o", "y"])
    assert result.exit_code == 2
    assert "--set wants NAME=VALUE, got 'x'" in result.output


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (
            "{name: x, stage: distill, from: healed, data: TEXT, stepz: 2}",
            "unknown setting 'stepz'",
        ),
        ("{name: x, stage: distill, from: healed, data: gone.txt}", "gone.txt is not a file"),
        ("{name: x, stage: prune, from: healed, data: TEXT, heal: 2, warmup: 7}", "warmup"),
        ("{name: x, stage: prune, from: healed, heads: 0.5}", "need --data"),
        (
            "{name: x, stage: prune, from: healed, data: TEXT, plan: gone.json}",
            "gone.json is not a",
        ),
        (
            "{name: x, stage: finetune, from: healed, data: TEXT, eval: a.doc}",
            "no data set I can open",
        ),
        ("{name: x, stage: quantize, from: healed, scheme: int9}", "int9"),
        ("{name: x, stage: export, from: int8-checkpoint, dtype: fp8}", "fp8"),
        ("{name: x, stage: report, bundles: [int8], shapes: [[0, 1]]}", "shape"),
        ("{name: x, stage: report, bundles: [int8], traffic: gone.txt}", "gone.txt is not a file"),
        ("{name: x, stage: report, bundles: [int8], also: [plain]}", "of a --baseline"),
    ],
)
def test_a_mistake_in_the_last_step_is_found_before_the_first(
    recipe_file: Path, tmp_path: Path, step: str, said: str
) -> None:
    last = step.replace("TEXT", str(tmp_path / "text.txt"))
    recipe_file.write_text(f"{recipe_file.read_text()}  - {last}\n")
    with pytest.raises(OnnxPressError, match=f"^step x: .*{said}"):
        run(recipe_file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_shipped_recipe_takes_a_users_own_encoder_and_texts(tmp_path: Path) -> None:
    write_sentence_encoder(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES * 3))
    own = {"encoder": str(tmp_path / "model"), "texts": str(tmp_path / "text.txt"), "steps": "2"}
    recipe = read_recipe(Path(__file__).parents[2] / "recipes" / "minilm-small.yaml", own)
    assert recipe.steps[-1].stage == "report"  # which takes its time, and is tested elsewhere
    run_recipe(replace(recipe, steps=recipe.steps[:-1]), tmp_path / "out", Run(), print)
    assert (tmp_path / "out" / "small" / "model.onnx").is_file()


def test_shipped_recipes_can_be_read() -> None:
    for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml"):
        assert read_recipe(path).steps


def test_a_pruning_step_takes_what_the_command_takes(tmp_path: Path) -> None:
    write_sentence_encoder(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES))
    steps = """
model: {0}/model
steps:
  - {{name: small, stage: prune, from: model, data: {0}/text.txt, max_length: 32, round_to: 8, ffn: 0.5,
      heal: 2, schedule: iterative, rounds: 2, losses: [embedding], sparsity: 2:4,
      vocab_from: {0}/text.txt, vocab_min_count: 2}}
"""
    path = tmp_path / "recipe.yaml"
    path.write_text(steps.format(tmp_path))
    run(path, tmp_path / "out")
    from compress.loading import open_checkpoint

    lineage = open_checkpoint(tmp_path / "out" / "small").lineage[1:]
    stages = [entry["stage"] for entry in lineage]
    assert stages == ["prune", "distill", "prune", "sparsify", "distill", "vocabulary"]
    assert lineage[-2]["settings"]["weights"] == {"embedding": 1.0}
    assert run(path, tmp_path / "out") == ["small: unchanged"]
    path.write_text(steps.format(tmp_path).replace("ffn: 0.5", "speedup: 2, size: 1"))
    with pytest.raises(ConfigError, match="name one of"):
        run(path, tmp_path / "out")
    path.write_text(steps.format(tmp_path).replace("ffn: 0.5", "fnn: 0.5"))
    with pytest.raises(ConfigError, match="unknown setting 'fnn'"):
        run(path, tmp_path / "out")
