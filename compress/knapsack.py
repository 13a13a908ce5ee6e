"""The multiple-choice knapsack: one option of each item, least loss within a budget."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

BINS = 10_000  # into which a budget is cut
_SLACK = 1e-9  # relative: sums of floats that are equal on paper


class Option(NamedTuple):
    """One way to settle an item: what it costs, what it loses, and what it stands for."""

    cost: float
    loss: float
    means: Any


def useful(options: Sequence[Option]) -> list[Option]:
    """Return the options, cheapest first, without those that cost no less than another and lose more."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost, o.loss)):
        if not kept or option.loss <= kept[-1].loss:
            kept.append(option)
    return kept


def choose(items: Sequence[Sequence[Option]], budget: float) -> list[Option] | None:
    """Return one option of each item with the least loss that costs at most `budget` in all.

    Dynamic programming over costs (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, ch. 11),
    rounded down to 1/10,000 of what the budget leaves above the cheapest choice; what then turns out
    to cost more is passed over. Of equal losses the dearer choice is returned, which gives up least.
    None where even the cheapest choice is beyond the budget.
    """
    tables = [useful(options) for options in items]
    cheapest = [options[0] for options in tables]
    room = budget - _cost(cheapest)
    slack = _SLACK * max(1.0, abs(budget))
    if room < -slack:
        return None
    size = max(room, 0.0) / BINS
    losses = np.full(BINS + 1, np.inf)  # the least by bins spent
    losses[0] = 0.0
    picks = []
    for options in tables:
        losses, pick = _settle(losses, options, size)
        picks.append(pick)
    # least loss first, and of equals the most spent
    for spent in np.lexsort((-np.arange(BINS + 1), losses)):
        if np.isinf(losses[spent]):
            break
        chosen = _traced(tables, picks, int(spent), size)
        if _cost(chosen) <= budget + slack:
            return chosen
    return cheapest


def _settle(
    losses: np.ndarray, options: Sequence[Option], size: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the least losses by bins once one more item is settled, and by which option."""
    best = np.full(BINS + 1, np.inf)
    pick = np.zeros(BINS + 1, dtype=np.int32)
    for index, option in enumerate(options):
        bins = _bins(option.cost - options[0].cost, size)
        if bins > BINS:
            break  # the rest costs more
        found = losses[: BINS + 1 - bins] + option.loss
        better = found < best[bins:]
        best[bins:][better] = found[better]
        pick[bins:][better] = index
    return best, pick


def _bins(extra: float, size: float) -> int:
    if extra <= 0:
        return 0
    return BINS + 1 if size == 0 else int(min(BINS + 1, extra / size + _SLACK))


def _traced(
    tables: Sequence[Sequence[Option]], picks: Sequence[np.ndarray], spent: int, size: float
) -> list[Option]:
    """Return the options that led to `spent` bins, from the last item back."""
    chosen: list[Option] = []
    for options, pick in zip(reversed(tables), reversed(picks), strict=True):
        option = options[int(pick[spent])]
        spent -= _bins(option.cost - options[0].cost, size)
        chosen.append(option)
    return chosen[::-1]


def _cost(options: Sequence[Option]) -> float:
    return sum(option.cost for option in options)
