"""Ways to write a residual and the normalisation after it."""

from types import SimpleNamespace
from typing import Any

from benchmarks.operator_choices.choice import TEXTS, Alternative, Choice, both
from benchmarks.operator_choices.graph import Build, Fed, Graph, Operand, ints, normal, scalar


def _residual_data(random: Any, batch: int, sequence: int, hidden: int) -> SimpleNamespace:
    return SimpleNamespace(
        scale=normal(random, hidden),
        bias=normal(random, hidden),
        x=Fed("BSE", normal(random, batch, sequence, hidden)),
        y=Fed("BSE", normal(random, batch, sequence, hidden)),
    )


def layer_norm(add: str) -> Build:
    """Return what adds the residual by `add`, then normalises."""
    return lambda g, d: g.op("LayerNormalization", g.op(add, d.x, d.y), d.scale, d.bias)


def layer_norm_apart(g: Graph, d: Any) -> Operand:
    """Add the same with reshapes between, which keep ONNX Runtime from fusing the two."""
    width = len(d.scale)
    total = g.op("Reshape", g.op("Add", d.x, d.y), ints(0, 0, 1, width))
    return g.op("Reshape", g.op("LayerNormalization", total, d.scale, d.bias), ints(0, 0, width))


def _layer_norm_keeping(add: str) -> Build:
    def build(g: Graph, d: Any) -> tuple[Operand, ...]:
        total = g.op(add, d.x, d.y)
        return g.op("LayerNormalization", total, d.scale, d.bias), total

    return build


def _skip_norm(g: Graph, d: Any) -> Operand:
    return g.op("com.microsoft.SkipLayerNormalization", d.x, d.y, d.scale, d.bias, epsilon=1e-5)


def _skip_norm_keeping(g: Graph, d: Any) -> tuple[Operand, ...]:
    kind = "com.microsoft.SkipLayerNormalization"
    made = g.op(kind, d.x, d.y, d.scale, d.bias, outputs=4, epsilon=1e-5)
    g.nodes[-1].output[1] = g.nodes[-1].output[2] = ""
    return made[0], made[3]


def _rms_norm(add: str, kind: str = "RMSNormalization") -> Build:
    def build(g: Graph, d: Any) -> tuple[Operand, ...]:
        total = g.op(add, d.x, d.y)
        return g.op(kind, total, d.scale, axis=-1, epsilon=1e-5), total

    return build


def _rms_norm_written_out(g: Graph, d: Any) -> tuple[Operand, ...]:
    total = g.op("Add", d.x, d.y)
    square = g.op("Pow", total, scalar(2))
    mean = g.op("ReduceMean", square, ints(-1), keepdims=1)
    root = g.op("Sqrt", g.op("Add", mean, scalar(1e-5)))
    return g.op("Mul", d.scale, g.op("Div", total, root)), total


def _rms_norm_skip(g: Graph, d: Any) -> tuple[Operand, ...]:
    kind = "com.microsoft.SkipSimplifiedLayerNormalization"
    made = g.op(kind, d.x, d.y, d.scale, outputs=4, epsilon=1e-5)
    g.nodes[-1].output[1] = g.nodes[-1].output[2] = ""
    return made[0], made[3]


# --- the choices ---------------------------------------------------------------------------------

_HIDDEN = {"hidden": 384}

CHOICES = (
    Choice(
        "residual before LayerNormalization",
        _residual_data,
        "batch × length",
        TEXTS,
        (2, 5),
        {
            "Add, LayerNormalization": Alternative(layer_norm("Add")),
            "Sum, LayerNormalization": Alternative(layer_norm("Sum")),
            "Add, LayerNormalization between reshapes": Alternative(layer_norm_apart),
            "SkipLayerNormalization": Alternative(_skip_norm),
        },
        {
            "cpu": "Add, LayerNormalization between reshapes",
            "cuda": "Add, LayerNormalization",
        },
        widths=_HIDDEN,
    ),
    Choice(
        "residual that goes on, LayerNormalization",
        _residual_data,
        "batch × length",
        ((1, 1), *TEXTS),
        (2, 5),
        {
            "Add, LayerNormalization": Alternative(_layer_norm_keeping("Add")),
            "Sum, LayerNormalization": Alternative(_layer_norm_keeping("Sum")),
            "SkipLayerNormalization": Alternative(_skip_norm_keeping),
        },
        both("Add, LayerNormalization"),
        widths={"hidden": 768},
    ),
    Choice(
        "residual that goes on, RMSNormalization",
        _residual_data,
        "batch × length",
        ((1, 1), *TEXTS),
        (2, 5),
        {
            "Add, RMSNormalization": Alternative(_rms_norm("Add")),
            "Sum, RMSNormalization": Alternative(_rms_norm("Sum")),
            "Add, SimplifiedLayerNormalization": Alternative(
                _rms_norm("Add", "SimplifiedLayerNormalization")
            ),
            "Sum, SimplifiedLayerNormalization": Alternative(
                _rms_norm("Sum", "SimplifiedLayerNormalization")
            ),
            "SkipSimplifiedLayerNormalization": Alternative(_rms_norm_skip),
            "written out": Alternative(_rms_norm_written_out),
        },
        both("Add, RMSNormalization"),
        widths={"hidden": 768},
    ),
)
