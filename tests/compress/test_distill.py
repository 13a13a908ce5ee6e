import numpy as np
import pytest

from calib_data.errors import ModelError
from compress.checkpoint import Checkpoint, weights_sha256
from compress.distill import DistillConfig, distill, distillation_terms, layer_map
from compress.losses import soft_cross_entropy
from compress.quantize import QuantizeConfig, quantize
from compress.students import student_from_layers
from compress.training import TrainConfig
from tests.compress.test_prune import apply_plan, random_plan
from tests.tiny import tiny_batches, tiny_checkpoint

BRIEF = TrainConfig(steps=25, learning_rate=2e-3)
LARGE = {
    "initializer_range": 0.1
}  # fresh layers of the usual size hardly change what they are given


def distance(student: Checkpoint, teacher: Checkpoint) -> float:
    sample = next(iter(tiny_batches()))
    mine, theirs = (c.predict(sample)[c.output] for c in (student, teacher))
    mask = sample["attention_mask"].numpy()
    if mine.ndim == 3:
        mine, theirs = mine[mask == 1], theirs[mask == 1]
    return float(np.sqrt(np.mean((mine - theirs) ** 2)))


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("bert", "text-classification"),
        ("bert", "feature-extraction"),
        ("gpt2", "text-generation"),
    ],
)
def test_student_comes_nearer(family: str, task: str) -> None:
    teacher = tiny_checkpoint(family, task, num_hidden_layers=4, **LARGE)
    student = student_from_layers(teacher, [0, 3])
    hashes = [weights_sha256(c.module) for c in (teacher, student)]
    batches = tiny_batches()
    told: list[float] = []
    result = distill(teacher, student, batches, DistillConfig(alpha=1.0, train=BRIEF), told.append)
    assert distance(result.checkpoint, teacher) < 0.8 * distance(student, teacher)
    assert [weights_sha256(c.module) for c in (teacher, student)] == hashes
    assert result.report["losses"] == told
    assert result.report["parameters_student"] < result.report["parameters_teacher"]
    entry = result.checkpoint.lineage[-1]
    assert [entry[k] for k in ("stage", "teacher", "parent", "data")] == [
        "distill",
        *hashes,
        batches.fingerprint,
    ]
    assert DistillConfig.from_json({k: v for k, v in entry["settings"].items() if k != "weights"})


def test_pruned_student_heals() -> None:
    teacher = tiny_checkpoint("bert", "text-classification", **LARGE)
    student = apply_plan(teacher, random_plan(teacher))
    result = distill(teacher, student, tiny_batches(), DistillConfig(train=BRIEF))
    assert distance(result.checkpoint, teacher) < 0.8 * distance(student, teacher)
    assert result.checkpoint.structure == student.structure


def test_loss_of_the_teacher_itself_is_zero() -> None:
    teacher = tiny_checkpoint("bert")
    batch = next(iter(tiny_batches()))
    loss = distillation_terms(teacher, teacher, batch, {"hidden": 1.0}, DistillConfig())["hidden"]
    assert float(loss.detach()) == 0


def test_weights_and_alpha_weigh() -> None:
    teacher = tiny_checkpoint("bert", "text-classification")
    student = tiny_checkpoint("bert", "text-classification", seed=1)
    batch = next(iter(tiny_batches(8, label=[0, 1] * 4)))

    def loss(alpha: float, **weights: float) -> float:
        config = DistillConfig(alpha=alpha, temperature=2.0)
        terms = distillation_terms(teacher, student, batch, weights, config)
        return sum(float(value.detach()) for value in terms.values())

    soft, hard, hidden = loss(1, logits=1.0), loss(0, logits=1.0), loss(1, hidden=1.0)
    expected = soft_cross_entropy(
        student.forward(batch)["logits"], teacher.forward(batch)["logits"], 2.0
    )
    assert soft == pytest.approx(float(expected.detach()))
    assert loss(0.3, logits=2.0, hidden=0.5) == pytest.approx(
        2 * (0.3 * soft + 0.7 * hard) + 0.5 * hidden
    )


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [(3, 6, [0, 2, 5]), (1, 6, [5]), (2, 2, [0, 1])],
)
def test_layers_meet_last_to_last(student: int, teacher: int, expected: list[int]) -> None:
    assert layer_map(student, teacher) == expected


BERT = ("bert", "text-classification")


@pytest.mark.parametrize(
    ("teacher", "student", "losses", "message"),
    [
        (BERT, tiny_checkpoint("bert"), (), "teacher is for text-classification"),
        (BERT, tiny_checkpoint(*BERT, num_labels=3), ("logits",), "needs the same logits"),
        (
            ("gpt2", "text-generation"),
            tiny_checkpoint("gpt2", "text-generation", vocab_size=200),
            ("logits",),
            "200 token ids, the teacher 107",
        ),
        (BERT, tiny_checkpoint(*BERT, hidden_size=16), ("hidden",), "needs equal widths"),
        (BERT, tiny_checkpoint(*BERT, num_hidden_layers=3), ("hidden",), "only 2"),
        (("bert", "feature-extraction"), tiny_checkpoint("bert"), ("embedding",), "one vector"),
        (
            BERT,
            quantize(tiny_checkpoint(*BERT), QuantizeConfig()).checkpoint,
            (),
            "quantized student",
        ),
    ],
    ids=["task", "labels", "vocabulary", "width", "depth", "no embedding", "quantized"],
)
def test_pairs_that_cannot_be_compared_are_refused(
    teacher: tuple[str, str], student: Checkpoint, losses: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        distill(tiny_checkpoint(*teacher), student, tiny_batches(), DistillConfig(losses=losses))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4
