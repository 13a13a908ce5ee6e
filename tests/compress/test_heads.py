"""New heads: what they take over, what they draw, and label sets that do not fit."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from calib_data.errors import ConfigError, DataError, ModelError
from calib_data.sources import Examples
from compress.heads import Classes, classes_of, with_head, with_head_of
from compress.loading import open_checkpoint
from compress.tasks import get_task, training_task
from tests.compress.test_prune import apply_plan, random_plan
from tests.tiny import SENTENCES, tiny_checkpoint, write, write_sentence_encoder

CLASSIFY = get_task("text-classification")


def labelled(labels: list[Any], names: tuple[str, ...] | None = None, role: str = "label") -> Any:
    columns = {"text": SENTENCES[: len(labels)], role: labels}
    return Examples(datasets.Dataset.from_dict(columns), "test data", names)


def test_a_head_takes_over_the_transformer(tmp_path: Path) -> None:
    source = open_checkpoint(write_sentence_encoder(tmp_path / "encoder"))
    made, fresh = with_head(source, CLASSIFY, Classes(3, ("a", "b", "c")), seed=0)
    assert set(fresh) == {"classifier.weight", "classifier.bias"}
    before, after = source.backbone.state_dict(), made.module.state_dict()
    for name, value in before.items():
        assert torch.equal(after[f"bert.{name}"], value)
    again = open_checkpoint(write(made, tmp_path / "classifier"))
    assert again.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert again.task == "text-classification"
    sample = made.signature.sample()
    np.testing.assert_array_equal(again.predict(sample)["logits"], made.predict(sample)["logits"])


def test_the_head_is_drawn_from_the_seed() -> None:
    source = tiny_checkpoint("bert")
    heads = [
        with_head(source, CLASSIFY, Classes(2), seed)[0].module.get_parameter("classifier.weight")
        for seed in (0, 0, 1)
    ]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama", "deberta-v2", "vit"])
def test_a_pruned_transformer_keeps_its_structure(family: str, tmp_path: Path) -> None:
    plain = tiny_checkpoint(family)
    try:
        source = apply_plan(plain, random_plan(plain))
    except ModelError:  # heads that are locked: feed-forward blocks alone would do
        source = plain
    task = get_task("image-classification") if family == "vit" else CLASSIFY
    made, _ = with_head(source, task, Classes(2), 0)
    assert sorted(made.structure.values()) == sorted(source.structure.values())
    again = open_checkpoint(write(made, tmp_path / "saved"))
    sample = made.signature.sample()
    np.testing.assert_array_equal(again.predict(sample)["logits"], made.predict(sample)["logits"])


def test_a_decoder_becomes_a_classifier_that_finds_the_end() -> None:
    made, _ = with_head(tiny_checkpoint("gpt2", "text-generation"), CLASSIFY, Classes(2), 0)
    assert made.config.pad_token_id is not None
    sample = made.signature.sample(2, 8, ragged=True)
    assert made.predict(sample)["logits"].shape == (2, 2)


def test_what_fits_comes_back_as_it_is() -> None:
    source = tiny_checkpoint("bert", "text-classification", num_labels=3)
    assert with_head(source, CLASSIFY, Classes(2), 0) == (source, ())
    with pytest.raises(ModelError, match="--new-head"):
        with_head(source, CLASSIFY, Classes(4), 0)
    with pytest.raises(ModelError, match="scores"):
        with_head(source, CLASSIFY, Classes(1, regression=True), 0)
    made, fresh = with_head(source, CLASSIFY, Classes(4), 0, anew=True)
    assert made.config.num_labels == 4
    assert "classifier.weight" in fresh


def test_a_student_without_a_head_gets_the_teachers() -> None:
    teacher, _ = with_head(tiny_checkpoint("bert"), CLASSIFY, Classes(3, ("a", "b", "c")), seed=1)
    student = tiny_checkpoint("bert", num_hidden_layers=1)
    made = with_head_of(teacher, student, seed=0)
    assert made.task == teacher.task
    assert made.config.id2label == teacher.config.id2label
    assert made.config.num_hidden_layers == 1
    heads = [c.module.state_dict() for c in (made, teacher)]
    assert torch.equal(*(head["classifier.weight"] for head in heads))
    own = student.module.state_dict()
    assert torch.equal(
        own["embeddings.word_embeddings.weight"], heads[0]["bert.embeddings.word_embeddings.weight"]
    )
    # of another width it is drawn; a head that is there stays, and so does one that is not asked for
    narrow = with_head_of(teacher, tiny_checkpoint("bert", hidden_size=16), seed=0)
    assert narrow.module.classifier.weight.shape == (3, 16)
    assert with_head_of(teacher, made, seed=0) is made
    assert with_head_of(student, student, seed=0) is student


def test_names_must_be_those_of_the_model() -> None:
    source = tiny_checkpoint("bert", "text-classification", id2label={0: "no", 1: "yes"})
    assert with_head(source, CLASSIFY, Classes(2, ("no", "yes")), 0)[1] == ()
    with pytest.raises(ModelError, match="labels bad, good are not what the model knows"):
        with_head(source, CLASSIFY, Classes(2, ("bad", "good")), 0)


def test_architectures_without_the_task_are_named() -> None:
    with pytest.raises(ModelError, match="vit has no model for the task text-classification"):
        with_head(tiny_checkpoint("vit"), CLASSIFY, Classes(2), 0)


def test_classes_come_from_the_data() -> None:
    assert classes_of(labelled([0, 2, 1])) == Classes(3)
    assert classes_of(labelled([0, 1], ("bad", "good"))) == Classes(2, ("bad", "good"))
    assert classes_of(labelled([0.5, 1.0], role="score")) == Classes(1, regression=True)
    with pytest.raises(DataError, match="only one label, 1"):
        classes_of(labelled([1, 1, 1]))
    with pytest.raises(DataError, match="example 2 has label -1"):
        classes_of(labelled([0, -1]))


@pytest.mark.parametrize(
    ("family", "own", "roles", "wanted", "expected"),
    [
        ("bert", "sentence-embedding", {"text", "label"}, None, "text-classification"),
        ("bert", "sentence-embedding", {"text", "text_pair", "score"}, None, "text-classification"),
        ("gpt2", "text-generation", {"text"}, None, "text-generation"),
        ("gpt2", "text-generation", {"text", "label"}, "text-generation", "text-generation"),
        ("gpt2", "feature-extraction", {"text"}, None, "text-generation"),
        ("t5", "text2text-generation", {"text", "text_pair"}, None, "text2text-generation"),
        ("bert", "fill-mask", {"text"}, None, "fill-mask"),
        ("vit", "feature-extraction", {"image", "label"}, None, "image-classification"),
    ],
)
def test_the_task_follows_from_data_and_model(
    family: str, own: str, roles: set[str], wanted: str | None, expected: str
) -> None:
    config = tiny_checkpoint(family, num_hidden_layers=1).config
    assert training_task(config, roles, wanted, own).name == expected


@pytest.mark.parametrize(
    ("roles", "wanted", "error", "told"),
    [
        ({"text"}, None, ConfigError, "pass --task with one of text-generation, fill-mask"),
        ({"text"}, "text-classification", DataError, "needs data with label"),
        ({"image"}, None, DataError, "no task is trained on data with image alone"),
        ({"text"}, "sentence-embedding", ConfigError, "cannot be trained"),
        ({"text"}, "knitting", ConfigError, "unknown task"),
    ],
)
def test_tasks_that_cannot_be_told(
    roles: set[str], wanted: str | None, error: type[Exception], told: str
) -> None:
    config = tiny_checkpoint("bert", num_hidden_layers=1).config
    with pytest.raises(error, match=told):
        training_task(config, roles, wanted, "sentence-embedding")
