"""What every block keeps within a budget: milliseconds, bytes, or a plain number of units.

Losses add up over units (see `importance`) and costs over blocks, so that the plan that loses least
is a knapsack's solution. What a cost means is the caller's.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from calib_data.errors import ConfigError
from compress.blocks import Group, Kind
from compress.config import one_of, require
from compress.even_shares import Losses, even_shares
from compress.knapsack import Option, choose, useful
from compress.plan import PrunePlan

RANKINGS = ("global", "uniform")

Layer = tuple[str, int]  # its stack and its number
Decided = tuple[dict[str, int], set[Layer]]  # units that stay by group, layers that go


@dataclass(frozen=True)
class Cost:
    """What a model costs: a fixed part, each layer's own, and each group's by the units it keeps."""

    group: Callable[[Group, int], float]
    fixed: float = 0.0
    layer: Mapping[str, float] = field(default_factory=dict)  # one layer's rest, by stack
    depth: Mapping[str, int] = field(default_factory=dict)  # how many layers, by stack

    def total(self, groups: Iterable[Group], plan: PrunePlan) -> float:
        """Return the cost of what `plan` keeps of the model that `groups` are of."""
        kept = {s: set(plan.layers.get(s, range(depth))) for s, depth in self.depth.items()}
        spent = self.fixed + sum(self.layer.get(s, 0.0) * len(on) for s, on in kept.items())
        for group in groups:
            place = layer_of(group, self.depth)
            if place is None or place[1] in kept[place[0]]:
                spent += self.group(group, len(plan.keep.get(group.key, range(group.units))))
        return spent


@dataclass(frozen=True)
class Limits:
    """What every block must keep, in which steps, and whether blocks compete."""

    minimum: Mapping[Kind, int] = field(default_factory=dict)
    steps: Mapping[Kind, int] = field(default_factory=dict)  # blocks keep multiples of it, or all
    ranking: str = "global"  # uniform: every block of a kind keeps the same share

    def __post_init__(self) -> None:
        one_of("--ranking", self.ranking, RANKINGS)
        for kind, count in (*self.minimum.items(), *self.steps.items()):
            require(count >= 1, f"minimum and step of {kind} must be at least 1, got {count}")

    def choices(self, group: Group) -> list[int]:
        """Return how many units `group` may keep, ascending."""
        least, step = self.least(group.kind), self.steps.get(group.kind, 1)
        return [*range(least, group.units, step), group.units]

    def least(self, kind: Kind) -> int:
        """Return the fewest units that a block of many keeps: the minimum in whole steps."""
        step = self.steps.get(kind, 1)
        return -(-self.minimum.get(kind, 1) // step) * step


def allocate(
    groups: Sequence[Group],
    importance: Mapping[str, Tensor],
    cost: Cost,
    budget: float,
    limits: Limits = Limits(),
    layers: Mapping[str, Tensor] = {},
) -> PrunePlan:
    """Return the plan that loses least importance of those that cost at most `budget`.

    `importance` is the loss of each unit by group, shape (units,); `layers` that of each layer by
    stack, shape (layers,), for stacks whose layers may go as a whole, all but the most important one.
    Raises `ConfigError` for a budget that the limits do not allow.
    """
    losses = {group.key: _losses(importance[group.key], limits.choices(group)) for group in groups}
    decide = _uniform if limits.ranking == "uniform" else _competing
    decided = decide(groups, losses, cost, budget, limits, layers)
    if decided is None:
        least = lowest(groups, cost, limits, layers)
        raise ConfigError(f"a budget of {budget:.6g} is below {least:.6g}, the least there is")
    counts, gone = decided
    keep = {
        group.key: best_units(importance[group.key], counts[group.key])
        for group in groups
        if counts.get(group.key, group.units) < group.units
    }
    stay = {s: tuple(i for i in range(len(x)) if (s, i) not in gone) for s, x in layers.items()}
    fewer = {stack: on for stack, on in stay.items() if len(on) < len(layers[stack])}
    return PrunePlan(keep, fewer) if fewer else PrunePlan(keep)


def lowest(
    groups: Sequence[Group], cost: Cost, limits: Limits, layers: Mapping[str, Tensor] = {}
) -> float:
    """Return the least cost that `allocate` can reach."""
    free = {group.key: dict.fromkeys(limits.choices(group), 0.0) for group in groups}
    items = _items(groups, free, cost, layers)
    return _unavoidable(cost, layers) + sum(min(o.cost for o in options) for options in items)


def plan_removal(
    groups: Sequence[Group],
    importance: Mapping[str, Tensor],
    kind: Kind,
    share: float,
    limits: Limits = Limits(),
) -> PrunePlan:
    """Return the plan that removes about `share` of the units of `kind`, losing the least.

    Every layer keeps its minimum. Raises `ConfigError` where a share above zero is less than a step.
    """
    members = [group for group in groups if group.kind == kind]
    total, step = sum(group.units for group in members), limits.steps.get(kind, 1)
    removed = round(total * share / step) * step
    if not members or share == 0:
        return PrunePlan({})
    if removed == 0:
        raise ConfigError(
            f"removing {share:.0%} of {total} {kind} is less than one step of {step}; "
            "raise the share or lower --round-to"
        )
    cost = Cost(lambda group, units: float(units))
    budget = max(float(total - removed), lowest(members, cost, limits))
    return allocate(members, importance, cost, budget, limits)


def best_units(importance: Tensor, count: int) -> tuple[int, ...]:
    """Return the `count` most important units, ascending; of equals the earlier ones go first."""
    order = torch.argsort(importance, stable=True)
    return tuple(sorted(order[len(order) - count :].tolist()))


def layer_of(group: Group, stacks: Iterable[str]) -> Layer | None:
    """Return the stack and the number of the layer that `group` lies in, None outside of them."""
    for stack in stacks:
        if group.name.startswith(f"{stack}."):
            return stack, int(group.name.removeprefix(f"{stack}.").partition(".")[0])
    return None


def _losses(importance: Tensor, choices: Sequence[int]) -> dict[int, float]:
    """Return what is lost by the number of units that stay, the best ones."""
    ascending = importance.double().sort().values
    removed = torch.cat([ascending.new_zeros(1), ascending.cumsum(0)])
    return {n: float(removed[len(ascending) - n]) for n in choices}


def _unavoidable(cost: Cost, layers: Mapping[str, Tensor]) -> float:
    """Return the cost that no decision changes: the fixed part, and layers that cannot go."""
    staying = set(cost.depth) - set(layers)
    return cost.fixed + sum(cost.layer.get(stack, 0.0) * cost.depth[stack] for stack in staying)


def removable_layers(layers: Mapping[str, Tensor]) -> list[Layer]:
    """Return the layers that may go, the least important first; each stack's best one stays."""
    found = [
        (float(score), stack, index)
        for stack, scores in layers.items()
        for index, score in enumerate(scores)
        if index != int(scores.argmax())
    ]
    return [(stack, index) for _, stack, index in sorted(found)]


