"""From importance to a plan: which units stay, chosen globally across layers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from calib_data.errors import ConfigError
from compress.blocks import Group


@dataclass(frozen=True)
class PrunePlan:
    """The units that stay, ascending, by group; a group that is not named stays whole."""

    keep: Mapping[str, tuple[int, ...]]
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    hidden: tuple[int, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the plan as a JSON-able dict."""
        return {"keep": {name: list(units) for name, units in self.keep.items()}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "PrunePlan":
        """Make a plan from `to_json`'s dict."""
        return cls({name: tuple(units) for name, units in value["keep"].items()})


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
