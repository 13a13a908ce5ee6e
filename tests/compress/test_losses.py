import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from compress.losses import (
    cosine_distance,
    forward_kl,
    hard_loss,
    hard_targets,
    jensen_shannon,
    map_divergence,
    neighbour_divergence,
    relation_divergence,
    relative_error,
    reverse_kl,
    similarity_difference,
    squared_error,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def soft(logits: Tensor, temperature: float = 1.0) -> Tensor:
    return F.softmax(logits.double() / temperature, dim=-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Independent of the code under test: scipy's way, in double precision."""
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)


# --- distributions ------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kl_matches_torch(temperature: float) -> None:
    student, teacher = random(5, 7), random(5, 7, seed=1)
    expected = temperature**2 * F.kl_div(
        F.log_softmax(student / temperature, -1),
        F.log_softmax(teacher / temperature, -1),
        reduction="batchmean",
        log_target=True,
    )
    torch.testing.assert_close(forward_kl(student, teacher, temperature).mean(), expected)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_reverse_kl_is_the_forward_one_the_other_way_round(temperature: float) -> None:
    student, teacher = random(2, 5, 7), random(2, 5, 7, seed=1)
    p, q = soft(teacher, temperature), soft(student, temperature)
    found = reverse_kl(student, teacher, temperature)
    torch.testing.assert_close(found.double(), temperature**2 * kl(q, p), rtol=1e-5, atol=1e-6)
    assert not found.allclose(forward_kl(student, teacher, temperature), rtol=0.01)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jensen_shannon_by_its_definition(beta: float) -> None:
    student, teacher = random(5, 7), random(5, 7, seed=1)
    p, q = soft(teacher, 2.0), soft(student, 2.0)
    mixture = beta * p + (1 - beta) * q
    expected = 4 * (beta * kl(p, mixture) + (1 - beta) * kl(q, mixture))
    found = jensen_shannon(student, teacher, 2.0, beta)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    if beta == 0.5:
        swapped = jensen_shannon(teacher, student, 2.0, beta)
        torch.testing.assert_close(found, swapped)


def test_jensen_shannon_is_bounded_and_tends_to_the_two_divergences() -> None:
    apart = torch.tensor([[60.0, 0.0]]), torch.tensor([[0.0, 60.0]])
    assert jensen_shannon(*apart) == pytest.approx(math.log(2))
    student, teacher = random(5, 7), random(5, 7, seed=1)
    small = 1e-3
    torch.testing.assert_close(
        jensen_shannon(student, teacher, beta=small) / small,
        forward_kl(student, teacher),
        rtol=0.01,
        atol=1e-3,
    )
    torch.testing.assert_close(
        jensen_shannon(student, teacher, beta=1 - small) / small,
        reverse_kl(student, teacher),
        rtol=0.01,
        atol=1e-3,
    )


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, jensen_shannon])
def test_divergences_of_equals_are_zero_and_gradients_of_one_size(divergence) -> None:  # type: ignore[no-untyped-def]
    teacher = random(64, 7)
    assert divergence(teacher, teacher, 3.0).abs().max() < 1e-6
    sizes = []
    for temperature in (10.0, 40.0):
        student = random(64, 7, seed=1).requires_grad_()
        divergence(student, teacher, temperature).mean().backward()
        assert student.grad is not None
        sizes.append(float(student.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)  # without T² it would be 16 times


def test_half_precision_is_computed_in_full() -> None:
    student, teacher = random(3, 5000) * 4, random(3, 5000, seed=1) * 4
    low = forward_kl(student.bfloat16(), teacher.bfloat16(), 2.0)
    exact = forward_kl(student.bfloat16().double(), teacher.bfloat16().double(), 2.0)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), exact, rtol=1e-4, atol=1e-4)


def test_squared_error_known_values() -> None:
    assert squared_error(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]])) == 5
    assert squared_error(torch.tensor([[2.5]]), torch.tensor([[0.5]])) == 4


# --- hidden states and embeddings ---------------------------------------------------------------


