"""Attention in bfloat16 on the CPU, from products and a softmax, for training.

The backward pass of PyTorch's fused attention does not use the processor's bfloat16 instructions:
with torch 2.13 on one thread of an AMD EPYC it takes 20 ms for 32 texts of 28 tokens and 12 heads,
2 ms from its parts (docs/results/training.md).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_MOST_SCORES = 1 << 24  # that are kept for the backward pass, 6 bytes each; beyond, fused attention


class CpuAttention(TorchFunctionMode):
    """While it is entered, attention in bfloat16 on the CPU is computed from its parts.

    The results are those of the fused function to bfloat16's rounding.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if func is F.scaled_dot_product_attention and _is_faster(*args, **given):
            return attention(*args, **given)
        return func(*args, **given)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return softmax(q kᵀ · scale + mask) v, (…, H, T, D_v): what the fused function returns.

    The arguments are those of `torch.nn.functional.scaled_dot_product_attention`. A row that sees
    nothing, as padding may, sees all alike.
    """
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(groups, dim=-3) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * scale) @ key.transpose(-2, -1)  # (…, H, T, S)
    lowest = torch.finfo(scores.dtype).min  # not −inf: a row of those has no softmax
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, lowest)
    elif attn_mask is not None:
        scores = (scores + attn_mask).clamp(min=lowest)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    return F.dropout(weights, dropout_p) @ value


def _is_faster(query: Tensor, key: Tensor, *_others: Any, **_settings: Any) -> bool:
    scores = query.numel() // query.shape[-1] * key.shape[-2]
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and scores <= _MOST_SCORES
