"""How fast or how small a pruned model is to be."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib_data.errors import ConfigError

if TYPE_CHECKING:
    from benchmarks.yardstick import Conditions

MB = 1e6
SHAPE = "8x128"


@dataclass(frozen=True)
class Target:
    """How fast or how small the result is to be, and where that is measured. One of three is given."""

    speedup: float | None = None
    latency: float | None = None  # milliseconds of one call
    size: float | None = None  # MB of weights
    settings: Mapping[str, Any] = field(default_factory=dict)  # of benchmarks' `Conditions`
    tables: Path | None = None  # folder of latency tables; None: the user's cache
    whole_layers: bool = False  # whether layers may go, too

    def __post_init__(self) -> None:
        if len(self.given) != 1:
            raise ConfigError("name one of --speedup, --latency and --size")
        name, value = next(iter(self.given.items()))
        least = 1 if name == "speedup" else 0
        if not least < value < float("inf"):
            raise ConfigError(f"--{name} must be above {least}, got {value:g}")
        if self.size is not None and self.settings.get("scheme"):
            raise ConfigError("--scheme says how graphs are timed, --size counts float weights")
        if self.speedup is None and self.settings.get("over", "graph") != "graph":
            raise ConfigError("--over says what --speedup is over; add that")
        if self.latency is not None and len(self.settings.get("shapes", "1")) > 1:
            raise ConfigError("--latency is of one shape; name one, or use --speedup")

    @property
    def given(self) -> dict[str, float]:
        """What is asked for, by the option's name."""
        asked = {"speedup": self.speedup, "latency": self.latency, "size": self.size}
        return {name: value for name, value in asked.items() if value is not None}

    def conditions(self) -> "Conditions":
        """Return what graphs are timed on."""
        from benchmarks.yardstick import Conditions

        return Conditions.from_json(dict(self.settings))

    def to_json(self) -> dict[str, Any]:
        """Return what the result depends on, for the lineage."""
        asked = {**self.given, "whole_layers": self.whole_layers}
        if self.size is not None:
            return asked
        return {**asked, "conditions": self.conditions().to_json()}


def target_of(settings: Mapping[str, Any]) -> Target | None:
    """Return the target that options and recipes name, None where none is.

    Raises `ConfigError` for what goes with a target and stands without one.
    """
    asked = {name: settings.get(name) for name in ("speedup", "latency", "size")}
    if all(value is None for value in asked.values()):
        for name in ("tables", "whole_layers", "scheme", "over"):
            if settings.get(name):
                option = name.replace("_", "-")
                raise ConfigError(f"--{option} goes with --speedup, --latency or --size; add one")
        return None
    measured = {
        "provider": settings.get("provider", "cpu"),
        "shapes": parse_shapes(settings.get("shape") or SHAPE, "--shape"),
        "threads": settings.get("threads"),
        "scheme": settings.get("scheme"),
        "over": settings.get("over") or "graph",
    }
    tables = settings.get("tables")
    folder = None if tables is None else Path(tables)
    return Target(
        **asked, settings=measured, tables=folder, whole_layers=bool(settings.get("whole_layers"))
    )


def parse_shapes(text: str, option: str = "--shapes") -> tuple[tuple[int, int], ...]:
    """Return the (batch, length) pairs of a text like 1x32,8x128."""
    shapes = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*[x×]\s*(\d+)\s*", part)
        if not found:
            raise ConfigError(f"{option} wants batch x length, as in 1x32,8x128, got {part!r}")
        shapes.append((int(found[1]), int(found[2])))
    return tuple(shapes)
