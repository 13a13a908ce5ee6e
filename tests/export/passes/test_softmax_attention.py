import numpy as np
import pytest

from export.passes.finite_masks import finite_masks_
from export.passes.softmax_attention import softmax_attention_
from tests.export.graphs import operators
from tests.export.passes.toys import assert_same, outputs, scopes, toy

HEADS = "float[B,4,S,8] q, float[B,4,T,8] k, float[B,4,T,6] v"
OUTPUT = "=> (float[B,4,S,6] y)"
TURN = "kt = Transpose <perm = [0, 1, 3, 2]> (k)"
NUMBERS = "float half = {0.5}, float two = {2.0}, float least = {-3.0e38}, float zero = {0.0}"

# inputs beside q, k and v, and what makes y of them
CASES = {
    "plain": ("", f"{TURN} x = MatMul(q, kt) p = Softmax(x) y = MatMul(p, v)"),
    "scaled": ("", f"{TURN} x = MatMul(q, kt) z = Div(x, two) p = Softmax(z) y = MatMul(p, v)"),
    "query and key scaled": (
        "",
        f"{TURN} a = Mul(half, q) b = Div(kt, two) x = MatMul(a, b) p = Softmax(x) y = MatMul(p, v)",
    ),
    "biases": (
        ", float[1,4,S,T] a, float[B,1,S,T] b",
        f"{TURN} x = MatMul(q, kt) z = Mul(x, half) w = Add(a, z) m = Add(w, b) p = Softmax(m)"
        " y = MatMul(p, v)",
    ),
    "bias per head": (
        ", float[4,S,T] a",
        f"{TURN} x = MatMul(q, kt) z = Add(x, a) p = Softmax(z) y = MatMul(p, v)",
    ),
    "bias per row of keys": (
        ", float[B,1,1,T] a",
        f"{TURN} x = MatMul(q, kt) z = Add(x, a) p = Softmax(z) y = MatMul(p, v)",
    ),
    "mask": (
        ", bool[B,1,S,T] a",
        f"{TURN} x = MatMul(q, kt) z = Where(a, x, least) p = Softmax(z) y = MatMul(p, v)",
    ),
    "mask the other way round, and a bias": (
        ", bool[B,1,1,T] a, float[S,T] b",
        f"{TURN} x = MatMul(q, kt) w = Add(x, b) z = Where(a, least, w) p = Softmax <axis = 3> (z)"
        " y = MatMul(p, v)",
    ),
    "guard": (
        "",
        f"{TURN} x = MatMul(q, kt) p = Softmax(x) n = IsNaN(p) g = Where(n, zero, p)"
        " y = MatMul(g, v)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_spelled_out_attention_becomes_one_node(case: str) -> None:
    inputs, body = CASES[case]
    model = toy(f"({HEADS}{inputs}) {OUTPUT}", NUMBERS, body)
    before = outputs(model)
    assert softmax_attention_(model) == 1
    assert softmax_attention_(model) == 0
    assert operators(model)["Attention"] == 1
    assert_same(outputs(model), before)
    assert scopes(model) == {"a.module"}


def test_keys_with_their_heads_behind() -> None:
    model = toy(
        "(float[B,4,S,8] q, float[B,T,4,8] k, float[B,4,T,6] v) => (float[B,4,S,6] y)",
        NUMBERS,
        "kt = Transpose <perm = [0, 2, 3, 1]> (k) x = MatMul(q, kt) p = Softmax(x)"
        " y = MatMul(p, v)",
    )
    before = outputs(model)
    assert softmax_attention_(model) == 1
    assert_same(outputs(model), before)


@pytest.mark.parametrize("bias", ["float[B,S,T]", "float[S,T]", "float[1,S,T]"])
def test_one_head_in_three_axes(bias: str) -> None:
    model = toy(
        f"(float[B,S,8] q, float[B,T,8] k, float[B,T,6] v, {bias} a) => (float[B,S,6] y)",
        NUMBERS,
        "kt = Transpose <perm = [0, 2, 1]> (k) x = MatMul(q, kt) z = Add(x, a) p = Softmax(z)"
        " y = MatMul(p, v)",
    )
    before = outputs(model)
    assert softmax_attention_(model) == 1
    assert_same(outputs(model), before)


OTHERS = {
    "another axis": f"{TURN} x = MatMul(q, kt) p = Softmax <axis = 2> (x) y = MatMul(p, v)",
    "bias that is scaled": f"{TURN} x = MatMul(q, kt) z = Add(x, a) w = Mul(z, half)"
    " p = Softmax(w) y = MatMul(p, v)",
    "no mask": f"{TURN} x = MatMul(q, kt) c = Cast <to = 9> (a) z = Where(c, x, two)"
    " p = Softmax(z) y = MatMul(p, v)",
    "no scores": "p = Softmax(a) y = MatMul(p, v)",
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_something_else_is_left_alone(case: str) -> None:
    model = toy(f"({HEADS}, float[B,4,S,T] a) {OUTPUT}", NUMBERS, OTHERS[case])
    assert softmax_attention_(model) == 0


def test_scores_that_are_an_output_are_left_alone() -> None:
    model = toy(
        f"({HEADS}) => (float[B,4,S,6] y, float[B,4,S,T] x)",
        NUMBERS,
        f"{TURN} x = MatMul(q, kt) p = Softmax(x) y = MatMul(p, v)",
    )
    assert softmax_attention_(model) == 0


def test_opsets_without_the_operator_are_left_alone() -> None:
    model = toy(f"({HEADS}) {OUTPUT}", NUMBERS, CASES["plain"][1], opset=22)
    assert softmax_attention_(model) == 0


def test_rows_that_are_masked_whole_average() -> None:
    lowest = float(np.finfo(np.float32).min)
    model = toy(
        f"({HEADS}) {OUTPUT}",
        f"float least = {{{lowest!r}}}, bool[1,1,1,1] yes = {{1}}",
        f"{TURN} x = MatMul(q, kt) z = Where(yes, least, x) p = Softmax(z) y = MatMul(p, v)",
    )
    before = outputs(model)
    softmax_attention_(model)
    assert abs(outputs(model)["y"] - before["y"]).max() > 0.1  # so `finite_masks_` is needed
    assert finite_masks_(model) == 1
    assert finite_masks_(model) == 0
    assert_same(outputs(model), before)
