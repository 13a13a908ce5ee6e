"""From importance to a plan: which units stay, chosen globally across layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calib_data.errors import ConfigError
from compress.blocks import Group, Kind


@dataclass(frozen=True)
class PrunePlan:
    """The units that stay, ascending, by group; a group that is not named stays whole."""

    keep: Mapping[str, tuple[int, ...]]

    def to_json(self) -> dict[str, Any]:
        """Return the plan as a JSON-able dict."""
        return {"keep": {name: list(units) for name, units in self.keep.items()}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "PrunePlan":
        """Make a plan from `to_json`'s dict."""
        return cls({name: tuple(units) for name, units in value["keep"].items()})


def plan_removal(
    groups: tuple[Group, ...],
    importance: Mapping[str, Tensor],
    kind: Kind,
    share: float,
    round_to: int = 1,
) -> PrunePlan:
    """Return the plan that removes about `share` of the units of `kind`, the least important first.

    Units compete across layers in chunks of `round_to` (each layer's own least important ones
    together), so that every layer keeps a size that kernels like; every layer keeps at least one
    chunk. Raises `ConfigError` where a share above zero is too small to remove a chunk.
    """
    members = [group for group in groups if group.kind == kind]
    total = sum(group.units for group in members)
    target = round(total * share / round_to)
    if share > 0 and members and target == 0:
        raise ConfigError(
            f"removing {share:.0%} of {total} {kind} is less than one step of {round_to}; "
            "raise the share or lower --round-to"
        )
    chunks: list[tuple[float, str, tuple[int, ...]]] = []
    for group in members:
        scores = importance[group.key]
        order = torch.argsort(scores, stable=True).tolist()
        step = min(round_to, group.units)
        # what is left over by an uneven size goes to the part that stays
        removable = group.units - max(step, group.units % step)
        for start in range(0, removable - step + 1, step):
            units = tuple(order[start : start + step])
            chunks.append((float(scores[list(units)].square().sum()), group.key, units))
    chunks.sort(key=lambda chunk: chunk[0])  # stable: earlier layers first among equals
    removed: dict[str, set[int]] = {}
    for _, key, units in chunks[:target]:
        removed.setdefault(key, set()).update(units)
    return PrunePlan(
        {
            group.key: tuple(u for u in range(group.units) if u not in removed[group.key])
            for group in members
            if group.key in removed
        }
    )


def check_plan(plan: PrunePlan, groups: tuple[Group, ...]) -> None:
    """Raise `ConfigError` for a plan that names unknown groups or units, or empties a layer."""
    known = {group.key: group for group in groups}
    for key, units in plan.keep.items():
        if key not in known:
            raise ConfigError(f"the plan names {key}, which the model does not have")
        if not units:
            raise ConfigError(f"the plan leaves {key} empty; keep at least one unit")
        bad = [u for u in units if not 0 <= u < known[key].units]
        if bad or list(units) != sorted(set(units)):
            raise ConfigError(
                f"the plan's units of {key} must be ascending and below {known[key].units}, "
                f"got {bad or list(units)[:5]}"
            )
