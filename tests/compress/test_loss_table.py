from collections import Counter

import pytest
import torch

from calib_data.errors import ConfigError
from compress.checkpoint import Checkpoint
from compress.distill import Distillation, DistillConfig, prepare
from compress.loss_table import LOSSES, relation_heads
from compress.training import TrainConfig, units
from onnxpress.cli.distillation import LOSS_NAMES
from tests.compress.pairs import CASES, batch_for, halves, make, padded

OF_OUTPUTS = ("logits", "reverse-kl", "jsd", "logits-mse", "hard")
OF_LAYERS = ("hidden", "hidden-cosine", "attention", "relations")
OF_VECTORS = ("embedding", "similarity", "contrastive")
IN_BATCH = ("similarity", "contrastive")  # which compare the rows of one batch


def names_for(task: str) -> tuple[str, ...]:
    return (*OF_LAYERS, *(OF_VECTORS if task == "sentence-embedding" else OF_OUTPUTS))


def pair(family: str, task: str, **changes: object) -> tuple[Checkpoint, Checkpoint]:
    """A teacher of more layers, and a student with other weights and widths where that can be."""
    layers = {"num_hidden_layers": 4}
    if family == "bart":
        layers = {"encoder_layers": 3, "decoder_layers": 4}
    if family == "t5":
        layers = {"num_layers": 3, "num_decoder_layers": 4}
    return make(family, task, **layers), make(family, task, seed=1, **changes)


def setup(
    teacher: Checkpoint, student: Checkpoint, names: tuple[str, ...], **settings: object
) -> Distillation:
    config = DistillConfig(names, **{"alpha": 1.0 if "logits" in names else None, **settings})
    return prepare(teacher, student, [batch_for(student)], config)


