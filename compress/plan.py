"""A plan: which units, layers and channels stay, as JSON that a person can read and edit."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from calib_data.errors import ConfigError
from compress.blocks import Group, all_groups, find_groups, query_groups
from compress.stacks import droppable_stacks
from compress.width import hidden_size

_FIELDS = ("keep", "layers", "hidden")
_MOST = 10**7  # indices that a plan may name at once: a file of ten bytes must not fill the memory


@dataclass(frozen=True)
class PrunePlan:
    """What stays, by ascending indices of the model that the plan is made for.

    Groups, stacks and the residual stream that are not named stay whole. Layers keep their numbers
    in the keys of `keep`, whichever of them go. Raises `ConfigError` for indices that are negative,
    not ascending or none at all.
    """

    keep: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # group's key → units
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # stack → layers
    hidden: tuple[int, ...] | None = None  # channels of the residual stream

    def __post_init__(self) -> None:
        hidden = {} if self.hidden is None else {"hidden": self.hidden}
        for name, units in {**self.keep, **self.layers, **hidden}.items():
            if not units:
                raise ConfigError(f"the plan leaves {name} empty; keep at least one")
            if units[0] < 0 or any(a >= b for a, b in itertools.pairwise(units)):
                raise ConfigError(
                    f"the plan's indices of {name} must be ascending from 0 up, each once, "
                    f"got {ranges(units)}"
                )

    def to_json(self) -> dict[str, Any]:
        """Return the plan as a JSON-able dict, its indices as ranges: `"0-15,32"`."""
        made: dict[str, Any] = {"keep": {k: ranges(units) for k, units in self.keep.items()}}
        if self.layers:
            made["layers"] = {stack: ranges(kept) for stack, kept in self.layers.items()}
        if self.hidden is not None:
            made["hidden"] = ranges(self.hidden)
        return made

    @classmethod
    def from_json(cls, value: Any) -> "PrunePlan":
        """Make a plan from `to_json`'s dict; indices may be lists of numbers as well.

        Raises `ConfigError` that names what is neither.
        """
        if not isinstance(value, Mapping) or set(value) - set(_FIELDS):
            unknown = sorted(set(value) - set(_FIELDS)) if isinstance(value, Mapping) else value
            raise ConfigError(
                f"a plan holds {', '.join(_FIELDS)}, and nothing like {unknown!r:.80}"
            )
        parts = {}
        for name in ("keep", "layers"):
            part = value.get(name, {})
            if not isinstance(part, Mapping):
                raise ConfigError(f'a plan\'s "{name}" must be an object, got {part!r:.80}')
            parts[name] = {str(key): _indices(str(key), units) for key, units in part.items()}
        hidden = value.get("hidden")
        return cls(**parts, hidden=None if hidden is None else _indices("hidden", hidden))


def check_plan(plan: PrunePlan, model: nn.Module) -> None:
    """Raise `ConfigError` for a plan that names what `model` does not have or cannot lose."""
    groups = {group.key: group for group in (*find_groups(model), *query_groups(model))}
    locked = {group.key for group in all_groups(model)} - set(groups)
    for key, units in plan.keep.items():
        if key in locked:
            raise ConfigError(
                f"the plan names {key}, which shares a bias per head with other layers, so its "
                "heads cannot be removed one layer at a time; leave it out"
            )
        if key not in groups:
            raise ConfigError(
                f"the plan names {key}, which the model does not have; it has {_some(groups)}"
            )
        _check_range(key, units, groups[key].units)
    for key, units in plan.keep.items():
        if groups[key].kind == "queries":
            _check_even(groups[key], units, plan)
    if plan.hidden is not None:
        _check_range("hidden", plan.hidden, hidden_size(model))
    if plan.layers:
        stacks = droppable_stacks(model)
        for stack, layers in plan.layers.items():
            if stack not in stacks:
                raise ConfigError(
                    f"the plan names layers of {stack}, which is no stack of the model's; it has "
                    f"{_some(stacks)}"
                )
            _check_range(stack, layers, len(stacks[stack]))


def kept_queries(group: Group, units: Sequence[int], plan: PrunePlan) -> list[int]:
    """Return the query heads in `units` whose key/value head stays, numbered without those that go.

    `group` is of the kind `queries`.
    """
    shared = group.units // group.runs
    stay = plan.keep.get(f"{group.name}.heads", range(group.runs))
    places = {unit: place for place, unit in enumerate(stay)}
    return [places[u // shared] * shared + u % shared for u in units if u // shared in places]


def _check_even(group: Group, units: Sequence[int], plan: PrunePlan) -> None:
    shared = group.units // group.runs
    stay = plan.keep.get(f"{group.name}.heads", range(group.runs))
    counts = {unit: sum(u // shared == unit for u in units) for unit in stay}
    if len(set(counts.values())) > 1 or not all(counts.values()):
        told = ", ".join(f"{count} of {unit}" for unit, count in counts.items())
        raise ConfigError(
            f"the plan's {group.key} must keep the same number of query heads, at least one, of "
            f"every key/value head that stays ({shared} each of {len(counts)}); it keeps {told}"
        )


def _check_range(name: str, units: Sequence[int], count: int) -> None:
    if units[-1] >= count:
        raise ConfigError(
            f"the plan's indices of {name} must be below {count}, got "
            f"{ranges([u for u in units if u >= count])}"
        )


def ranges(indices: Iterable[int]) -> str:
    """Return ascending indices as text, runs of them as `first-last`: `"0-15,32"`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1][1:] = [index]
        else:
            runs.append([index])
    return ",".join("-".join(map(str, run)) for run in runs)


def _indices(name: str, value: Any) -> tuple[int, ...]:
    """Return the indices that `ranges` or a list of numbers says."""
    if isinstance(value, str):
        found: list[int] = []
        for part in filter(None, (part.strip() for part in value.split(","))):
            match = re.fullmatch(r"(\d{1,9})\s*(?:-\s*(\d{1,9}))?", part)
            if match is None or int(match[2] or match[1]) < int(match[1]):
                raise ConfigError(f'the plan\'s {name} has {part!r:.80}; write "0-15,32"')
            run = range(int(match[1]), int(match[2] or match[1]) + 1)
            if len(found) + len(run) > _MOST:
                raise ConfigError(f"the plan's {name} names more units than any model has: {part}")
            found.extend(run)
        return tuple(found)
    if isinstance(value, Sequence) and all(type(unit) is int for unit in value):
        return tuple(value)
    raise ConfigError(
        f'the plan\'s {name} must be a list of numbers or "0-15,32", got {value!r:.80}'
    )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")
