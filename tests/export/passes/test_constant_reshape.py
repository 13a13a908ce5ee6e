import numpy as np
import pytest

from export.passes.constant_reshape import constant_reshape_
from export.passes.nodes import known
from tests.export.graphs import operators
from tests.export.passes.toys import assert_same, outputs, scopes, toy

SIZES = "b = Shape <start = 0, end = 1> (x) s = Shape <start = 1, end = 2> (x)"
CONSTANTS = "int64[1] two = {2}, int64[1] four = {4}, int64[1] eight = {8}, int64[1] all = {-1}"


@pytest.mark.parametrize(
    ("output", "parts", "expected"),
    [
        ("[B,S,2,4]", "b, s, two, four", [0, 0, 2, 4]),
        ("[B,S,8]", "b, s, eight", [0, 0, 8]),
        ("[B,2,S,4]", "b, two, s, four", [0, 2, -1, 4]),
        ("[8,S,B]", "eight, s, b", [8, 0, -1]),
    ],
)
def test_targets_become_constants(output: str, parts: str, expected: list[int]) -> None:
    model = toy(
        f"(float[B,S,8] x) => (float{output} y)",
        CONSTANTS,
        f"{SIZES} t = Concat <axis = 0> ({parts}) y = Reshape(x, t)",
    )
    before = outputs(model)
    assert constant_reshape_(model) == 1
    assert constant_reshape_(model) == 0
    assert operators(model) == {"Constant": 1, "Reshape": 1}
    (node,) = (node for node in model.graph if node.op_type == "Reshape")
    assert np.array_equal(known(node.inputs[1]), expected)
    assert_same(outputs(model), before)
    assert scopes(model) == {"a.module"}


def test_two_sizes_that_move_need_the_run_time() -> None:
    model = toy(
        "(float[B,S,8] x) => (float[8,B,S] y)",
        CONSTANTS,
        f"{SIZES} t = Concat <axis = 0> (eight, b, s) y = Reshape(x, t)",
    )
    assert constant_reshape_(model) == 0
