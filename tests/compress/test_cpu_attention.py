"""Attention from its parts: what the fused function gives, forward and backward."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from compress import cpu_attention
from compress.cpu_attention import CpuAttention, attention

_SETTINGS: list[dict[str, Any]] = [
    {},
    {"is_causal": True},
    {"scale": 0.3},
    {"attn_mask": torch.arange(9).repeat(2, 1, 1, 1) < torch.tensor([5, 9]).reshape(2, 1, 1, 1)},
    {"attn_mask": torch.linspace(-2, 2, 81).reshape(1, 1, 9, 9)},
]


@pytest.mark.parametrize("settings", _SETTINGS)
@pytest.mark.parametrize("groups", [1, 2])
def test_attention_is_the_fused_one(settings: dict[str, Any], groups: int) -> None:
    torch.manual_seed(0)
    shapes = [(2, 4, 9, 6), (2, 4 // groups, 9, 6), (2, 4 // groups, 9, 5)]
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    upstream = torch.randn(2, 4, 9, 5)
    found = []
    for function in (attention, F.scaled_dot_product_attention):
        output = function(*tensors, **settings, enable_gqa=groups > 1)
        found.append([output, *torch.autograd.grad(output, tensors, upstream)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_row_that_sees_nothing_is_finite() -> None:
    query = torch.randn(1, 1, 3, 4, requires_grad=True)
    output = attention(query, query, query, torch.zeros(3, 3, dtype=torch.bool))
    output.sum().backward()
    assert query.grad is not None
    assert output.isfinite().all()
    assert query.grad.isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "most", "replaced"),
    [(torch.bfloat16, 1 << 24, True), (torch.float32, 1 << 24, False), (torch.bfloat16, 8, False)],
)
def test_only_bfloat16_of_moderate_size_is_replaced(
    dtype: torch.dtype, most: int, replaced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(cpu_attention, "_MOST_SCORES", most)
    monkeypatch.setattr(
        cpu_attention, "attention", lambda *a, **k: calls.append(a) or attention(*a, **k)
    )
    x = torch.randn(1, 2, 5, 4).to(dtype)
    expected = F.scaled_dot_product_attention(x, x, x)
    with CpuAttention():
        found = F.scaled_dot_product_attention(x, x, x)
    assert bool(calls) == replaced
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
