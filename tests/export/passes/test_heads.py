import numpy as np
import onnx_ir as ir
import pytest

from export.passes.flat_attention import flat_attention_
from export.passes.grouped_heads import grouped_heads_
from export.passes.split_heads import split_heads_
from tests.export.graphs import operators
from tests.export.passes.toys import assert_same, outputs, scopes, toy

COS, SIN = (", ".join(str(x) for x in f(np.arange(30))) for f in (np.cos, np.sin))
CONSTANTS = (
    "int64[4] heads = {0, 0, 4, 8}, int64[4] fewer = {0, 0, 2, 8}, int64[3] whole = {0, 0, 32},"
    " int64[1] two = {2}, int64[1] three = {3}, int64[1] four = {4}, int64[1] one = {1},"
    " int64[1] eight = {8}, int64[1] zero = {0}, int64[1] end = {9223372036854775807},"
    f" float[3,5,2] cos = {{{COS}}}, float[3,5,2] sin = {{{SIN}}}"
)
SWAP = "Transpose <perm = [0, 2, 1, 3]>"
MERGE = f"m = {SWAP} (a) y0 = Reshape(m, whole) y = Identity(y0)"


def attention(model: ir.Model) -> ir.Node:
    (node,) = (node for node in model.graph if node.op_type == "Attention")
    return node


def split(name: str, target: str = "heads") -> str:
    return f"{name}4 = Reshape({name}, {target}) {name}h = {SWAP} ({name}4)"


def test_heads_are_split_inside() -> None:
    model = toy(
        "(float[B,S,32] q, float[B,S,32] k, float[B,S,32] v) => (float[B,S,32] y)",
        CONSTANTS,
        f"{split('q')} {split('k')} {split('v')} a = Attention(qh, kh, vh) {MERGE}",
    )
    before = outputs(model)
    assert flat_attention_(model) == 1
    assert flat_attention_(model) == 0
    assert operators(model) == {"Attention": 1, "Identity": 1}
    assert_same(outputs(model), before)
    assert scopes(model) == {"a.module"}


@pytest.mark.parametrize("start", ["two", "four"])
def test_partial_rotation(start: str) -> None:
    """Four of eight are turned; where two are left out between, the operator cannot say it."""
    turn = (
        "f = Slice(qh, zero, four, three) r = RotaryEmbedding <num_heads = 4> (f, cos, sin)"
        f" n = Slice(qh, {start}, end, three) t = Concat <axis = -1> (r, n)"
    )
    model = toy(
        "(float[3,5,32] q, float[3,5,32] k, float[3,5,32] v) => (float[3,5,32] y)",
        CONSTANTS,
        f"{split('q')} {split('k')} {split('v')} {turn} w = Slice(t, zero, eight, three)"
        f" a = Attention({'t' if start == 'four' else 'w'}, kh, vh) {MERGE}",
    )
    before = outputs(model)
    assert flat_attention_(model) == (start == "four")
    assert_same(outputs(model), before)
    if start == "four":
        assert operators(model) == {"RotaryEmbedding": 1, "Attention": 1, "Identity": 1}


def test_grouped_queries_share_keys_and_values() -> None:
    def repeat(name: str) -> str:
        return (
            f"{name}5 = Unsqueeze({name}h, two) {name}e = Expand({name}5, five)"
            f" {name}r = Reshape({name}e, joined)"
        )

    model = toy(
        "(float[B,S,32] q, float[B,S,16] k, float[B,S,16] v) => (float[B,S,32] y)",
        CONSTANTS + ", int64[5] five = {1, 1, 2, 1, 1}, int64[4] joined = {0, 4, -1, 8}",
        f"{split('q')} {split('k', 'fewer')} {split('v', 'fewer')} {repeat('k')} {repeat('v')}"
        f" a = Attention(qh, kr, vr) {MERGE}",
    )
    before = outputs(model)
    assert grouped_heads_(model) == 1
    assert grouped_heads_(model) == 0
    assert operators(model)["Expand"] == 0
    assert_same(outputs(model), before)
    assert flat_attention_(model) == 1
    assert attention(model).attributes.get_int("q_num_heads", 0) == 4
    assert attention(model).attributes.get_int("kv_num_heads", 0) == 2
    assert_same(outputs(model), before)


def test_heads_that_are_repeated_one_after_another_stay() -> None:
    body = "k5 = Unsqueeze(kh, one) ke = Expand(k5, five) kr = Reshape(ke, joined)"
    model = toy(
        "(float[B,S,32] q, float[B,S,16] k) => (float[B,S,32] y)",
        CONSTANTS + ", int64[5] five = {1, 2, 1, 1, 1}, int64[4] joined = {0, 4, -1, 8}",
        f"{split('q')} {split('k', 'fewer')} {body} a = Attention(qh, kr, kr) {MERGE}",
    )
    assert grouped_heads_(model) == 0


def test_split_comes_before_the_heads_change_places() -> None:
    model = toy(
        "(float[B,S,4,24] x) => (float[B,4,S,8] q, float[B,4,S,8] k, float[B,4,S,8] v)",
        CONSTANTS,
        f"t = {SWAP} (x) q, k, v = Split <axis = 3, num_outputs = 3> (t)",
    )
    before = outputs(model)
    assert split_heads_(model) == 1
    assert split_heads_(model) == 0
    assert operators(model) == {"Split": 1, "Transpose": 3}
    assert_same(outputs(model), before)
    assert scopes(model) == {"a.module"}


def test_split_of_the_heads_themselves_stays() -> None:
    model = toy(
        "(float[B,S,4,8] x) => (float[B,2,S,8] q, float[B,2,S,8] k)",
        CONSTANTS,
        f"t = {SWAP} (x) q, k = Split <axis = 1, num_outputs = 2> (t)",
    )
    assert split_heads_(model) == 0
