"""From "1.5 times faster" to a plan: allocate, export, measure, correct."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib_data.errors import BudgetError, ConfigError

if TYPE_CHECKING:
    from benchmarks.yardstick import Conditions, Timed, Yardstick
    from compress.allocate import Cost, Limits
    from compress.checkpoint import Checkpoint
    from compress.plan import PrunePlan
    from compress.prune import Study

_CLOSE = 0.03  # of the time asked for: nearer than that, nothing is corrected
_HELD = 0.07  # farther than that, the command says so
_CORRECTIONS = 3
_MB = 1e6

Tell = Callable[[str], None]


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
        given = {n: v for n, v in self.asked.items() if v is not None}
        if len(given) != 1:
            raise ConfigError("name one of --speedup, --latency and --size")
        name, value = next(iter(given.items()))
        least = 1 if name == "speedup" else 0
        if not least < value < float("inf"):
            raise ConfigError(f"--{name} must be above {least}, got {value:g}")
        if self.latency is not None and len(self.settings.get("shapes", "1")) > 1:
            raise ConfigError("--latency is of one shape; name one, or use --speedup")

    @property
    def asked(self) -> dict[str, float | None]:
        """What may be asked for, by the option's name."""
        return {"speedup": self.speedup, "latency": self.latency, "size": self.size}

    def conditions(self) -> "Conditions":
        """Return what graphs are timed on."""
        from benchmarks.yardstick import Conditions

        return Conditions.from_json(dict(self.settings))

    def to_json(self) -> dict[str, Any]:
        """Return what the result depends on, for the lineage."""
        asked = {name: value for name, value in self.asked.items() if value is not None}
        if self.size is not None:
            return {**asked, "whole_layers": self.whole_layers}
        return {
            **asked, "conditions": self.conditions().to_json(), "whole_layers": self.whole_layers
        }  # fmt: skip


class Aim:
    """A target for the pruned forms of one model. Use as a context manager."""

    def __init__(self, source: "Checkpoint", target: Target) -> None:
        self.source, self.target = source, target
        self._stack = ExitStack()
        self._yardstick: Yardstick | None = None

    def __enter__(self) -> "Aim":
        if self.target.size is None:
            from benchmarks.yardstick import Yardstick

            made: AbstractContextManager[Yardstick] = Yardstick(
                self.source, self.target.conditions()
            )
            self._yardstick = self._stack.enter_context(made)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def plan(
        self,
        checkpoint: "Checkpoint",
        found: "Study",
        limits: "Limits",
        share: float = 1.0,
        before: float = 1.0,
        hidden: "tuple[int, ...] | None" = None,
        tell: Tell = lambda what: None,
    ) -> "tuple[PrunePlan, dict[str, Any]]":
        """Return the plan for `checkpoint` that meets the target, and what there is to tell of it.

        `share` of the way is to be covered now, 1 being all of it, counted in ratios; `before` is how
        `checkpoint` compares with the source, in time or bytes. `hidden` are channels that stay in any
        case. Raises `ConfigError` for a target that cannot be reached, with the largest that can.
        """
        from compress.apply_plan import apply_plan
        from compress.plan import PrunePlan

        narrow = checkpoint
        if hidden is not None:
            narrow = apply_plan(checkpoint, PrunePlan({}, hidden=hidden))
        search = _Search(self, checkpoint, narrow, found, limits, share, before, hidden, tell)
        return search.by_size() if self._yardstick is None else search.by_time(self._yardstick)


@dataclass
class _Search:
    """One search for a plan."""

    aim: Aim
    checkpoint: "Checkpoint"
    narrow: "Checkpoint"  # the same with the channels that stay
    found: "Study"
    limits: "Limits"
    share: float
    before: float
    hidden: "tuple[int, ...] | None"
    tell: Tell

    def by_size(self) -> "tuple[PrunePlan, dict[str, Any]]":
        """Weights are counted, not measured: the first plan is right."""
        from compress.apply_plan import apply_plan
        from compress.byte_cost import byte_cost, weight_bytes

        size = self.aim.target.size
        assert size is not None
        whole = weight_bytes(self.aim.source.backbone)
        wanted = whole * (size * _MB / whole) ** self.share
        cost = byte_cost(self.narrow.backbone)
        plan = self._allocate(cost, wanted, lambda least: f"--size {least / _MB:.3g}")
        made = weight_bytes(apply_plan(self.checkpoint, plan).backbone)
        return plan, {
            "asked": {"size": size},
            "megabytes": made / _MB,
            "megabytes_before": whole / _MB,
            "relative": made / whole,
            "held": self.share < 1 or made <= size * _MB * (1 + _HELD),
        }

    def by_time(self, yardstick: "Yardstick") -> "tuple[PrunePlan, dict[str, Any]]":
        """Choose by the table, time the finished graph, correct the budget by what was off."""
        from benchmarks.latency_table import latency_table
        from compress.allocate import lowest
        from compress.apply_plan import apply_plan

        table = latency_table(self.narrow, yardstick, self.aim.target.tables, self.tell)
        cost = table.cost(self.narrow.backbone)
        least = lowest(self._groups(), cost, self.limits, self.found.layers)
        # what the table calls a millisecond, in shares of the source's time
        scale = table.relative / table.milliseconds
        reference = table.milliseconds / table.relative
        wanted = self._wanted(reference)
        budget = wanted / scale
        tried: list[tuple[PrunePlan, Timed, float]] = []
        for _ in range(1 + _CORRECTIONS):
            plan = self._allocate(cost, budget, lambda low: _reachable(self, low * scale, reference))
            if any(plan == earlier for earlier, _, _ in tried):
                break
            self.tell("measuring the plan")
            pruned = apply_plan(self.checkpoint, plan)
            timed = yardstick.time({"pruned": pruned}, self.tell)["pruned"]
            wanted = self._wanted(timed.reference_milliseconds)
            tried.append((plan, timed, timed.relative / wanted - 1))
            if abs(tried[-1][2]) <= _CLOSE:
                break
            budget = min(max(budget + (wanted - timed.relative) / scale, least), table.milliseconds)
        plan, timed, off = min(tried, key=lambda each: abs(each[2]))
        return plan, {
            "asked": {k: v for k, v in self.aim.target.asked.items() if v is not None},
            "speedup": timed.speedup,
            "interval": [1 / timed.interval[1], 1 / timed.interval[0]],
            "milliseconds": timed.milliseconds,
            "milliseconds_before": timed.reference_milliseconds,
            "relative": timed.relative,
            "table": table.digest,
            "attempts": [each.speedup for _, each, _ in tried],
            "held": abs(off) <= _HELD,
            **({} if abs(off) <= _HELD else {"note": _why_not(timed, wanted, budget <= least)}),
        }
