"""Gradients of embedding tables that stay: the same numbers, and none where none belongs."""

import pytest
import torch
from torch import Tensor, nn

from compress.embedding_gradients import EmbeddingGradients


class _Texts(nn.Module):
    """A table that is read twice, one that may be left out, and a head that may be the first table."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(50, 8, padding_idx=0)
        self.others = nn.Embedding(7, 8)
        self.head = nn.Linear(8, 50, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor, others: bool = False) -> Tensor:
        states = self.words(ids) + self.words(ids.flip(1)).sin()
        if others:
            states = states + self.others(ids % 7)
        return self.head(states).logsumexp(-1).sum()


def _gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {
        name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_those_of_a_plain_backward_pass(tied: bool) -> None:
    model = _Texts(tied)
    tables = EmbeddingGradients(model)
    for step in range(4):
        parts = [torch.randint(0, 50, (3, 11)) for _ in range(2)]
        reached = step in (1, 3)  # not at first, then, not again, then again
        model.zero_grad()
        for ids in parts:
            model(ids, reached).backward()
        expected = _gradients(model)
        model.zero_grad()
        with tables.kept():
            for ids in parts:
                model(ids, reached).backward()
        found = _gradients(model)
        assert (found["others.weight"] is not None) == reached
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)
        assert not model.words.sparse


def test_gradient_stays_where_it_is_and_a_new_run_gives_the_same_bits() -> None:
    model, ids = _Texts(False), torch.randint(0, 50, (3, 11))
    tables = EmbeddingGradients(model)
    places, bits = [], []
    for run in (tables, tables, EmbeddingGradients(model)):
        model.zero_grad()
        with run.kept():
            model(ids).backward()
            model(ids.flip(0)).backward()
        gradient = model.words.weight.grad
        assert gradient is not None
        assert not gradient.is_sparse
        places.append(gradient.data_ptr())
        bits.append(gradient.clone())
    assert places[0] == places[1]
    assert all(each.equal(bits[0]) for each in bits)


def test_a_frozen_table_has_no_gradient() -> None:
    model = _Texts(False)
    model.words.weight.requires_grad_(False)
    with EmbeddingGradients(model).kept():
        model(torch.randint(0, 50, (3, 11)), True).backward()
    assert model.words.weight.grad is None
    assert model.others.weight.grad is not None