def gradients(made: Distillation, parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The summed terms of a step of several batches, and their gradient by each weight."""
    step: Counter[str] = Counter()
    for part in parts:
        step.update(units(part))
    trained = torch.nn.ModuleList([made.student.module, made.pairing.setup.projections])
    trained.zero_grad()
    totals: Counter[str] = Counter()
    for part in parts:
        terms = made.terms(part, step)
        torch.stack(list(terms.values())).sum().backward()
        totals.update({name: float(value.detach()) for name, value in terms.items()})
    found = {n: p.grad.clone() for n, p in trained.named_parameters() if p.grad is not None}
    return found | {name: torch.tensor(value) for name, value in totals.items()}


def test_the_command_line_names_the_table() -> None:
    assert tuple(LOSSES) == LOSS_NAMES


@pytest.mark.parametrize(("family", "task"), CASES)
def test_every_loss_is_zero_for_equals_and_not_for_others(family: str, task: str) -> None:
    teacher, student = pair(family, task)
    names = names_for(task)
    same = setup(teacher, teacher, names)
    other = setup(teacher, student, names)
    batch = batch_for(teacher)
    with torch.no_grad():
        zero, more = same.terms(batch, units(batch)), other.terms(batch, units(batch))
    assert set(zero) == set(more) == set(names)
    for name in names:
        assert more[name] > 1e-4, name
        assert name == "hard" or abs(zero[name]) < 1e-5, name


@pytest.mark.parametrize(("family", "task"), CASES)
def test_two_batches_have_the_gradient_of_one(family: str, task: str) -> None:
    teacher, student = pair(family, task)
    names = tuple(name for name in names_for(task) if name not in IN_BATCH)
    made = setup(teacher, student, names)
    batch = batch_for(student)
    whole, parts = gradients(made, [batch]), gradients(made, halves(batch, student))
    assert whole.keys() == parts.keys()
    assert len(whole) > len(names) + 10
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-5, msg=name)
    means = gradients(made, halves(batch, student)[:1])  # a half alone is not the whole
    assert any(not means[name].allclose(whole[name], rtol=1e-2) for name in names)


@pytest.mark.parametrize(("family", "task"), [c for c in CASES if c[0] != "vit"])
def test_padding_does_not_matter(family: str, task: str) -> None:
    teacher, student = pair(family, task)
    made = setup(teacher, student, names_for(task))
    batch = batch_for(student)
    with torch.no_grad():
        plain = made.terms(batch, units(batch))
        more = padded(batch, 5, student)
        wide = made.terms(more, units(more))
    for name, value in plain.items():
        torch.testing.assert_close(wide[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(("family", "task"), CASES)
def test_gradients_reach_every_layer_of_the_student_and_no_teacher(family: str, task: str) -> None:
    teacher, student = pair(family, task)
    for name in names_for(task):
        made = setup(teacher, student, (name,), layer_map="last")
        found = gradients(made, [batch_for(student)])
        assert all(value.isfinite().all() for value in found.values()), name
        assert sum(bool(value.any()) for value in found.values()) > 5, name
        assert all(p.grad is None for p in teacher.module.parameters()), name


WIDE = [
    ("bert", "sentence-embedding", {"hidden_size": 24, "num_attention_heads": 3}),
    ("llama", "text-generation", {"num_attention_heads": 2, "head_dim": 8, "hidden_size": 16}),
    ("t5", "text2text-generation", {"d_model": 16, "hidden_size": 16, "num_heads": 2}),
    ("vit", "image-classification", {"hidden_size": 48}),
]


@pytest.mark.parametrize(("family", "task", "changes"), WIDE)
def test_other_widths_and_heads_meet_through_learned_projections(
    family: str, task: str, changes: dict[str, int]
) -> None:
    teacher, student = pair(family, task, **changes)
    made = setup(teacher, student, OF_LAYERS)
    sizes = {tuple(p.weight.shape) for p in made.pairing.setup.projections.values()}
    mine = student.config.hidden_size
    assert sizes == {(32, mine)}
    found = gradients(made, [batch_for(student)])
    assert sum(name.startswith("1.") for name in found) == len(made.pairing.setup.projections)
    again = setup(teacher, student, OF_LAYERS).pairing.setup.projections
    other = DistillConfig(OF_LAYERS, train=TrainConfig(seed=5))
    third = prepare(teacher, student, [batch_for(student)], other).pairing.setup.projections
    for name, module in made.pairing.setup.projections.items():
        assert module.weight.equal(again[name].weight)
        assert not module.weight.equal(third[name].weight)


def test_layers_are_averaged_and_weights_weigh() -> None:
    teacher, student = pair("bert", "text-classification")
    batch = batch_for(student)

    def value(*names: str, **settings: object) -> dict[str, float]:
        with torch.no_grad():
            terms = setup(teacher, student, names, **settings).terms(batch, units(batch))
        return {name: float(term) for name, term in terms.items()}

    pairs = [value("hidden", layer_map=text)["hidden"] for text in ("0:0", "1:3", "0:0,1:3")]
    assert pairs[2] == pytest.approx((pairs[0] + pairs[1]) / 2)
    assert value("hidden", layer_map="uniform")["hidden"] == pytest.approx(pairs[2])
    assert value("hidden=0.25", layer_map="0:0")["hidden"] == pytest.approx(pairs[0] / 4)
    both = value("hidden", layer_map="-1:-1,1:3")["hidden"]
    embeddings = value("hidden", layer_map="-1:-1")["hidden"]
    assert both == pytest.approx((embeddings + pairs[1]) / 2)
    assert value("relations", relation_map="0:2") != value("relations")
    heads = [value("relations", relation_heads=n)["relations"] for n in (1, 4, 0)]
    assert heads[1] == heads[2] != heads[0]


def test_alpha_mixes_and_is_left_alone_without_labels() -> None:
    teacher, student = pair("bert", "text-classification")
    batch = batch_for(student)

    def value(alpha: float | None, *names: str, labels: bool = True) -> dict[str, float]:
        rows = batch if labels else {k: v for k, v in batch.items() if k != "labels"}
        made = prepare(teacher, student, [rows], DistillConfig(names, alpha=alpha))
        with torch.no_grad():
            return {k: float(v) for k, v in made.terms(rows, units(rows)).items()}

    soft, hard = value(1.0, "logits")["logits"], value(0.0, "logits")["hard"]
    assert value(0.3, "logits=2") == pytest.approx({"logits": 0.6 * soft, "hard": 1.4 * hard})
    assert value(None) == pytest.approx({"logits": 0.7 * soft, "hard": 0.3 * hard})
    assert value(None, labels=False) == pytest.approx({"logits": soft})
    assert value(0.5, "logits", "hard=1") == pytest.approx(
        {"logits": 0.5 * soft, "hard": 1.5 * hard}
    )
    assert value(None, "hard") == pytest.approx({"hard": hard})


def test_labels_alone_need_no_teacher() -> None:
    teacher, student = pair("bert", "text-classification")
    made = prepare(teacher, student, [batch_for(student)], DistillConfig(("hard",)))

    def fail(*_: object) -> None:
        raise AssertionError("the teacher ran")

    teacher.module.register_forward_pre_hook(fail)
    batch = batch_for(student)
    assert made.terms(batch, units(batch))["hard"] > 0


def test_a_batch_without_any_label_counts_nothing() -> None:
    teacher, student = pair("bert", "fill-mask")
    made = setup(teacher, student, ("logits", "hard"))
    batch = batch_for(student)
    empty = batch | {"labels": torch.full_like(batch["labels"], -100)}
    step = {k: units(batch)[k] + units(empty)[k] for k in units(batch)}
    terms = made.terms(empty, step)
    assert {name: float(value.detach()) for name, value in terms.items()} == {
        "logits": 0,
        "hard": 0,
    }
    torch.stack(list(terms.values())).sum().backward()
    assert not any(p.grad.any() for p in student.module.parameters() if p.grad is not None)


def test_relation_heads_fit_both() -> None:
    student, teacher = torch.zeros(1, 3, 5, 8), torch.zeros(1, 4, 5, 8)
    assert relation_heads(student, teacher) == 4  # of 24 and 32
    assert relation_heads(teacher, teacher) == 4
    assert relation_heads(student, teacher, 8) == 8
    with pytest.raises(ConfigError, match=r"use one of 1, 2, 4, 8$"):
        relation_heads(student, teacher, 3)