# --- blocks that compete -------------------------------------------------------------------------


def _competing(
    groups: Sequence[Group],
    losses: Losses,
    cost: Cost,
    budget: float,
    limits: Limits,
    layers: Mapping[str, Tensor],
) -> Decided | None:
    """Return the best of all ways to spend the budget."""
    chosen = choose(_items(groups, losses, cost, layers), budget - _unavoidable(cost, layers))
    if chosen is None:
        return None
    counts: dict[str, int] = {}
    gone: set[Layer] = set()
    for option in chosen:
        if isinstance(option.means, dict):
            counts |= option.means
        else:
            gone.add(option.means)
    return counts, gone


def _items(
    groups: Sequence[Group], losses: Losses, cost: Cost, layers: Mapping[str, Tensor]
) -> list[list[Option]]:
    """Return what is decided, and how it can be: each group, or each layer with all its groups.

    An option means the units that stay, by group, or the layer that goes.
    """
    removable = set(removable_layers(layers))
    inside: dict[Layer, list[Group]] = {
        (stack, i): [] for stack, scores in layers.items() for i in range(len(scores))
    }
    items = []
    for group in groups:
        place = layer_of(group, layers)
        if place is None:
            items.append(_options(group, losses, cost))
        else:
            inside[place].append(group)
    for place, members in inside.items():
        options = [Option(cost.layer.get(place[0], 0.0), 0.0, {})]
        for group in members:
            pairs = itertools.product(options, _options(group, losses, cost))
            options = useful(
                [Option(a.cost + b.cost, a.loss + b.loss, a.means | b.means) for a, b in pairs]
            )
        if place in removable:
            options.append(Option(0.0, float(layers[place[0]][place[1]]), place))
        items.append(options)
    return items


def _options(group: Group, losses: Losses, cost: Cost) -> list[Option]:
    found = losses[group.key].items()
    return [Option(cost.group(group, n), loss, {group.key: n}) for n, loss in found]


# --- the same share everywhere -------------------------------------------------------------------


def _uniform(
    groups: Sequence[Group],
    losses: Losses,
    cost: Cost,
    budget: float,
    limits: Limits,
    layers: Mapping[str, Tensor],
) -> Decided | None:
    """Return the best of the plans in which every block of a kind keeps the same share."""
    removable = removable_layers(layers)
    best: tuple[float, float] | None = None
    decided: Decided | None = None
    for count in range(len(removable) + 1):
        gone = set(removable[:count])
        staying = [group for group in groups if layer_of(group, layers) not in gone]
        spent = _unavoidable(cost, layers) + sum(
            cost.layer.get(stack, 0.0) * (len(scores) - sum(s == stack for s, _ in gone))
            for stack, scores in layers.items()
        )
        lost = sum(float(layers[stack][index]) for stack, index in gone)
        for option in even_shares(staying, losses, cost.group):
            total = spent + option.cost
            rank = (lost + option.loss, -total)
            if total <= budget and (best is None or rank < best):
                best, decided = rank, (option.means, gone)
    return decided
