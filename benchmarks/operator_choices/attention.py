"""Ways to write attention, over a text or one token over a cache."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.operator_choices.choice import TEXTS, Alternative, Choice, both
from benchmarks.operator_choices.graph import (
    Build,
    Fed,
    Graph,
    Operand,
    ints,
    join,
    normal,
    scalar,
    split,
)


def _attention_data(
    random: Any, batch: int, sequence: int, heads: int, width: int, shared: int = 0
) -> SimpleNamespace:
    """Queries, keys and values, and the right padding of all rows but the first as masks.

    ONNX Runtime's `Attention` takes no mask that broadcasts over the queries; ONNX's does.
    """
    shared = shared or heads
    lengths = np.maximum(1, sequence - np.arange(batch) * max(1, sequence // 16))
    real = np.arange(sequence) < lengths[:, None]  # (batch, sequence)
    square = np.broadcast_to(real[:, None, None], (batch, 1, sequence, sequence)).copy()
    additive = np.where(square, 0, -1e9).astype(np.float32)
    return SimpleNamespace(
        heads=heads,
        width=width,
        shared=shared,
        q=Fed("BSE", normal(random, batch, sequence, heads * width)),
        k=Fed("BSK", normal(random, batch, sequence, shared * width)),
        v=Fed("BSK", normal(random, batch, sequence, shared * width)),
        keys=Fed("BS", real.astype(np.int32)),
        mask=Fed("B1ST", square),
        bias=Fed("B1ST", additive),
        row_bias=Fed("B11T", additive[:, :, :1]),
        last=Fed("B", np.full(batch, sequence - 1, np.int32)),
        total=Fed("", np.array(sequence, np.int32)),
    )


def _attention(mask: str | None) -> Build:
    def build(g: Graph, d: Any) -> Operand:
        masks = [getattr(d, mask)] if mask else []
        heads = {"q_num_heads": d.heads, "kv_num_heads": d.shared}
        return g.op("Attention", d.q, d.k, d.v, *masks, **heads)

    return build


def _multi_head(keys: str | None = None, bias: str | None = None) -> Build:
    def build(g: Graph, d: Any) -> Operand:
        masks = [getattr(d, name) if name else None for name in (keys, bias)]
        kind = "com.microsoft.MultiHeadAttention"
        return g.op(kind, d.q, d.k, d.v, None, *masks, num_heads=d.heads)

    return build


def _group_query(bias: str | None) -> Build:
    def build(g: Graph, d: Any) -> Operand:
        masks = [None, None, None, getattr(d, bias)] if bias else []
        made = g.op(
            "com.microsoft.GroupQueryAttention",
            *(d.q, d.k, d.v, None, None, d.last, d.total, *masks),
            outputs=3,
            num_heads=d.heads,
            kv_num_heads=d.shared,
            causal=0,
        )
        return str(made[0])

    return build


def _attention_written_out(bias: str | None) -> Build:
    def build(g: Graph, d: Any) -> Operand:
        query = g.op("Mul", split(g, d.q, d.heads, d.width), scalar(d.width**-0.5))
        key = g.op("Transpose", split(g, d.k, d.heads, d.width), perm=[0, 1, 3, 2])
        scores = g.op("MatMul", query, key)
        if bias:
            scores = g.op("Add", scores, getattr(d, bias))
        weights = g.op("Softmax", scores, axis=-1)
        return join(g, g.op("MatMul", weights, split(g, d.v, d.heads, d.width)))

    return build


def _attention_repeating(g: Graph, d: Any) -> Operand:
    """Keys and values repeated for each query head of their group."""
    times = d.heads // d.shared

    def repeated(value: Operand) -> Operand:
        apart = g.op("Unsqueeze", split(g, value, d.shared, d.width), ints(2))
        many = g.op("Expand", apart, ints(1, 1, times, 1, 1))
        return str(g.op("Reshape", many, ints(0, d.heads, -1, d.width)))

    query = split(g, d.q, d.heads, d.width)
    return join(g, g.op("Attention", query, repeated(d.k), repeated(d.v), d.mask))


# --- one more token over a cache -----------------------------------------------------------------


def _cache_data(
    random: Any, batch: int, past: int, heads: int, width: int, capacity: int
) -> SimpleNamespace:
    d = _attention_data(random, batch, 1, heads, width)
    total = past + 1
    buffers = [np.zeros((batch, heads, capacity, width), np.float32) for _ in range(2)]
    for buffer in buffers:
        buffer[:, :, :past] = normal(random, batch, heads, past, width)
    d.past = [Fed("BHPD", buffer[:, :, :past].copy()) for buffer in buffers]
    d.buffers = [Fed("BHPD", buffer) for buffer in buffers]
    d.mask = Fed("B1ST", np.ones((batch, 1, 1, total), bool))
    d.bias = Fed("B1ST", np.zeros((batch, 1, 1, total), np.float32))
    d.last = Fed("B", np.full(batch, past, np.int32))
    d.total = Fed("", np.array(total, np.int32))
    return d


def _cached_attention(g: Graph, d: Any) -> Operand:
    heads = {"q_num_heads": d.heads, "kv_num_heads": d.heads}
    made = g.op("Attention", d.q, d.k, d.v, d.mask, *d.past, outputs=3, **heads)
    g.keep(*made[1:])
    return str(made[0])


def _cached_concat(g: Graph, d: Any) -> Operand:
    new = [split(g, value, d.heads, d.width) for value in (d.k, d.v)]
    present = [g.op("Concat", past, value, axis=2) for past, value in zip(d.past, new)]
    g.keep(*present)
    return join(g, g.op("Attention", split(g, d.q, d.heads, d.width), *present, d.mask))


def _cached_multi_head(g: Graph, d: Any) -> Operand:
    kind = "com.microsoft.MultiHeadAttention"
    inputs = (d.q, d.k, d.v, None, None, d.bias, *d.past)
    made = g.op(kind, *inputs, outputs=3, num_heads=d.heads)
    g.keep(*made[1:])
    return str(made[0])


def _cached_group_query(share: bool, bias: bool = True) -> Build:
    def build(g: Graph, d: Any) -> Operand:
        past = d.buffers if share else d.past
        masks = [None, None, None, d.bias] if bias else []
        made = g.op(
            "com.microsoft.GroupQueryAttention",
            *(d.q, d.k, d.v, *past, d.last, d.total, *masks),
            outputs=3,
            num_heads=d.heads,
            kv_num_heads=d.heads,
        )
        g.keep(*made[1:])
        if share:
            for buffer, present in zip(past, made[1:]):
                g.share(buffer, present)
        return str(made[0])

    return build


# --- the choices ---------------------------------------------------------------------------------

_HEADS = {"heads": 12, "width": 32}

CHOICES = (
    Choice(
        "attention, no padding",
        _attention_data,
        "batch × length",
        (*TEXTS, (8, 512)),
        (2, 5),
        {
            "Attention": Alternative(_attention(None)),
            "MultiHeadAttention": Alternative(_multi_head()),
            "GroupQueryAttention": Alternative(_group_query(None)),
            "written out": Alternative(_attention_written_out(None)),
        },
        both("Attention"),
        copies=2,
        widths=_HEADS,
    ),
    Choice(
        "attention, padded",
        _attention_data,
        "batch × length",
        (*TEXTS, (8, 512)),
        (3, 5),
        {
            "Attention, mask": Alternative(_attention("mask")),
            "Attention, bias": Alternative(_attention("bias")),
            "MultiHeadAttention, key padding": Alternative(_multi_head(keys="keys")),
            "MultiHeadAttention, bias": Alternative(_multi_head(bias="bias")),
            "GroupQueryAttention, bias": Alternative(_group_query("bias")),
            "written out, bias of one row": Alternative(_attention_written_out("row_bias")),
        },
        both("Attention, mask"),
        copies=2,
        widths=_HEADS,
    ),
    Choice(
        "attention, heads in groups",
        _attention_data,
        "batch × length",
        TEXTS,
        (3, 5),
        {
            "Attention": Alternative(_attention("mask")),
            "Attention on repeated keys and values": Alternative(_attention_repeating),
            "GroupQueryAttention, bias": Alternative(_group_query("bias")),
        },
        both("Attention"),
        widths={"heads": 12, "width": 64, "shared": 4},
    ),
    Choice(
        "one token over a cache",
        _cache_data,
        "batch × past",
        ((1, 32), (1, 160), (1, 512)),
        (2, 7),
        {
            "Concat, Attention": Alternative(_cached_concat),
            "Attention with past": Alternative(_cached_attention),
            "MultiHeadAttention with past": Alternative(_cached_multi_head),
            "GroupQueryAttention, copying": Alternative(_cached_group_query(False)),
            "GroupQueryAttention in place": Alternative(_cached_group_query(True)),
            "GroupQueryAttention in place, no bias": Alternative(_cached_group_query(True, False)),
        },
        both("GroupQueryAttention in place"),
        widths={"heads": 12, "width": 64, "capacity": 1024},
    ),
)
