import itertools
import json
from pathlib import Path

import click
import pytest

from benchmarks.pruning import Places, Row, rows, table
from benchmarks.pruning_subjects import Evaluation, Subject, judge, split_lines
from onnxpress.cli import onnxpress_group
from tests.tiny import SENTENCES, write_sentence_encoder


def test_every_row_is_a_command_that_starts_from_an_earlier_one() -> None:
    seen: set[str] = set()
    for row in rows(Path("data")):
        group, name, *rest = row.command
        parent = onnxpress_group.commands[group]
        assert isinstance(parent, click.Group)
        with click.Context(parent) as context:
            parent.commands[name].make_context(name, [*rest, "-o", "out"], parent=context)
        made = [word for word in rest if word.startswith(("OUT/sweep", "OUT/vocabulary"))]
        assert {word.removeprefix("OUT/") for word in made} <= seen, row.name
        assert row.name not in seen
        seen.add(row.name)
    for claim in ("minilm/1.5-untrained", "minilm/4.0-healed", "sparse/2-4", "vit/2.0", "sst2/1.5"):
        assert claim in seen


def test_places_are_filled_in() -> None:
    places = Places(*map(Path, ("d", "m", "o", "t")))
    words = ["x.csv,OUT/a", "TRAINED/b", "MODELS/c", "x/OUT/y", "--data", "1.5"]
    assert places.filled(words) == ["x.csv,o/a", "t/b", "m/c", "x/OUT/y", "--data", "1.5"]


def test_seeds_are_one_line_and_failures_tell_why() -> None:
    chosen = [
        Row("minilm/1.5-plain", "minilm", (), 86.0, 3),
        Row("criteria/fisher-0", "minilm", ()),
        Row("criteria/fisher-1", "minilm", ()),
        Row("vit/2.0", "vit", ()),
        Row("later", "vit", ()),
    ]

    def figures(value: float) -> dict:
        metrics = {"STS-B": value, "trec": 0.5}
        return {"speedup": 1.5, "minutes": 2.0, "bytes": 9e6, "metrics": metrics}

    found = {row.name: figures(85 + i) for i, row in enumerate(chosen[:3])}
    assert list(table(chosen, found, {"vit/2.0": "exit code 4: no"}))[2:] == [
        "| minilm/1.5-plain | 1.50 × | 9.0 | 2.0 of 3 | STS-B 85.00 | ≥ 86: **missed** | trec 0.50 |",
        "| criteria/fisher | 1.50 × | 9.0 | 2.0 | STS-B 86.50 ± 0.71 (2 seeds) |  | trec 0.50 |",
        "| vit/2.0 | | | | exit code 4: no | | |",
    ]


def test_corpora_are_split_without_overlap(tmp_path: Path) -> None:
    source = tmp_path / "questions.txt"
    source.write_text("".join(f"CLASS question é {i}\n" for i in range(25)), encoding="latin-1")
    split_lines(source, tmp_path / "out" / "trec", "latin-1", skip_word=True)
    train, test = (
        (tmp_path / "out" / f"trec.{part}.txt").read_text().splitlines()
        for part in ("train", "test")
    )
    assert (len(train), len(test)) == (23, 2)
    assert train[0] == "question é 0"
    assert not set(train) & set(test)


def test_a_model_is_judged_beside_its_source(tmp_path: Path) -> None:
    write_sentence_encoder(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES))
    pairs = "".join(
        f'"{a}","{b}",{i % 5}\n' for i, (a, b) in enumerate(itertools.pairwise(SENTENCES))
    )
    (tmp_path / "pairs.csv").write_text(pairs)
    subject = Subject(
        "tiny",
        str(tmp_path / "model"),
        {
            "pairs": Evaluation("spearman", str(tmp_path / "pairs.csv"), "text,text_pair,score"),
            "texts": Evaluation("rank_fidelity", str(tmp_path / "text.txt"), None, 8),
        },
    )
    found = judge(subject, str(tmp_path / "model"))
    assert set(found) == {"pairs", "texts"}
    assert found["texts"] == pytest.approx(1.0)
    json.dumps(found)
