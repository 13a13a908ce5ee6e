import pytest

from export.passes.gelu import gelu_, quick_gelu_
from tests.export.graphs import operators
from tests.export.passes.toys import assert_same, outputs, scopes, toy

NUMBERS = (
    "float half = {0.5}, float one = {1.0}, float three = {3.0}, float root = {1.41421354},"
    " float c = {0.044715}, float k = {0.7978845608}, float q = {1.702}, float wrong = {0.05}"
)
SIGNATURE = "(float[B,S,8] a, float[B,S,8] b) => (float[B,S,8] y)"
START = "x = Mul(a, b)"  # a product itself, as behind a gate

FORMS = {
    "as GPT-2 has it": "h = Mul(half, x) p = Pow(x, three) m = Mul(c, p) s = Add(x, m)"
    " i = Mul(k, s) t = Tanh(i) u = Add(one, t) y = Mul(h, u)",
    "of squares": "p = Mul(x, x) m = Mul(p, c) s = Add(m, one) n = Mul(x, k) i = Mul(n, s)"
    " t = Tanh(i) u = Add(t, one) v = Mul(x, u) y = Mul(v, half)",
    "of cubes": "p = Mul(x, x) r = Mul(p, x) m = Mul(r, c) s = Add(m, x) i = Mul(s, k)"
    " t = Tanh(i) u = Add(t, one) h = Mul(x, half) y = Mul(u, h)",
    "exact": "i = Div(x, root) e = Erf(i) u = Add(e, one) h = Mul(x, u) y = Mul(h, half)",
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_become_one_node(form: str) -> None:
    model = toy(SIGNATURE, NUMBERS, f"{START} {FORMS[form]}")
    before = outputs(model)
    assert gelu_(model) == 1
    assert gelu_(model) == 0
    assert operators(model) == {"Mul": 1, "Gelu": 1}
    (node,) = (node for node in model.graph if node.op_type == "Gelu")
    assert node.attributes["approximate"].value == ("none" if form == "exact" else "tanh")
    assert_same(outputs(model), before)
    assert scopes(model) == {"a.module"}


@pytest.mark.parametrize("form", FORMS)
def test_other_numbers_are_left_alone(form: str) -> None:
    changed = FORMS[form].replace("c,", "wrong,").replace(", c)", ", wrong)")
    changed = changed.replace("root", "half") if form == "exact" else changed
    assert gelu_(toy(SIGNATURE, NUMBERS, f"{START} {changed}")) == 0


def test_gate_of_something_else_is_left_alone() -> None:
    body = "i = Div(a, root) e = Erf(i) u = Add(e, one) h = Mul(b, u) y = Mul(h, half)"
    assert gelu_(toy(SIGNATURE, NUMBERS, body)) == 0


def test_opsets_without_the_operator_are_left_alone() -> None:
    assert gelu_(toy(SIGNATURE, NUMBERS, f"{START} {FORMS['exact']}", opset=19)) == 0


@pytest.mark.parametrize("body", ["m = Mul(x, q) s = Sigmoid(m) y = Mul(x, s)"])
def test_quick_gelu(body: str) -> None:
    model = toy(SIGNATURE, NUMBERS, f"{START} {body}")
    before = outputs(model)
    assert quick_gelu_(model) == 1
    assert quick_gelu_(model) == 0
    assert operators(model) == {"Mul": 1, "QuickGelu": 1}
    assert_same(outputs(model), before)
    assert scopes(model) == {"a.module"}


def test_silu_is_left_alone() -> None:
    assert quick_gelu_(toy(SIGNATURE, NUMBERS, f"{START} s = Sigmoid(x) y = Mul(x, s)")) == 0
