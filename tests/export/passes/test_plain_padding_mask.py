import pytest

from export.passes.plain_padding_mask import plain_padding_mask_
from tests.export.graphs import graph_of, operators
from tests.export.passes.toys import assert_same, outputs, toy

CONSTANTS = (
    "int64 zero = {0}, int64 one = {1}, int64 two = {2}, int64[3] behind = {1, 2, 3},"
    " int64[3] front = {0, 1, 2}, int64[1] last = {-1}, int64[1] none = {0}"
)


def lookup(start: str = "zero", limit: str = "s", data: str = "m") -> str:
    return (
        "b1 = Shape <start = 0, end = 1> (m) b = Squeeze(b1)"
        f" s1 = Shape <start = 1, end = 2> ({data}) s = Squeeze(s1)"
        f" r0 = Range(zero, b, one) r = Unsqueeze(r0, behind) c0 = Range({start}, {limit}, one)"
        " c = Unsqueeze(c0, front) n = Max(r, c) t = Shape(n) re = Expand(r, t)"
        " ce = Expand(c, t) ru = Unsqueeze(re, last) cu = Unsqueeze(ce, last)"
        " i = Concat <axis = -1> (ru, cu) g = GatherND(m, i) y = Not(g)"
    )


INDICES = "int64[B] r0, int64[S] c0, bool[B,1,1,S] g"


def test_mask_is_taken_as_it_is() -> None:
    model = toy("(bool[B,S] m) => (bool[B,1,1,S] y)", f"{CONSTANTS}, {INDICES}", lookup())
    before = outputs(model)
    assert plain_padding_mask_(model) == 1
    assert plain_padding_mask_(model) == 0
    assert operators(model) == {"Constant": 1, "Unsqueeze": 1, "Not": 1}
    assert_same(outputs(model), before)


@pytest.mark.parametrize(("start", "limit"), [("one", "s"), ("zero", "two")])
def test_part_of_a_mask_is_gathered(start: str, limit: str) -> None:
    names = "int64[B] r0, int64[N] c0, bool[B,1,1,N] g"
    body = lookup(start, limit)
    model = toy("(bool[B,S] m) => (bool[B,1,1,N] y)", f"{CONSTANTS}, {names}", body)
    assert plain_padding_mask_(model) == 0


def test_real_models() -> None:
    for name in ("bert", "llama"):
        assert operators(graph_of(name))["GatherND"] == 0
