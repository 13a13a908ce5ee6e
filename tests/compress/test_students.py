from pathlib import Path

import pytest
import torch

from calib_data.errors import ConfigError, ModelError
from compress.checkpoint import weights_sha256
from compress.loading import open_checkpoint
from compress.observe import observe
from compress.quantize import quantize
from compress.quantize_config import QuantizeConfig
from compress.stacks import layer_stack
from compress.students import evenly_spaced
from tests.compress.test_prune import apply_plan, random_plan
from tests.tiny import student_from_layers, tiny_checkpoint, write


@pytest.mark.parametrize(
    ("layers", "keep", "expected"),
    [
        (6, 3, [0, 2, 5]),
        (12, 6, [0, 2, 4, 6, 8, 11]),
        (12, 12, list(range(12))),
        (6, 2, [0, 5]),
        (6, 1, [0]),
    ],
)
def test_layers_are_evenly_spaced(layers: int, keep: int, expected: list[int]) -> None:
    assert evenly_spaced(layers, keep) == expected


@pytest.mark.parametrize("keep", [0, 7])
def test_too_many_layers_are_refused(keep: int) -> None:
    with pytest.raises(ConfigError, match="teacher's 6"):
        evenly_spaced(6, keep)


FAMILIES = ["bert", "distilbert", "gpt2", "llama", "modernbert", "roberta", "vit"]


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_stack_is_found(family: str) -> None:
    assert len(layer_stack(tiny_checkpoint(family, num_hidden_layers=3).module)[1]) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_first_layers_compute_what_the_teacher_computes(family: str) -> None:
    teacher = tiny_checkpoint(family, num_hidden_layers=4)
    before = weights_sha256(teacher.module)
    student = student_from_layers(teacher, [0, 1])
    sample = teacher.signature.sample(2, 8)
    theirs, mine = (
        observe(checkpoint, sample, frozenset({"layers"})).layers
        for checkpoint in (teacher, student)
    )
    assert len(mine) == 2
    assert len(theirs) == 4
    for first, second in zip(mine, theirs):
        assert first.equal(second)
    assert student.config.num_hidden_layers == 2
    assert teacher.config.num_hidden_layers == 4
    assert weights_sha256(teacher.module) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_student_reloads(family: str, tmp_path: Path) -> None:
    student = student_from_layers(tiny_checkpoint(family, num_hidden_layers=4), [0, 3])
    again = open_checkpoint(write(student, tmp_path / "student"))
    sample = student.signature.sample(2, 8)
    for name, value in student.predict(sample).items():
        assert (again.predict(sample)[name] == value).all()


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_pruned_teacher_gives_a_student_of_its_widths(family: str, tmp_path: Path) -> None:
    whole = tiny_checkpoint(family, num_hidden_layers=4)
    teacher = apply_plan(whole, random_plan(whole))
    student = student_from_layers(teacher, [0, 3])
    stack = layer_stack(student.module)[0]
    for key, count in student.structure.items():
        if f"{stack}.1." in key:
            assert count == teacher.structure[key.replace(f"{stack}.1.", f"{stack}.3.")]
    assert len(student.structure) == len(teacher.structure) / 2
    again = open_checkpoint(write(student, tmp_path / "student"))
    sample = student.signature.sample(2, 8)
    output = student.signature.outputs[0]
    assert (again.predict(sample)[output] == student.predict(sample)[output]).all()


def test_cache_indices_follow() -> None:
    student = student_from_layers(
        tiny_checkpoint("gpt2", "text-generation", num_hidden_layers=4), [1, 3]
    )
    assert [block.attn.layer_idx for block in student.module.transformer.h] == [0, 1]
    ids = torch.tensor([[5, 6, 7]])
    assert student.module.generate(ids, max_new_tokens=2, do_sample=False).shape[1] > 3


def test_quantized_teachers_and_those_with_sizes_in_code_are_refused() -> None:
    made = quantize(tiny_checkpoint("bert"), QuantizeConfig()).checkpoint
    with pytest.raises(ModelError, match="start from the float one"):
        student_from_layers(made, [0])
    factory = open_checkpoint("tests.compress.factories:mixer")
    with pytest.raises(ModelError, match="sizes in code"):
        student_from_layers(factory, [0])


def test_two_stacks_are_not_one() -> None:
    with pytest.raises(ModelError, match="2 stacks of layers"):
        layer_stack(tiny_checkpoint("bart").module)


@pytest.mark.parametrize("keep", [[-1, 0], [0, 4]])
def test_layers_that_there_are_not_are_refused(keep: list[int]) -> None:
    with pytest.raises(ConfigError, match="from 0 to 3"):
        student_from_layers(tiny_checkpoint("bert", num_hidden_layers=4), keep)
