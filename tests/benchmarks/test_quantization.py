import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

import benchmarks.quantization as program
import benchmarks.quantization_subjects as made
from benchmarks.quantization import Figure, commands, figures, measure, run, table
from benchmarks.quantization_subjects import SCHEMES, Bound, Subject, subjects
from calib_data.characters import character_tokenizer
from calib_data.sources import open_data
from compress.loading import open_checkpoint
from export.graph import ExportConfig
from export.publish import export_onnx
from onnxpress.cli import onnxpress_group
from onnxpress.cli.compress import compress_group
from onnxpress.cli.export import export_group
from tests.tiny import SENTENCES, tiny_checkpoint, write, write_sentence_encoder


@pytest.fixture
def every(tmp_path: Path) -> list[Subject]:
    return list(subjects(Path("data"), Path("models"), tmp_path, tmp_path))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_step_is_a_command(scheme: str, every: list[Subject], tmp_path: Path) -> None:
    groups = {"compress": compress_group, "export": export_group}
    for subject in every:
        if scheme in subject.bounds:
            for target, (group, name, *rest) in commands(subject, scheme, tmp_path):
                assert rest[-2:] == ["-o", str(target)]
                with click.Context(groups[group]) as context:
                    groups[group].commands[name].make_context(name, rest, parent=context)


def test_the_claims_are_those_of_the_issue(every: list[Subject]) -> None:
    found = {
        (subject.name, scheme): bound.of(100.0)
        for subject in every
        for scheme, bound in subject.bounds.items()
    }
    assert found == {
        ("minilm", "dynamic"): 86.6,
        ("minilm", "dynamic, gptq"): 86.6,
        ("minilm", "static"): 86.5,
        ("minilm", "4-bit"): 86.0,
        ("sst2", "dynamic"): 99.6,
        ("sst2", "static"): 99.5,
        ("stories", "dynamic"): 103.0,
        ("stories", "static"): 105.0,
        ("gpt", "dynamic"): 100.01,
        ("gpt", "static"): 100.02,
        ("vit", "dynamic"): 99.9,
        ("vit", "static"): 99.8,
    }
    assert set(SCHEMES) == {scheme for _, scheme in found}


def test_calibration_never_sees_what_judges(every: list[Subject]) -> None:
    for subject in every:
        judged = {spec for spec, _ in subject.evaluations.values()}
        assert not judged & set(subject.calibration), subject.name


@pytest.mark.parametrize(
    ("metric", "onnx", "bound", "met"),
    [
        ("spearman", 86.5, 86.5, True),
        ("spearman", 86.4, 86.5, False),
        ("perplexity", 3.0, 3.1, True),
        ("loss", 1.51, 1.50, False),
        ("accuracy", None, 90.0, False),
    ],
)
def test_a_bound_is_met_or_missed(metric: str, onnx: float | None, bound: float, met: bool) -> None:
    assert Figure("m", "d", metric, "static", 100.0, onnx, bound).met is met


def test_the_table_tells_misses_failures_and_the_simulation() -> None:
    rows = [
        Figure("minilm", "STS-B", "spearman", "static", 86.72, 86.61, 86.5, 86.613),
        Figure("gpt", "play", "loss", "dynamic", 1.5, 1.62, 1.51),
        Figure("vit", "digits", "accuracy", "static", 98.0, None, 97.8, failure="exit code 9: no"),
    ]
    lines = list(table(rows))
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2:] == [
        "| minilm | STS-B | spearman | static | 86.72 | 86.61 | ≥ 86.50 | met | +0.003 |",
        "| gpt | play | loss | dynamic | 1.5000 | 1.6200 | ≤ 1.5100 | **missed** |  |",
        "| vit | digits | accuracy | static | 98.00 | exit code 9: no | ≥ 97.80 | **missed** |  |",
    ]


def test_a_command_that_fails_says_why_and_one_that_is_done_rests(tmp_path: Path) -> None:
    target = tmp_path / "new" / "graph"
    found = run(target, ["export", "onnx", str(tmp_path / "nothing"), "-o", str(target)])
    assert found is not None
    assert found.startswith("exit code 4: ")
    assert "nothing" in found
    assert run(tmp_path, ["no such command"]) is None


def test_digits_are_split_once(tmp_path: Path) -> None:
    images = np.arange(40, dtype=np.uint8).reshape(40, 1, 1) * np.ones((1, 2, 2), np.uint8)
    np.savez(tmp_path / "train.npz", x_train=images, y_train=np.arange(40) % 10)
    made.split_digits(tmp_path / "train.npz", tmp_path / "new" / "digits.npz")
    parts = [open_data(f"{tmp_path}/new/digits.npz:{part}") for part in ("train", "test")]
    assert [int(part.column("image")[0][0, 0]) for part in parts] == [0, 36]
    assert [len(part) for part in parts] == [36, 4]
    made.split_digits(tmp_path / "gone.npz", tmp_path / "new" / "digits.npz")  # it is there


