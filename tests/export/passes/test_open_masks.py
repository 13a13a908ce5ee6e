import pytest

from export.passes.open_masks import open_masks_
from tests.export.graphs import operators
from tests.export.passes.toys import assert_same, outputs, toy

SIGNATURE = "(float[B,2,S,4] q, float[B,2,S,4] k, float[B,2,S,4] v) => (float[B,2,S,4] y)"
BODY = "s = Shape(q) b = Slice(s, zero, one) t = Concat<axis = 0>(b, rest) m = Expand(mask, t)"


@pytest.mark.parametrize(("bits", "dropped"), [("1, 1, 1, 1, 1", 1), ("1, 1, 0, 1, 1", 0)])
def test_only_a_mask_that_hides_nothing_goes(bits: str, dropped: int) -> None:
    numbers = (
        "int64[1] zero = {0}, int64[1] one = {1}, int64[3] rest = {1, 5, 5},"
        f" bool[1,1,1,5] mask = {{{bits}}}"
    )
    model = toy(SIGNATURE, numbers, f"{BODY} y = Attention(q, k, v, m)")
    before = outputs(model)
    assert open_masks_(model) == dropped
    assert operators(model)["Expand"] == 1 - dropped
    assert_same(outputs(model), before)
