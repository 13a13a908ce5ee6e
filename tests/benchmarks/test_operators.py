import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks import operators
from benchmarks.operator_choices import CHOICES, Alternative, Choice, build
from benchmarks.operators import OPERATORS, Row, Timing, largest_difference, measure, runs_as
from benchmarks.runtimes import Place

EVERY = [pytest.param(c, name, id=f"{c.name}: {name}") for c in CHOICES for name in c.alternatives]


def saved(choice: Choice, alternative: str, folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    graph = build(choice, alternative, choice.small, copies=1)
    path = folder / "graph.onnx"
    onnx.save(graph.model(), path)
    return path, {name: fed.array for name, fed in graph.inputs.items()}


@pytest.mark.parametrize(("choice", "name"), EVERY)
def test_alternatives_agree(choice: Choice, name: str, tmp_path: Path) -> None:
    def outputs(alternative: str) -> dict[str, np.ndarray]:
        path, feed = saved(choice, alternative, tmp_path)
        loaded = OPERATORS.open(str(path), Place())
        return dict(loaded.collect(loaded.run(loaded.prepare(feed))))

    found, expected = outputs(name), outputs(next(iter(choice.alternatives)))
    assert largest_difference(found, expected) <= choice.alternatives[name].error
    assert all(np.ptp(value) > 0 for value in expected.values())


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.name)
def test_what_is_emitted_is_an_alternative(choice: Choice) -> None:
    assert set(choice.chosen.values()) <= set(choice.alternatives)


@pytest.mark.parametrize(("choice", "name"), EVERY)
def test_weights_do_not_depend_on_the_shape(choice: Choice, name: str) -> None:
    """One graph serves every shape; only what is fed differs."""
    other = tuple(size + 1 for size in choice.small)
    graphs = [build(choice, name, shape, copies=1) for shape in (choice.small, other)]
    assert list(graphs[0].weights) == list(graphs[1].weights)
    for weight, same in zip(*(graph.weights.values() for graph in graphs)):
        np.testing.assert_array_equal(weight, same)


def test_copies_are_not_merged(tmp_path: Path) -> None:
    choice = find("GELU with its bias, exact")
    path = tmp_path / "graph.onnx"
    onnx.save(build(choice, "Add, Gelu", choice.small, copies=3).model(), path)
    assert runs_as(path, "cpu", copies=1) == {"BiasGelu": 3}
    assert runs_as(path, "cpu", copies=3) == {"BiasGelu": 1}


def test_what_a_residual_runs_as(tmp_path: Path) -> None:
    """The reason for decision 3: the runtime fuses `Add`, and leaves `Sum` and reshapes alone."""
    choice = find("residual before LayerNormalization")
    fused = {"SkipLayerNormalization": 1}
    apart = {"LayerNormalization": 1, "Sum": 1}
    between = {"LayerNormalization": 1, "Add": 1, "Reshape": 2}
    for name, expected in zip(choice.alternatives, (fused, apart, between, fused), strict=True):
        assert runs_as(saved(choice, name, tmp_path)[0], "cpu", 1) == expected


def find(name: str) -> Choice:
    return next(choice for choice in CHOICES if choice.name == name)


def test_only_alternatives_that_agree_are_timed() -> None:
    choice = replace(
        find("GELU with its bias, exact"),
        shapes=((1, 2), (2, 3)),
        widths={"hidden": 8},
        alternatives={
            "right": Alternative(lambda g, d: g.op("Add", d.x, d.bias)),
            "wrong": Alternative(lambda g, d: g.op("Sub", d.x, d.bias)),
            "broken": Alternative(lambda g, d: g.op("com.microsoft.Nothing", d.x)),
            "right too": Alternative(lambda g, d: g.op("Sum", d.bias, d.x)),
        },
        chosen={"cpu": "right"},
    )
    rows = {row.alternative: row for row in measure(choice, threads=1, seconds=0.0001)}
    assert "differs by" in str(rows["wrong"].failure)
    assert "Nothing" in str(rows["broken"].failure)
    assert (rows["wrong"].timings, rows["broken"].timings) == ({}, {})
    for name in ("right", "right too"):
        assert rows[name].failure is None
        assert set(rows[name].timings) == {"1×2", "2×3"}
    timing = rows["right"].timings["1×2"]
    assert rows["right"].emitted
    assert (timing.ratio, timing.interval) == (1, (1, 1))
    assert [row.timings["2×3"].fastest for row in rows.values() if row.timings].count(True) == 1


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow, fast = (
        Timing(0.5 * ratio, ratio, (ratio, high), fastest)
        for ratio, high, fastest in ((1.0, 1.0, False), (0.5, 0.75, True))
    )
    rows = [
        Row("emitted", True, {"Gelu": 1}, 0.0, None, {"1×2": slow}),
        Row("other", False, {"Gelu": 2}, 0.0, None, {"1×2": fast}),
        Row("third", False, {}, None, "it failed", {}),
    ]
    asked = []
    monkeypatch.setattr(operators, "measure", lambda choice, *_, **__: asked.append(choice) or rows)
    operators.main(["--only", "GELU", "-o", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert [choice.name for choice in asked] == [c.name for c in CHOICES if "GELU" in c.name]
    assert "| → emitted | Gelu | 0.5 ms |" in shown
    assert "| other | 2 Gelu | **0.25 ms, 0.50 × (0.50–0.75)** |" in shown
    assert "| third |  | it failed |" in shown
    assert shown in (tmp_path / "out" / "operators.md").read_text()
    stored = json.loads((tmp_path / "out" / "operators.json").read_text())
    found = stored["choices"]["GELU with its bias, exact"][1]["timings"]["1×2"]
    assert found == {"milliseconds": 0.25, "ratio": 0.5, "interval": [0.5, 0.75], "fastest": True}
    for wrong, message in ((["--only", "nothing"], "rotary embedding"), (["--rounds", "5"], "6")):
        with pytest.raises(SystemExit, match="2"):
            operators.main(wrong)
        assert message in capsys.readouterr().err
