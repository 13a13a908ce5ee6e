"""Students that are narrower than their teacher, over the families."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import compress.resize
from calib_data.errors import DataError, ModelError
from compress.apply_plan import apply_plan
from compress.checkpoint import Checkpoint, weights_sha256
from compress.loading import open_checkpoint
from compress.sizes import StudentShape, build
from compress.stacks import layer_stacks
from compress.students import make_student
from tests.compress.test_prune import random_plan
from tests.compress.test_sentence import change
from tests.tiny import (
    FAMILIES,
    tiny_batches,
    tiny_checkpoint,
    write,
    write_sentence_encoder,
)

HALF = StudentShape(hidden=16, heads=2, ffn=32)


def samples(checkpoint: Checkpoint, count: int = 2) -> list[dict[str, torch.Tensor]]:
    return [checkpoint.signature.sample(2, 8, seed=seed, ragged=True) for seed in range(count)]


def same_outputs(one: Checkpoint, other: Checkpoint) -> bool:
    sample = samples(one, 1)[0]
    mine, theirs = one.predict(sample), other.predict(sample)
    return all((mine[name] == theirs[name]).all() for name in one.signature.outputs)


def distance(student: Checkpoint, teacher: Checkpoint) -> float:
    found = []
    for sample in samples(teacher):
        mine, theirs = (c.predict(sample)[c.output] for c in (student, teacher))
        found.append(float(np.mean((mine - theirs) ** 2)))
    return float(np.mean(found))


@pytest.mark.parametrize("family", [*FAMILIES, "marian"])
def test_half_the_widths_work_and_reopen_as_a_plain_model(family: str, tmp_path: Path) -> None:
    teacher = tiny_checkpoint(family)
    before = weights_sha256(teacher.module)
    student = make_student(teacher, HALF, samples(teacher))
    config = student.config
    assert [config.hidden_size, config.num_attention_heads] == [16, 2]
    assert dict(student.structure) == {}
    assert weights_sha256(teacher.module) == before
    directory = write(student, tmp_path / "student")
    assert same_outputs(student, open_checkpoint(directory, task=student.task))
    plain = transformers.AutoModel.from_pretrained(directory).eval()
    sample = samples(student, 1)[0]
    with torch.no_grad():
        output = plain(**sample)[0]
    assert (output.numpy() == student.predict(sample)[student.output]).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_teachers_own_widths_give_the_teacher_to_the_bit(family: str) -> None:
    teacher = tiny_checkpoint(family)
    neurons = 128 if family == "gpt2" else 64  # whose config says nothing: four times hidden
    student = make_student(teacher, StudentShape(hidden=32, heads=4, ffn=neurons), ())
    assert weights_sha256(student.module) == weights_sha256(teacher.module)
    assert same_outputs(student, teacher)
    mine, theirs = student.config.to_dict(), teacher.config.to_dict()
    assert {k for k in mine if mine[k] != theirs.get(k)} <= {"dtype"}


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("bert", "text-classification"),
        ("distilbert", "text-classification"),
        ("roberta", "text-classification"),
        ("electra", "text-classification"),
        ("bert", "fill-mask"),
        ("mpnet", "fill-mask"),
        ("gpt2", "text-generation"),
        ("llama", "text-generation"),
        ("qwen2", "text-generation"),
        ("t5", "text2text-generation"),
        ("bart", "text2text-generation"),
        ("vit", "image-classification"),
    ],
)
def test_heads_for_a_task_follow(family: str, task: str, tmp_path: Path) -> None:
    teacher = tiny_checkpoint(family, task)
    student = make_student(teacher, HALF, samples(teacher))
    assert same_outputs(student, open_checkpoint(write(student, tmp_path / "student")))
    sample = samples(teacher, 1)[0]
    assert student.predict(sample)[student.output].shape == (
        teacher.predict(sample)[teacher.output].shape
    )


# a task's head makes the output depend on more than the last norm
@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("bert", "text-classification"),
        ("gpt2", "text-generation"),
        ("llama", "text-generation"),
        ("t5", "text2text-generation"),
        ("vit", "image-classification"),
    ],
)
def test_important_weights_are_a_better_start_than_random_ones(family: str, task: str) -> None:
    teacher = tiny_checkpoint(family, task)
    shape = StudentShape(ffn=48, hidden=24) if family != "llama" else StudentShape(ffn=48, heads=2)
    student = make_student(teacher, shape, samples(teacher, 8))
    fresh = [_fresh(student, seed) for seed in range(3)]
    assert distance(student, teacher) < min(distance(other, teacher) for other in fresh)


def _fresh(student: Checkpoint, seed: int) -> Checkpoint:
    """A model of the student's shape whose weights are the student's own in another order."""
    module = build(student.backbone, student.config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for mine, theirs in zip(module.parameters(), student.backbone.parameters()):
            order = torch.randperm(theirs.numel(), generator=random)
            mine.copy_(theirs.flatten()[order].reshape(theirs.shape))
    return replace(student, module=module.eval())


def test_the_choice_is_that_of_importance_and_repeats() -> None:
    teacher = tiny_checkpoint("bert", "text-classification")
    with torch.no_grad():  # neurons 8 and up of the first layer, channels 24 and up: without effect
        layer = teacher.module.bert.encoder.layer[0]
        layer.output.dense.weight[:, 8:] = 0
        for value in teacher.module.parameters():
            if value.shape[0] == 32:
                value[24:] = 0
            if value.dim() == 2 and value.shape[1] == 32:
                value[:, 24:] = 0
    batches = samples(teacher, 4)
    first, second = (make_student(teacher, StudentShape(hidden=24, ffn=8), batches) for _ in "ab")
    assert weights_sha256(first.module) == weights_sha256(second.module)
    mine = first.module.bert.encoder.layer[0].intermediate.dense.weight
    theirs = teacher.module.bert.encoder.layer[0].intermediate.dense.weight
    assert mine.equal(theirs[:8, :24])
    table = teacher.module.bert.embeddings.word_embeddings.weight
    assert first.module.bert.embeddings.word_embeddings.weight.equal(table[:, :24])


@pytest.mark.parametrize("family", ["t5", "mpnet"])
def test_heads_with_a_shared_bias_are_the_same_in_all_layers(family: str) -> None:
    teacher = tiny_checkpoint(family)
    shape = StudentShape(heads=2) if family == "t5" else StudentShape(hidden=16)
    student = make_student(teacher, shape, samples(teacher))
    names = [
        n for n in teacher.backbone.state_dict() if n.endswith("relative_attention_bias.weight")
    ]
    assert names
    for name in names:
        before, after = (c.backbone.state_dict()[name] for c in (teacher, student))
        assert after.shape == (before.shape[0], 2)
        assert {tuple(column.tolist()) for column in after.t()} < {
            tuple(column.tolist()) for column in before.t()
        }


def keys_of_layer(student: Checkpoint, stack: str, place: int) -> dict[str, torch.Tensor]:
    layer = layer_stacks(student.backbone)[stack][place]
    return dict(layer.state_dict())


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_both_stacks_lose_the_same_layers(family: str, tmp_path: Path) -> None:
    names = {
        "t5": ("num_layers", "num_decoder_layers"),
        "bart": ("encoder_layers", "decoder_layers"),
    }
    changes = dict.fromkeys(("num_hidden_layers", *names[family]), 3)
    teacher = tiny_checkpoint(family, "text2text-generation", **changes)
    student = make_student(teacher, StudentShape(keep_layers=(1, 2)))
    stacks = layer_stacks(teacher.backbone)
    assert len(stacks) == 2
    for stack in stacks:
        for place, layer in enumerate((1, 2)):
            mine, theirs = (
                keys_of_layer(student, stack, place),
                keys_of_layer(teacher, stack, layer),
            )
            assert all(mine[name].equal(theirs[name]) for name in theirs)
    if family == "t5":  # the bias that the first layer holds for all
        name = "layer.0.SelfAttention.relative_attention_bias.weight"
        for stack in stacks:
            mine, theirs = keys_of_layer(student, stack, 0), keys_of_layer(teacher, stack, 0)
            assert mine[name].equal(theirs[name])
    assert same_outputs(student, open_checkpoint(write(student, tmp_path / "student")))


def test_a_first_layer_that_is_unlike_the_others_reopens(tmp_path: Path) -> None:
    teacher = tiny_checkpoint("modernbert", num_hidden_layers=4)  # its first has no norm of its own
    student = make_student(teacher, StudentShape(keep_layers=(1, 3)))
    assert same_outputs(student, open_checkpoint(write(student, tmp_path / "student")))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_layers_and_widths_together(family: str) -> None:
    teacher = tiny_checkpoint(family, num_hidden_layers=4)
    student = make_student(
        teacher, StudentShape(layers=2, hidden=16, heads=2, ffn=32), samples(teacher)
    )
    assert [len(stack) for stack in layer_stacks(student.backbone).values()] == [2]
    assert student.config.num_hidden_layers == 2
    student.predict(samples(student, 1)[0])


def test_a_pruned_teacher_needs_widths_that_its_smallest_layer_has() -> None:
    whole = tiny_checkpoint("bert")
    teacher = apply_plan(whole, random_plan(whole))
    with pytest.raises(ModelError, match=r"is pruned: .* pass --"):
        make_student(teacher, StudentShape(ffn=2), samples(teacher))
    smallest = min(v for k, v in teacher.structure.items() if k.endswith("neurons"))
    heads = min(v for k, v in teacher.structure.items() if k.endswith("heads"))
    shape = StudentShape(hidden=heads * 8, ffn=smallest)
    student = make_student(teacher, shape, samples(teacher))
    assert student.config.intermediate_size == smallest
    assert not student.structure


def test_a_sentence_encoders_files_follow(tmp_path: Path) -> None:
    teacher = open_checkpoint(write_sentence_encoder(tmp_path / "teacher"))
    student = make_student(teacher, StudentShape(hidden=16), tiny_batches())
    batch = next(iter(tiny_batches()))
    assert student.predict(batch)["sentence_embedding"].shape[1] == 16
    directory = write(student, tmp_path / "student")
    settings = json.loads((directory / "1_Pooling" / "config.json").read_text())
    assert settings == {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
    again = open_checkpoint(directory)
    assert (
        again.predict(batch)["sentence_embedding"] == student.predict(batch)["sentence_embedding"]
    ).all()
    whole = write(teacher, tmp_path / "same")
    name = "1_Pooling/config.json"
    assert (whole / name).read_bytes() == (tmp_path / "teacher" / name).read_bytes()


def encoder_with_projection(directory: Path) -> Path:
    write_sentence_encoder(directory)
    change(directory, dense=True, pooling={"pooling_mode_cls_token": True}, norm=True)
    return directory


def test_a_projection_after_the_pooling_keeps_its_width(tmp_path: Path) -> None:
    teacher = open_checkpoint(encoder_with_projection(tmp_path / "teacher"))
    student = make_student(teacher, StudentShape(hidden=16), tiny_batches())
    batch = next(iter(tiny_batches()))
    widths = [c.predict(batch)["sentence_embedding"].shape[1] for c in (teacher, student)]
    assert widths[0] == widths[1]
    again = open_checkpoint(write(student, tmp_path / "student"))
    assert (
        again.predict(batch)["sentence_embedding"] == student.predict(batch)["sentence_embedding"]
    ).all()


def test_a_projection_that_was_trained_is_saved(tmp_path: Path) -> None:
    encoder = open_checkpoint(encoder_with_projection(tmp_path / "encoder"))
    with torch.no_grad():
        own = dict(encoder.module.named_parameters())
        next(value for name, value in own.items() if not name.startswith("backbone")).mul_(2)
    again = open_checkpoint(write(encoder, tmp_path / "again"))
    batch = next(iter(tiny_batches()))
    assert (
        again.predict(batch)["sentence_embedding"] == encoder.predict(batch)["sentence_embedding"]
    ).all()


def test_widths_need_data_to_choose_by() -> None:
    with pytest.raises(DataError, match="--data"):
        make_student(tiny_checkpoint("bert"), HALF, ())


def test_what_cannot_be_made_smaller_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="share one layer"):
        make_student(tiny_checkpoint("albert", num_hidden_layers=3), StudentShape(layers=2))
    teacher = tiny_checkpoint("bert")
    monkeypatch.setattr(compress.resize, "along_units", lambda *_: {})
    with pytest.raises(ModelError, match="no head's, neuron's or channel's"):
        make_student(teacher, StudentShape(ffn=40), samples(teacher))
