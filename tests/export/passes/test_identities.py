import pytest

from export.passes.identities import identities_
from tests.export.graphs import operators
from tests.export.passes.toys import assert_same, outputs, toy

CONSTANTS = (
    "int64[3] same = {0, 0, 8}, int64[6] nothing = {0, 0, 0, 0, 0, 0}, bool yes = {1},"
    " int64[6] something = {0, 0, 1, 0, 0, 0}, int64[1] axis = {1}, bool[2,1,1,1] more = {1, 1}"
)
SIGNATURE = "(float[B,S,8] x, bool[B,S,8] m) => (float[B,S,8] y)"


@pytest.mark.parametrize(
    "body",
    [
        "z = Reshape(x, same) y = Relu(z)",
        "z = Pad(x, nothing) y = Relu(z)",
        "z = Identity(x) y = Relu(z)",
        "z = Cast <to = 1> (x) y = Relu(z)",
        "n = Unsqueeze(x, axis) z = Squeeze(n, axis) y = Relu(z)",
        "n = And(yes, m) y = Where(n, x, x)",
        "n = And(m, yes) y = Where(n, x, x)",
    ],
)
def test_what_changes_nothing_goes_away(body: str) -> None:
    model = toy(SIGNATURE, CONSTANTS, body)
    before = outputs(model)
    assert identities_(model) == 1
    assert identities_(model) == 0
    assert operators(model).total() == 1
    assert_same(outputs(model), before)


@pytest.mark.parametrize(
    "body",
    [
        "y = Identity(x)",  # an output keeps its name
        "z = Pad(x, something) s = Shape(x) n = Shape(z) y = Reshape(x, s)",
        "n = Cast <to = 10> (x) z = Cast <to = 1> (n) y = Relu(z)",
    ],
)
def test_what_changes_something_stays(body: str) -> None:
    assert identities_(toy(SIGNATURE, CONSTANTS, body)) == 0


def test_broadcasting_stays() -> None:
    model = toy("(bool[1,S] m) => (bool[2,1,1,S] y)", CONSTANTS, "n = And(m, more) y = Not(n)")
    assert identities_(model) == 0
