"""The search for the fewest layers to keep in float, so that quality drops no more than it may.

It knows layers by their names and quality by what it is told, and asks as seldom as it can: an
evaluation is a pass over a whole data set.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

RETURNS = 6  # layers that are tried to be given back


@dataclass(frozen=True)
class Found:
    """The best that a search has found."""

    kept: tuple[str, ...]  # in float, the costliest first
    drop: float
    held: bool  # whether that is within the budget
    drops: Mapping[int, float]  # layers kept → the drop, of the costliest ones alone
    evaluations: int


def keep_costliest(
    order: Sequence[str],
    drop_of: Callable[[Collection[str]], float],
    max_drop: float,
    returns: int = RETURNS,
) -> Found:
    """Return which layers of `order`, the costliest first, to keep so that the drop is `max_drop`.

    `drop_of` tells how far quality drops with the layers kept that it is given. The count doubles until
    the budget holds, the fewest that do are then found by halving (Pandey et al. 2023,
    arXiv:2302.05397), as if more layers were never worse; last, up to `returns` of them, from
    the cheapest on, are given back if the budget holds without. At least one layer is quantized:
    where no count holds the budget, it is the one of those tried that drops least.
    """
    drops: dict[int, float] = {}

    def holds(count: int) -> bool:
        if count not in drops:
            drops[count] = drop_of(order[:count])
        return drops[count] <= max_drop

    most, fails, count = len(order) - 1, -1, 0
    while not holds(count) and count < most:
        fails, count = count, min(max(1, 2 * count), most)
    if not holds(count):
        best = min(drops, key=lambda tried: (drops[tried], tried))
        return Found(tuple(order[:best]), drops[best], False, drops, len(drops))
    while count - fails > 1:
        middle = (fails + count) // 2
        fails, count = (fails, middle) if holds(middle) else (middle, count)
    kept, drop, asked = list(order[:count]), drops[count], 0
    # without the last one of them it is known to fail
    for name in list(reversed(kept[:-1]))[:returns]:
        fewer = [other for other in kept if other != name]
        without, asked = drop_of(fewer), asked + 1
        if without <= max_drop:
            kept, drop = fewer, without
    return Found(tuple(kept), drop, True, dict(sorted(drops.items())), len(drops) + asked)
