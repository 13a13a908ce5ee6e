"""Altered texts: what they keep, and that they are always the same."""

import pytest

from calib_data.variation import varied

SOURCE = ["a man plays a guitar", "two dogs run on the beach", "rates rose again this month", "yes"]


def test_a_turn_alters_a_text_in_the_same_way_always() -> None:
    text = SOURCE[0]
    made = [varied(text, turn, SOURCE) for turn in range(20)]
    assert made == [varied(text, turn, SOURCE) for turn in range(20)]
    assert len(set(made)) > 10


def test_words_are_the_text_s_or_the_source_s() -> None:
    known = set(" ".join(SOURCE).split())
    for text in SOURCE:
        shared = 0
        for turn in range(50):
            words = varied(text, turn, SOURCE).split()
            assert set(words) <= known
            shared += bool(set(words) & set(text.split()))
        assert shared > 35


def test_a_long_text_may_begin_later() -> None:
    words = [str(i) for i in range(200)]
    first = [varied(" ".join(words), turn, ["x"]).split()[0] for turn in range(30)]
    assert len(set(first)) > 15


@pytest.mark.parametrize("text", ["yes", "是的", ""])
def test_a_text_of_one_word_is_joined(text: str) -> None:
    assert len({varied(text, turn, SOURCE) for turn in range(10)}) > 2