def test_hidden_states_known_values() -> None:
    teacher = torch.full((1, 2, 3), 2.0)
    assert not relative_error(teacher, teacher).any()
    assert (relative_error(torch.zeros_like(teacher), teacher) == 1).all()
    assert (relative_error(1000 * teacher / 2, 1000 * teacher) == 0.25).all()
    assert relative_error(torch.zeros(1, 3), torch.zeros(1, 3)) == 0
    large = torch.cat([1000 * teacher[:, :1], teacher[:, 1:]], dim=1)
    assert (relative_error(large / 2, large) == 0.25).all()  # no token outweighs the others


def test_cosine_distance_known_values() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert cosine_distance(x, 5 * x).tolist() == [0, 0]
    assert cosine_distance(x, -x).tolist() == [2, 2]
    assert cosine_distance(x, x.flip(1)).tolist() == [1, 1]


def test_similarity_known_values() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    rotated = torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 2.0]])  # another width and size
    assert not similarity_difference(rotated, x).any()
    assert similarity_difference(torch.ones(2, 2), x).tolist() == pytest.approx([1, 1])
    assert similarity_difference(x[:1], x[:1]) == 0
    three = random(3, 4), random(3, 4, seed=1)
    cosines = [F.cosine_similarity(v[:, None], v[None], dim=-1) for v in three]
    expected = [sum((cosines[0] - cosines[1])[i, j] ** 2 for j in range(3) if j != i) / 2
                for i in range(3)]  # fmt: skip
    torch.testing.assert_close(similarity_difference(*three), torch.stack(expected))


def test_contrast_has_the_gradient_of_a_cross_entropy_over_the_teachers_embeddings() -> None:
    student, teacher = random(5, 4).requires_grad_(), random(5, 4, seed=1)
    neighbour_divergence(student, teacher, 0.1).mean().backward()
    found, student.grad = student.grad, None
    theirs = F.cosine_similarity(teacher[:, None], teacher[None], dim=-1) / 0.1
    mine = F.cosine_similarity(student[:, None], teacher[None], dim=-1) / 0.1
    F.cross_entropy(mine, theirs.softmax(-1)).backward()
    torch.testing.assert_close(found, student.grad)
    assert neighbour_divergence(3 * teacher, teacher, 0.1).abs().max() < 1e-6
    # where nobody has a neighbour this is InfoNCE with one's own teacher's embedding as positive
    basis = torch.eye(4)
    info = F.cross_entropy(F.normalize(random(4, 4)) / 0.05, torch.arange(4), reduction="none")
    torch.testing.assert_close(
        neighbour_divergence(random(4, 4), basis, 0.05), info, rtol=1e-4, atol=1e-4
    )


# --- attention ----------------------------------------------------------------------------------


def test_map_divergence_by_its_definition_and_with_other_heads() -> None:
    student, teacher = soft(random(2, 4, 5, 5)), soft(random(2, 4, 5, 5, seed=1))
    torch.testing.assert_close(map_divergence(student, teacher), kl(teacher, student).mean(1))
    assert map_divergence(teacher, teacher).abs().max() < 1e-9
    fewer = student[:, :3]
    expected = kl(teacher.mean(1), fewer.mean(1))
    torch.testing.assert_close(map_divergence(fewer, teacher), expected)


def test_map_divergence_takes_maps_with_zeros() -> None:
    causal = torch.ones(3, 3).tril()
    student = (causal / causal.sum(-1, keepdim=True))[None, None].requires_grad_()
    window = torch.eye(3)[None, None]
    found = map_divergence(student, window)
    assert found[0].tolist() == pytest.approx([0, math.log(2), math.log(3)])
    found.sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert map_divergence(window, student.detach()).isfinite().all()


