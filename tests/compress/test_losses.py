import pytest
import torch
from torch.nn import functional as F

from compress.losses import (
    embedding_loss,
    hard_loss,
    hidden_state_loss,
    similarity_loss,
    soft_cross_entropy,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kl_matches_torch(temperature: float) -> None:
    student, teacher = random(5, 7), random(5, 7, seed=1)
    expected = temperature**2 * F.kl_div(
        F.log_softmax(student / temperature, -1),
        F.log_softmax(teacher / temperature, -1),
        reduction="batchmean",
        log_target=True,
    )
    torch.testing.assert_close(soft_cross_entropy(student, teacher, temperature), expected)


def test_kl_of_equals_is_zero_and_its_gradient_is_of_one_size() -> None:
    teacher = random(64, 7)
    assert soft_cross_entropy(teacher, teacher, 3.0).abs() < 1e-6
    sizes = []
    for temperature in (10.0, 40.0):
        student = random(64, 7, seed=1).requires_grad_()
        soft_cross_entropy(student, teacher, temperature).backward()
        assert student.grad is not None
        sizes.append(float(student.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)  # without T² it would be 16 times


def test_masks_exclude_padding() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    student, teacher = random(2, 3, 5), random(2, 3, 5, seed=1)
    noisy = torch.where(mask.unsqueeze(-1) == 0, torch.full_like(student, 50.0), student)
    real = mask.bool()
    for loss, alone in (
        (
            lambda x: soft_cross_entropy(x, teacher, 2.0, mask),
            soft_cross_entropy(student[real], teacher[real], 2.0),
        ),
        (
            lambda x: hidden_state_loss(x, teacher, mask),
            hidden_state_loss(student[real], teacher[real]),
        ),
    ):
        torch.testing.assert_close(loss(student), alone)
        torch.testing.assert_close(loss(noisy), alone)
    assert not hidden_state_loss(noisy, teacher).isclose(hidden_state_loss(student, teacher))


def test_hidden_states_known_values() -> None:
    teacher = torch.full((1, 2, 3), 2.0)
    assert hidden_state_loss(teacher, teacher) == 0
    assert hidden_state_loss(torch.zeros_like(teacher), teacher) == 1  # relative to the teacher
    assert hidden_state_loss(1000 * teacher / 2, 1000 * teacher) == 0.25


def test_embeddings_known_values() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert embedding_loss(x, 5 * x) == 0
    assert embedding_loss(x, -x) == 2
    assert embedding_loss(x, x.flip(1)) == 1


def test_similarity_known_values() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    rotated = torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 2.0]])  # another width and size
    assert similarity_loss(rotated, x) == 0
    assert similarity_loss(torch.ones(2, 2), x) == pytest.approx(1.0)
    assert similarity_loss(x[:1], x[:1]) == 0


def test_hard_loss_of_classes() -> None:
    logits, labels = random(4, 3), torch.tensor([0, 2, 1, 1])
    found = hard_loss("class", {"logits": logits}, {"labels": labels})
    torch.testing.assert_close(found, F.cross_entropy(logits, labels))
    assert hard_loss("class", {"logits": logits}, {}) is None
    assert hard_loss("none", {"logits": logits}, {"labels": labels}) is None


def test_hard_loss_of_next_tokens_leaves_out_padding() -> None:
    ids, mask = torch.tensor([[3, 1, 4], [2, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    logits = random(2, 3, 6)
    found = hard_loss("next-token", {"logits": logits}, {"input_ids": ids, "attention_mask": mask})
    pairs = [(logits[0, 0], 1), (logits[0, 1], 4), (logits[1, 0], 5)]
    expected = -torch.stack([F.log_softmax(row, -1)[target] for row, target in pairs]).mean()
    torch.testing.assert_close(found, expected)
