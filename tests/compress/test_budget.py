"""The search for layers to keep in float, on functions in place of models."""

from collections.abc import Callable, Collection

import pytest

from compress.budget import keep_costliest

ORDER = [f"layer.{i}" for i in range(12)]


def needing(*names: str) -> Callable[[Collection[str]], float]:
    """Return a drop of 0.1 for each of `names` that is not kept."""
    return lambda kept: 0.1 * len(set(names) - set(kept))


def test_nothing_is_kept_where_the_budget_holds() -> None:
    found = keep_costliest(ORDER, needing(), 0.05)
    assert (found.kept, found.held, found.evaluations) == ((), True, 1)


@pytest.mark.parametrize("count", range(1, 12))
def test_the_fewest_are_kept(count: int) -> None:
    found = keep_costliest(ORDER, needing(*ORDER[:count]), 0.05)
    assert found.kept == tuple(ORDER[:count])
    assert found.held
    assert found.drop == 0
    assert found.evaluations < 17


def test_layers_that_are_not_needed_are_given_back() -> None:
    found = keep_costliest(ORDER, needing(ORDER[1], ORDER[4]), 0.05)
    assert found.kept == (ORDER[1], ORDER[4])
    assert found.held
    # asked seldom, some that are not needed stay
    assert keep_costliest(ORDER, needing(ORDER[1], ORDER[4]), 0.05, returns=1).kept == (
        *ORDER[:3],
        ORDER[4],
    )


def test_a_missed_budget_ends_with_the_best_that_was_tried() -> None:
    def never(kept: Collection[str]) -> float:
        return 0.5 - 0.01 * len(kept) if len(kept) < 6 else 0.6

    found = keep_costliest(ORDER, never, 0.05)
    assert not found.held
    assert len(found.kept) == 4
    assert found.drop == pytest.approx(0.46)
    assert min(found.drops.values()) == found.drop


def test_one_layer_is_always_quantized() -> None:
    found = keep_costliest(ORDER, needing(*ORDER), 0.05)
    assert not found.held
    assert len(found.kept) == len(ORDER) - 1
    assert not keep_costliest(ORDER[:1], needing(*ORDER), 0.05).kept


def test_a_drop_that_is_no_number_holds_no_budget() -> None:
    assert not keep_costliest(ORDER, lambda kept: float("nan"), 0.05).held


def test_nothing_is_asked_twice() -> None:
    asked: list[frozenset[str]] = []

    def drop_of(kept: Collection[str]) -> float:
        asked.append(frozenset(kept))
        return needing(*ORDER[:7])(kept)

    found = keep_costliest(ORDER, drop_of, 0.05)
    assert len(asked) == len(set(asked)) == found.evaluations