def relations(x: Tensor, heads: int, real: int) -> Tensor:
    """One row of a batch, by the paper's formula, in loops: (heads, real, real)."""
    flat = torch.cat([x[0, h] for h in range(x.shape[1])], dim=-1).double()[:real]  # (T, H·D)
    width = flat.shape[1] // heads
    cut = [flat[:, r * width : (r + 1) * width] for r in range(heads)]
    return torch.stack([(part @ part.t() / width**0.5).softmax(-1) for part in cut])


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_relations_by_the_papers_formula(heads: int) -> None:
    student, teacher = random(1, 2, 5, 8), random(1, 4, 5, 8, seed=1)  # other heads, other width
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    found = relation_divergence(student, teacher, heads, mask)
    expected = kl(relations(teacher, heads, 4), relations(student, heads, 4)).mean(0)
    torch.testing.assert_close(found[0, :4].double(), expected, rtol=1e-4, atol=1e-5)
    assert relation_divergence(teacher, teacher, heads, mask).abs().max() < 1e-6
    assert found.isfinite().all()
    other = student.clone()
    other[:, :, 4] = 50.0  # what stands on padding does not matter
    changed = relation_divergence(other, teacher, heads, mask)
    torch.testing.assert_close(changed[:, :4], found[:, :4])
    assert not relation_divergence(other, teacher, heads).allclose(found)


def test_relations_have_finite_gradients_beside_padding() -> None:
    student = random(1, 2, 5, 8).requires_grad_()
    mask = torch.tensor([[1, 1, 0, 0, 0]])
    relation_divergence(student, random(1, 2, 5, 8, seed=1), 2, mask)[mask.bool()].sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert not student.grad[:, :, 2:].any()


# --- the tasks' own -----------------------------------------------------------------------------


def test_hard_loss_of_classes() -> None:
    logits, labels = random(4, 3), torch.tensor([0, 2, 1, 1])
    found = hard_loss("class", {"logits": logits}, {"labels": labels})
    torch.testing.assert_close(found, F.cross_entropy(logits, labels))
    assert hard_loss("class", {"logits": logits}, {}) is None
    assert hard_loss("class", {"features": logits}, {"labels": labels}) is None


def test_hard_loss_of_tokens_leaves_out_those_without_a_label() -> None:
    logits, labels = random(2, 3, 6), torch.tensor([[-100, 1, 2], [5, -100, -100]])
    found = hard_loss("masked-token", {"logits": logits}, {"labels": labels})
    torch.testing.assert_close(found, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    # a class per text is no label for each of its tokens
    assert hard_loss("masked-token", {"logits": logits}, {"labels": torch.tensor([0, 1])}) is None


@pytest.mark.parametrize("left", [False, True])
def test_hard_loss_of_next_tokens_leaves_out_padding(left: bool) -> None:
    short, seen = ([0, 2, 5], [0, 1, 1]) if left else ([2, 5, 0], [1, 1, 0])
    ids, mask = torch.tensor([[3, 1, 4], short]), torch.tensor([[1, 1, 1], seen])
    logits = random(2, 3, 6)
    batch = {"input_ids": ids, "attention_mask": mask}
    found = hard_loss("next-token", {"logits": logits}, batch)
    pairs = [(logits[0, 0], 1), (logits[0, 1], 4), (logits[1, int(left)], 5)]
    expected = -torch.stack([F.log_softmax(row, -1)[target] for row, target in pairs]).mean()
    torch.testing.assert_close(found, expected)
    targets = hard_targets("next-token", {"logits": logits}, batch)
    assert targets is not None
    assert len(targets[1]) == mask.sum() - 2  # training.units' "next"


def test_next_tokens_of_a_continuation_only() -> None:
    batch = {
        "input_ids": torch.tensor([[3, 1, 4, 2]]),
        "labels": torch.tensor([[-100, -100, 4, 2]]),
    }
    logits = random(1, 4, 6)
    found = hard_targets("next-token", {"logits": logits}, batch)
    assert found is not None
    assert found[1].tolist() == [4, 2]
    assert found[0].equal(logits[0, 1:3])
    classes = hard_targets("next-token", {"logits": logits}, batch | {"labels": torch.tensor([1])})
    assert classes is not None
    assert classes[1].tolist() == [1, 4, 2]
