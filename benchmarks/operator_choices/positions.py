"""Ways to write rotary positions, and the embeddings that a model begins with."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.operator_choices.choice import TEXTS, Alternative, Choice, both
from benchmarks.operator_choices.graph import Build, Fed, Graph, Operand, ints, join, normal, split
from benchmarks.operator_choices.norms import layer_norm, layer_norm_apart


def _rotary_data(
    random: Any, batch: int, sequence: int, heads: int, width: int, longest: int
) -> SimpleNamespace:
    frequencies = 10000.0 ** (-np.arange(0, width, 2) / width)
    angles = np.arange(longest)[:, None] * frequencies
    cos, sin = (f(angles).astype(np.float32) for f in (np.cos, np.sin))  # (longest, width / 2)
    start = longest - sequence
    rows = [np.broadcast_to(t[start:], (batch, sequence, width // 2)).copy() for t in (cos, sin)]
    return SimpleNamespace(
        heads=heads,
        width=width,
        x=Fed("BSE", normal(random, batch, sequence, heads * width)),
        cos=cos,
        sin=sin,
        rows=[Fed("BSh", row) for row in rows],
        positions=Fed("BS", np.tile(np.arange(start, longest), (batch, 1))),
    )


def _rotary_rows(g: Graph, d: Any) -> Operand:
    return g.op("RotaryEmbedding", d.x, *d.rows, num_heads=d.heads)


def _rotary_tables(g: Graph, d: Any) -> Operand:
    return g.op("RotaryEmbedding", d.x, d.cos, d.sin, d.positions, num_heads=d.heads)


def _rotary_contrib(g: Graph, d: Any) -> Operand:
    kind = "com.microsoft.RotaryEmbedding"
    return g.op(kind, d.x, d.positions, d.cos, d.sin, num_heads=d.heads)


def _rotary_written_out(g: Graph, d: Any) -> Operand:
    x = split(g, d.x, d.heads, d.width)
    cos, sin = (g.op("Unsqueeze", g.op("Concat", rows, rows, axis=-1), ints(1)) for rows in d.rows)
    left, right = g.op("Split", x, outputs=2, axis=-1, num_outputs=2)
    turned = g.op("Concat", g.op("Neg", right), left, axis=-1)
    return join(g, g.op("Add", g.op("Mul", x, cos), g.op("Mul", turned, sin)))


def _embedding_data(
    random: Any, batch: int, sequence: int, vocabulary: int, longest: int, hidden: int
) -> SimpleNamespace:
    sizes = {"words": vocabulary, "positions": longest, "types": 2}
    tables = {name: normal(random, size, hidden) for name, size in sizes.items()}
    scale, bias = normal(random, hidden), normal(random, hidden)
    ids = random.integers(0, vocabulary, (batch, sequence))
    types = np.zeros((batch, sequence), np.int64)
    places = np.tile(np.arange(sequence), (batch, 1))
    return SimpleNamespace(
        **tables,
        scale=scale,
        bias=bias,
        wide=[Fed("BS", array) for array in (ids, places, types)],
        ids=[Fed("BS", array.astype(np.int32)) for array in (ids, types)],
    )


def _embedding(add: str, apart: bool = False) -> Build:
    def build(g: Graph, d: Any) -> Operand:
        tables = (d.words, d.positions, d.types)
        words, places, types = (g.op("Gather", t, ids) for t, ids in zip(tables, d.wide))
        both = SimpleNamespace(**{**vars(d), "x": g.op("Add", words, types), "y": places})
        return (layer_norm_apart if apart else layer_norm(add))(g, both)

    return build


def _embedding_fused(g: Graph, d: Any) -> Operand:
    inputs = (*d.ids, d.words, d.positions, d.types, d.scale, d.bias)
    made = g.op("com.microsoft.EmbedLayerNormalization", *inputs, outputs=2, epsilon=1e-5)
    return str(made[0])


# --- the choices ---------------------------------------------------------------------------------

CHOICES = (
    Choice(
        "rotary embedding",
        _rotary_data,
        "batch × length",
        ((1, 1), *TEXTS),
        (2, 5),
        {
            "RotaryEmbedding, a row per token": Alternative(_rotary_rows),
            "RotaryEmbedding, tables": Alternative(_rotary_tables),
            "com.microsoft RotaryEmbedding": Alternative(_rotary_contrib),
            "written out": Alternative(_rotary_written_out),
        },
        both("RotaryEmbedding, a row per token"),
        widths={"heads": 12, "width": 64, "longest": 512},
    ),
    Choice(
        "embeddings and LayerNormalization",
        _embedding_data,
        "batch × length",
        TEXTS,
        (2, 5),
        {
            "Gather, Add, LayerNormalization": Alternative(_embedding("Add")),
            "Gather, Add, Sum, LayerNormalization": Alternative(_embedding("Sum")),
            "Gather, Add, LayerNormalization between reshapes": Alternative(
                _embedding("Add", apart=True)
            ),
            "EmbedLayerNormalization": Alternative(_embedding_fused),
        },
        {
            "cpu": "Gather, Add, LayerNormalization between reshapes",
            "cuda": "Gather, Add, LayerNormalization",
        },
        copies=1,
        widths={"vocabulary": 8192, "longest": 512, "hidden": 384},
    ),
)
