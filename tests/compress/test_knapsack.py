import itertools
import random

import pytest

from compress.knapsack import Option, choose, useful


def exhaustive(items: list[list[Option]], budget: float) -> float:
    """Return the least loss by trying everything."""
    fits = (c for c in itertools.product(*items) if sum(o.cost for o in c) <= budget)
    return min(sum(o.loss for o in c) for c in fits)


@pytest.mark.parametrize("seed", range(20))
def test_equals_trying_everything(seed: int) -> None:
    draw = random.Random(seed)
    items = [
        [Option(draw.randint(1, 20), draw.randint(0, 30), n) for n in range(draw.randint(1, 5))]
        for _ in range(5)
    ]
    least = sum(min(o.cost for o in options) for options in items)
    for budget in (least, least + 7, least + 20, 200):
        chosen = choose(items, budget)
        assert chosen is not None
        assert sum(o.cost for o in chosen) <= budget
        assert sum(o.loss for o in chosen) == pytest.approx(exhaustive(items, budget))


def test_nothing_fits_a_budget_below_the_cheapest() -> None:
    assert choose([[Option(2, 1, "a")], [Option(3, 1, "b")]], 4.99) is None
    assert choose([[Option(2, 1, "a")], [Option(3, 1, "b")]], 5) is not None


def test_of_equal_losses_the_dearer_stays() -> None:
    items = [[Option(1, 0, "little"), Option(5, 0, "much"), Option(9, 0, "all")]]
    assert [o.means for o in choose(items, 6) or []] == ["much"]


def test_useless_options_are_left_out() -> None:
    dear, cheap = Option(5, 3, "dear"), Option(4, 2, "cheap")
    assert useful([dear, cheap, Option(9, 0, "whole")]) == [cheap, Option(9, 0, "whole")]
