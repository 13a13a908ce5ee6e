"""Plans in which every block of a kind keeps the same share."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

from compress.blocks import Group
from compress.knapsack import Option, useful

Losses = Mapping[str, Mapping[int, float]]  # by group and the units that stay
GroupCost = Callable[[Group, int], float]


def even_shares(groups: Sequence[Group], losses: Losses, cost: GroupCost) -> list[Option]:
    """Return the ways to keep one share of heads and one of neurons, without those never chosen."""
    options = [Option(0.0, 0.0, {})]
    for kind in ("heads", "neurons"):
        members = [group for group in groups if group.kind == kind]
        if members:
            pairs = itertools.product(options, _levels(members, losses, cost))
            options = useful(
                [Option(a.cost + b.cost, a.loss + b.loss, a.means | b.means) for a, b in pairs]
            )
    return options


def _levels(groups: Sequence[Group], losses: Losses, cost: GroupCost) -> list[Option]:
    """Return an option for each share that the widest group can keep."""
    widest = max(groups, key=lambda group: group.units)
    options = []
    for level in losses[widest.key]:
        counts = {g.key: _nearest(losses[g.key], level * g.units / widest.units) for g in groups}
        spent = sum(cost(g, counts[g.key]) for g in groups)
        lost = sum(losses[g.key][counts[g.key]] for g in groups)
        options.append(Option(spent, lost, counts))
    return options


def _nearest(choices: Iterable[int], wanted: float) -> int:
    return min(choices, key=lambda n: abs(n - wanted))