def test_blocks_are_of_the_part_that_is_no_test(tmp_path: Path) -> None:
    play = tmp_path / "play.txt"
    play.write_text("a\n" * 4500 + "b\n" * 500)
    made.write_blocks(play, tmp_path / "blocks.jsonl")
    texts = open_data(str(tmp_path / "blocks.jsonl")).column("text")
    assert len(texts) == made.SAMPLES
    assert {len(text) for text in texts} == {made.BLOCK}
    assert "\n" in texts[0]
    assert not any("b" in text for text in texts)


def test_stories_begin_as_they_are_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[list[str]] = []

    def generate(arguments: list[str]) -> str:
        said.append(arguments)
        return json.dumps({"texts": [" and", " or"]})

    monkeypatch.setattr(made, "output_of", generate)
    for _ in range(2):
        made.write_stories(
            tmp_path / "b", tmp_path / "t.jsonl", ("a cat", "a dog"), ("--seed", "3")
        )
    assert len(said) == 1, "written again"
    with click.Context(export_group) as context:
        export_group.commands["generate"].make_context(
            "generate", list(said[0][2:]), parent=context
        )
    assert open_data(str(tmp_path / "t.jsonl")).column("text") == ["a cat and", "a dog or"]


@pytest.fixture
def encoder(tmp_path: Path) -> Subject:
    write_sentence_encoder(tmp_path / "model")
    pairs = pairwise(SENTENCES[:9])
    lines = [f'"{a}","{b}",{i % 5}' for i, (a, b) in enumerate(pairs)]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    return Subject(
        "tiny",
        str(tmp_path / "model"),
        "spearman",
        {"pairs": (str(tmp_path / "pairs.csv"), "sentence1,sentence2,score")},
        (),
        {"dynamic": Bound(-100.0)},
        simulated=True,
    )


@pytest.mark.slow
def test_rows_hold_the_figures_of_graph_and_simulation(
    encoder: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_here(target: Path, arguments: Sequence[str]) -> str | None:
        if not target.exists():
            onnxpress_group.main(list(arguments), standalone_mode=False)
        return None

    monkeypatch.setattr(program, "run", run_here)
    (row,) = figures(encoder, tmp_path)
    assert row.met
    assert row.onnx == pytest.approx(row.pytorch, abs=0.1)
    record = tmp_path / "tiny" / "figures.json"
    known = json.loads(record.read_text())
    assert len(known) == 3
    record.write_text(json.dumps(dict.fromkeys(known, 7.0)))
    (again,) = figures(encoder, tmp_path)
    assert (again.float_onnx, again.onnx, again.pytorch) == (7.0, 7.0, 7.0), "measured again"


def test_a_scheme_that_fails_leaves_the_others(
    encoder: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(target: Path, arguments: list[str]) -> str | None:
        return None if target.name == "float.onnx" else "exit code 9: no"

    def measured(*_: Any) -> float:
        return 50.0

    monkeypatch.setattr(program, "run", failing)
    monkeypatch.setattr(program, "measure", measured)
    (tmp_path / "tiny").mkdir()
    (row,) = figures(encoder, tmp_path)
    assert (row.float_onnx, row.onnx, row.failure) == (50.0, None, "exit code 9: no")
    assert not row.met


@pytest.mark.slow
def test_packed_text_is_judged_by_its_loss(tmp_path: Path) -> None:
    from calib_data.batches import Batches
    from calib_data.metrics import perplexity
    from calib_data.objectives import Packed

    letters = character_tokenizer(SENTENCES)
    plain = tiny_checkpoint("gpt2", "text-generation")
    model = write(replace(plain, processor=letters), tmp_path / "model")
    (tmp_path / "play.txt").write_text("\n".join(SENTENCES * 4))
    spec = f"whole:{tmp_path}/play.txt:test"
    subject = Subject("gpt", str(model), "loss", {"play": (spec, None)}, (), {})
    checkpoint = open_checkpoint(str(model))
    blocks = Batches(
        open_data(spec), checkpoint.processor, max_length=checkpoint.max_length, objective=Packed()
    )
    expected = np.log(perplexity(checkpoint.predict, blocks).value)
    assert measure(subject, "play", model, "pytorch") == pytest.approx(expected, abs=1e-6)
    assert sum(len(batch["input_ids"]) for batch in blocks) > 1, "only its beginning was read"
    export_onnx(checkpoint, tmp_path / "bundle", ExportConfig())
    assert measure(subject, "play", tmp_path / "bundle", "onnx") == pytest.approx(
        expected, abs=1e-4
    )
