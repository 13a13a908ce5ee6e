import pytest

from export.passes.unfolded_axis import unfolded_axis_
from tests.export.graphs import operators
from tests.export.passes.toys import assert_same, outputs, scopes, toy

W, WT = (", ".join(str(i % n / 7) for i in range(48)) for n in (5, 11))
ROWS = (
    "int64[2] rows = {-1, 8}, int64[1] six = {6}, int64[1] two = {2}, int64[1] three = {3},"
    f" float half = {{0.5}}, float[8,6] w = {{{W}}}, float[6,8] wt = {{{WT}}},"
    " float[6] c = {1,2,3,4,5,6}, float[8] g = {1,2,3,4,5,6,7,8}"
)
SIZES = "b = Shape <start = 0, end = 1> (x) s = Shape <start = 1, end = 2> (x)"
LAST = f"{SIZES} t = Concat <axis = 0> (b, s, six) y = Reshape(z, t)"


# batch and sequence in one axis; what lies between must give (rows, 6)
@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("z = Gemm(f, w, c)", {"MatMul": 1, "Add": 1}),
        ("z = Gemm <transB = 1> (f, wt)", {"MatMul": 1}),
        ("n = LayerNormalization(f, g) z = MatMul(n, w)", {"LayerNormalization": 1, "MatMul": 1}),
        (
            "n = Mul(f, half) r = Relu(n) e = Add(r, f) z = Gemm(e, w, c)",
            {"Mul": 1, "Relu": 1, "Add": 2, "MatMul": 1},
        ),
    ],
)
def test_projections_keep_batch_and_sequence_apart(body: str, left: dict[str, int]) -> None:
    model = toy("(float[B,S,8] x) => (float[B,S,6] o)", ROWS, f"f = Reshape(x, rows) {body} {LAST}"
                " o = Identity(y)")  # fmt: skip
    before = outputs(model)
    assert unfolded_axis_(model) == 1
    assert unfolded_axis_(model) == 0
    assert operators(model) == left | {"Identity": 1}
    assert_same(outputs(model), before)
    assert scopes(model) == {"a.module"}


def test_reshape_that_splits_as_well_stays() -> None:
    model = toy(
        "(float[B,S,2,4] x) => (float[B,S,2,3] y)",
        ROWS,
        f"f = Reshape(x, rows) z = Gemm(f, w, c) {SIZES} t = Concat <axis = 0> (b, s, two, three)"
        " y = Reshape(z, t)",
    )
    before = outputs(model)
    assert unfolded_axis_(model) == 1
    assert operators(model)["Gemm"] == 0
    assert operators(model)["Reshape"] == 2  # of what follows batch and sequence
    assert_same(outputs(model), before)


TABLE = ", ".join(str(i % 13 / 7) for i in range(160))
HEADS = (
    "int64[1] four = {4}, int64[1] all = {-1}, int64[1] eight = {8}, int64[1] one = {1},"
    f" float half = {{0.5}}, float[4,5,8] table = {{{TABLE}}}, int64[1] five = {{5}},"
    " int64[1] two = {2}"
)
FOLD = (
    "b = Shape <start = 0, end = 1> (q) s = Shape <start = 2, end = 3> (q)"
    " folded = Concat <axis = 0> (all, s, eight) fq = Reshape(q, folded) fk = Reshape(k, folded)"
    " back = Concat <axis = 0> (all, four, s, s)"
)
INPUTS = "(float[B,4,S,8] q, float[B,4,S,8] k)"


def test_scores_keep_batch_and_heads_apart() -> None:
    model = toy(
        f"{INPUTS} => (float[B,4,S,S] y)",
        f"{HEADS}, float[N,S,8] fq, float[N,S,8] fk, float[B,4,S,S] z",
        f"{FOLD} t = Transpose <perm = [0, 2, 1]> (fk) d = Mul(t, half) x = MatMul(fq, d)"
        " p = Softmax(x) z = Reshape(p, back) y = Identity(z)",
    )
    before = outputs(model)
    assert unfolded_axis_(model) == 1
    assert operators(model) == {"Transpose": 1, "Mul": 1, "MatMul": 1, "Softmax": 1, "Identity": 1}
    assert_same(outputs(model), before)


def test_constants_repeated_for_the_batch_broadcast() -> None:
    model = toy(
        f"{INPUTS} => (float[B,4,S,5] y)",
        f"{HEADS}, float[N,S,8] fq, float[N,5,8] m, float[B,4,S,5] z",
        f"{FOLD} r = Concat <axis = 0> (b, one, one) m = Tile(table, r)"
        " t = Transpose <perm = [0, 2, 1]> (m) x = MatMul(fq, t)"
        " u = Concat <axis = 0> (all, four, s, five) z = Reshape(x, u) y = Identity(z)",
    )
    before = outputs(model)
    assert unfolded_axis_(model) == 1
    assert operators(model) == {"MatMul": 1, "Identity": 1}
    assert_same(outputs(model), before)


def test_indices_that_are_the_same_for_every_row_are_repeated_for_both_axes() -> None:
    model = toy(
        f"{INPUTS} => (float[B,4,S,3] y)",
        f"{HEADS}, int64[1] three = {{3}}, float[N,S,8] fq, int64[1,S,3] near, int64[N,S,3] i,"
        " float[B,4,S,3] z",
        f"{FOLD} n = Mul(b, four) e = Concat <axis = 0> (n, s, three)"
        " part = Concat <axis = 0> (one, s, three)"
        " picks = Expand(two, part) near = Abs(picks) i = Expand(near, e)"
        " x = GatherElements <axis = 2> (fq, i) u = Concat <axis = 0> (all, four, s, three)"
        " z = Reshape(x, u) y = Identity(z)",
    )
    before = outputs(model)
    assert unfolded_axis_(model) == 1
    assert operators(model)["GatherElements"] == 1
    assert_same(outputs(model), before)


@pytest.mark.parametrize(
    "body",
    [
        "m = ReduceMean <keepdims = 1> (f, zero) z = Sub(f, m) w6 = MatMul(z, w)",  # over all rows
        "z = Transpose <perm = [1, 0]> (f) u = Transpose <perm = [1, 0]> (z) w6 = MatMul(u, w)",
    ],
)
def test_what_mixes_rows_is_left_alone(body: str) -> None:
    model = toy(
        "(float[B,S,8] x) => (float[B,S,6] y)",
        f"{ROWS}, int64[1] zero = {{0}}",
        f"f = Reshape(x, rows) {body} {LAST.replace('(z, t)', '(w6, t)')}",
    )
    assert unfolded_axis_(model) == 0


def test_rows_that_are_an_output_are_left_alone() -> None:
    model = toy(
        "(float[B,S,8] x) => (float[B,S,6] y, float[N,6] z)",
        ROWS,
        f"f = Reshape(x, rows) z = Gemm(f, w, c) {LAST}",
    )
    assert unfolded_axis_(model) == 0
