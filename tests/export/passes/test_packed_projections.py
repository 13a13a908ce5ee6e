import pytest

from export.passes.packed_projections import packed_projections_
from tests.export.graphs import operators
from tests.export.passes.toys import assert_same, outputs, scopes, toy

CONSTANTS = (
    "int64[5] target = {0, 0, 3, 2, 4}, int64[1] axis = {2}, int64[1] behind = {-3},"
    " int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3}"
)
SIGNATURE = "(float[B,S,24] x) => (float[B,S,2,4] q, float[B,S,2,4] k, float[B,S,2,4] v)"


def body(axis: str = "axis", second: str = "one, two") -> str:
    pieces = {"q": "zero, one", "k": second, "v": "two, three"}
    slices = [
        f"{n}5 = Slice(p, {ends}, {axis}) {n} = Squeeze({n}5, axis)" for n, ends in pieces.items()
    ]
    return f"p = Reshape(x, target) {' '.join(slices)}"


@pytest.mark.parametrize("axis", ["axis", "behind"])
def test_slices_become_one_split(axis: str) -> None:
    model = toy(SIGNATURE, CONSTANTS, body(axis))
    before = outputs(model)
    assert packed_projections_(model) == 1
    assert packed_projections_(model) == 0
    found = operators(model)
    assert (found["Split"], found["Reshape"], found["Slice"], found["Squeeze"]) == (1, 3, 0, 0)
    assert_same(outputs(model), before)
    assert scopes(model) == {"a.module"}


def test_pieces_that_are_not_all_and_once_are_left_alone() -> None:
    assert packed_projections_(toy(SIGNATURE, CONSTANTS, body(second="two, three"))) == 0
