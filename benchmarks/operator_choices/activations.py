"""Ways to write activations with the bias before them."""

import math
from types import SimpleNamespace
from typing import Any

from benchmarks.operator_choices.choice import TEXTS, Alternative, Choice, both
from benchmarks.operator_choices.graph import Build, Fed, Graph, Operand, normal, scalar


def _activation_data(random: Any, batch: int, sequence: int, hidden: int) -> SimpleNamespace:
    bias = normal(random, hidden)
    return SimpleNamespace(bias=bias, x=Fed("BSE", normal(random, batch, sequence, hidden)))


def _gelu(add: str, form: str = "none") -> Build:
    return lambda g, d: g.op("Gelu", g.op(add, d.x, d.bias), approximate=form)


def _gelu_written_out(g: Graph, d: Any) -> Operand:
    x = g.op("Add", d.x, d.bias)
    curve = g.op("Erf", g.op("Div", x, scalar(math.sqrt(2))))
    return g.op("Mul", g.op("Mul", x, g.op("Add", curve, scalar(1))), scalar(0.5))


def _gelu_tanh_written_out(g: Graph, d: Any) -> Operand:
    x = g.op("Add", d.x, d.bias)
    cube = g.op("Mul", g.op("Pow", x, scalar(3)), scalar(0.044715))
    curve = g.op("Tanh", g.op("Mul", g.op("Add", x, cube), scalar(math.sqrt(2 / math.pi))))
    return g.op("Mul", g.op("Mul", x, scalar(0.5)), g.op("Add", curve, scalar(1)))


def _biased(kind: str) -> Build:
    return lambda g, d: g.op(kind, d.x, d.bias)


def _gated(alpha: float) -> Build:
    """x × sigmoid(alpha × x): SiLU where alpha is 1."""

    def build(g: Graph, d: Any) -> Operand:
        inner = d.x if alpha == 1 else g.op("Mul", d.x, scalar(alpha))
        return g.op("Mul", d.x, g.op("Sigmoid", inner))

    return build


def _quick(alpha: float) -> Build:
    return lambda g, d: g.op("com.microsoft.QuickGelu", d.x, alpha=alpha)


# --- the choices ---------------------------------------------------------------------------------

CHOICES = (
    Choice(
        "GELU with its bias, exact",
        _activation_data,
        "batch × length",
        ((1, 1), *TEXTS),
        (2, 5),
        {
            "Add, Gelu": Alternative(_gelu("Add")),
            "Sum, Gelu": Alternative(_gelu("Sum")),
            "BiasGelu": Alternative(_biased("com.microsoft.BiasGelu")),
            "written out": Alternative(_gelu_written_out),
        },
        both("Add, Gelu"),
        widths={"hidden": 1536},
    ),
    Choice(
        "GELU with its bias, by tanh",
        _activation_data,
        "batch × length",
        ((1, 1), *TEXTS),
        (2, 5),
        {
            "Add, Gelu": Alternative(_gelu("Add", "tanh")),
            "Sum, Gelu": Alternative(_gelu("Sum", "tanh")),
            "FastGelu": Alternative(_biased("com.microsoft.FastGelu")),
            "written out": Alternative(_gelu_tanh_written_out),
        },
        both("Add, Gelu"),
        widths={"hidden": 3072},
    ),
    Choice(
        "x × sigmoid(1.702 x)",
        _activation_data,
        "batch × length",
        ((1, 1), *TEXTS),
        (2, 5),
        {
            "Mul, Sigmoid, Mul": Alternative(_gated(1.702)),
            "QuickGelu": Alternative(_quick(1.702)),
        },
        both("QuickGelu"),
        widths={"hidden": 2048},
    ),
    Choice(
        "SiLU",
        _activation_data,
        "batch × length",
        ((1, 1), *TEXTS),
        (2, 5),
        {"Sigmoid, Mul": Alternative(_gated(1.0)), "QuickGelu": Alternative(_quick(1.0))},
        both("Sigmoid, Mul"),
        widths={"hidden": 2048},
    ),
)
