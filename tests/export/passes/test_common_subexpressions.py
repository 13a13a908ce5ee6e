from export.passes.common_subexpressions import common_subexpressions_
from tests.export.graphs import operators
from tests.export.passes.toys import assert_same, outputs, toy


def test_what_is_computed_twice_is_computed_once() -> None:
    model = toy(
        "(float[B,S] x) => (float[B,S] y, float[B,S] z)",
        "float one = {1}",
        "a = Cos(x) b = Cos(x) c = Mul(a, one) d = Mul(b, one) unused = Sin(x) y = Add(c, x)"
        " z = Sub(d, x)",
    )
    before = outputs(model)
    assert common_subexpressions_(model) == 2  # and what nothing uses is no expression
    assert common_subexpressions_(model) == 0
    assert operators(model) == {"Cos": 1, "Mul": 1, "Add": 1, "Sub": 1}
    assert_same(outputs(model), before)


def test_outputs_keep_their_names() -> None:
    model = toy("(float[B] x) => (float[B] y, float[B] z)", "float one = {1}", "y=Cos(x) z=Cos(x)")
    before = outputs(model)
    common_subexpressions_(model)
    assert operators(model)["Cos"] == 1
    assert_same(outputs(model), before)


def test_attributes_are_part_of_an_expression() -> None:
    model = toy(
        "(float[B,S] x) => (float[B,S] y, float[B,S] z)",
        "float one = {1}",
        "y = Softmax <axis = 0> (x) z = Softmax <axis = 1> (x)",
    )
    assert common_subexpressions_(model) == 0
