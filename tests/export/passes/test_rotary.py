import pytest

from export.passes.rotary import rotary_
from tests.export.graphs import operators
from tests.export.passes.toys import assert_same, outputs, scopes, toy

NUMBERS = (
    "int64[1] one = {1}, int64[1] zero = {0}, int64[1] four = {4}, int64[1] eight = {8},"
    " int64[1] last = {3}"
)
SIGNATURE = "(float[B,2,S,8] q, float[B,S,4] f, float[B,S,4] g) => (float[B,2,S,8] y)"
BODY = (
    "x = Tanh(q) b = Concat<axis = -1>(f, f) c = Cos(b) s = Sin(b) C = Unsqueeze(c, one)"
    " S1 = Unsqueeze(s, one) u = Slice(x, zero, four, last) v = Slice(x, four, eight, last)"
    " n = Neg(v) r = Concat<axis = -1>(n, u) left = Mul(x, C) right = Mul(r, S1)"
    " y = Add(left, right)"
)


@pytest.mark.parametrize("mirrored", [False, True])
def test_rotation_becomes_one_node(mirrored: bool) -> None:
    body = BODY
    if mirrored:  # sums and products have no first operand
        body = body.replace("Mul(x, C)", "Mul(C, x)").replace(
            "Add(left, right)", "Add(right, left)"
        )
    model = toy(SIGNATURE, NUMBERS, body)
    before = outputs(model)
    assert rotary_(model) == 1
    assert operators(model) == {"Tanh": 1, "Cos": 1, "Sin": 1, "RotaryEmbedding": 1}
    assert_same(outputs(model), before)
    assert scopes(model) == {"a.module"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Neg(v)", "Neg(u)"),  # another half
        ("Concat<axis = -1>(n, u)", "Concat<axis = -1>(u, n)"),
        ("Concat<axis = -1>(f, f)", "Concat<axis = -1>(f, g)"),  # angles that differ
        ("s = Sin(b)", "s = Cos(b)"),
    ],
)
def test_what_is_no_rotation_is_left_alone(old: str, new: str) -> None:
    model = toy(SIGNATURE, NUMBERS, BODY.replace(old, new))
    assert rotary_(model) == 0


def test_opsets_without_the_operator_are_left_alone() -> None:
    assert rotary_(toy(SIGNATURE, NUMBERS, BODY, opset=22)) == 0
