import pytest

from calib_data.errors import ModelError
from compress.layer_map import is_layer_map, last_pairs, layer_pairs


@pytest.mark.parametrize(
    ("text", "student", "teacher", "expected"),
    [
        ("uniform", [3], [6], ((0, 0), (1, 2), (2, 5))),
        ("uniform", [1], [6], ((0, 5),)),  # last to last, not first to first
        ("uniform", [2], [2], ((0, 0), (1, 1))),
        ("last", [2], [6], ((0, 4), (1, 5))),
        ("0:1,1:5", [2], [6], ((0, 1), (1, 5))),
        (" 1 : 5 ,-1:-1", [2], [6], ((1, 5), (-1, -1))),
        # an encoder's layers, then its decoder's
        ("uniform", [1, 2], [4, 3], ((0, 3), (1, 4), (2, 6))),
        ("last", [2, 1], [4, 3], ((0, 2), (1, 3), (2, 6))),
    ],
)
def test_layers_meet(
    text: str, student: list[int], teacher: list[int], expected: tuple[tuple[int, int], ...]
) -> None:
    assert layer_pairs(text, student, teacher) == expected


def test_last_layers_of_each_stack_meet() -> None:
    assert last_pairs([3], [6]) == ((2, 5),)
    assert last_pairs([1, 2], [4, 3]) == ((0, 3), (2, 6))


@pytest.mark.parametrize("text", ["uniform", "last"])
def test_a_deeper_student_needs_a_map(text: str) -> None:
    with pytest.raises(ModelError, match="3 layers, the teacher only 2; give pairs"):
        layer_pairs(text, [3], [2])
    assert layer_pairs("2:1", [3], [2]) == ((2, 1),)


@pytest.mark.parametrize("text", ["", "first", "0", "0:", "0:1,", "0-1", "-2:0", "a:b", "0:1:2"])
def test_what_is_no_map(text: str) -> None:
    assert not is_layer_map(text)
