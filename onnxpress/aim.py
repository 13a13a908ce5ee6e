"""From a target to a plan: allocate, export, measure, correct."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from calib_data.errors import ConfigError
from onnxpress.target import MB, Target

if TYPE_CHECKING:
    from benchmarks.yardstick import Timed, Yardstick
    from compress.allocate import Cost, Limits
    from compress.checkpoint import Checkpoint
    from compress.plan import PrunePlan
    from compress.prune import Study

_CLOSE = 0.03  # of the time asked for: nearer than that, nothing is corrected
_HELD = 0.07  # farther than that, the command says so
_CORRECTIONS = 3

Tell = Callable[[str], None]


class Aim:
    """A target for the pruned forms of `source`. Use as a context manager."""

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
        hidden: "tuple[int, ...] | None" = None,
        tell: Tell = lambda what: None,
    ) -> "tuple[PrunePlan, dict[str, Any]]":
        """Return the plan for `checkpoint` that meets the target, and what there is to tell of it.

        Of the way that is left from it to the target `share` is to be covered now, counted in ratios.
        `hidden` are channels that stay in any case.
        Raises `ConfigError` for a target that cannot be reached, with the largest that can.
        """
        from compress.apply_plan import apply_plan
        from compress.plan import PrunePlan

        narrow = checkpoint
        if hidden is not None:
            narrow = apply_plan(checkpoint, PrunePlan({}, hidden=hidden))
        search = _Search(self, checkpoint, narrow, found, limits, share, hidden, tell)
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
    hidden: "tuple[int, ...] | None"
    tell: Tell

    def by_size(self) -> "tuple[PrunePlan, dict[str, Any]]":
        """Weights are counted, not measured: the first plan is right."""
        from compress.apply_plan import apply_plan
        from compress.byte_cost import byte_cost, weight_bytes

        asked = MB * (self.aim.target.size or 0.0)
        whole = weight_bytes(self.aim.source.backbone)
        cost = byte_cost(self.narrow.backbone)
        if asked >= whole:
            raise ConfigError(
                f"--size {asked / MB:g} is no less than the model's {whole / MB:.3g} MB"
            )
        least = self._lowest(cost)
        before = weight_bytes(self.checkpoint.backbone) / whole
        wanted = self._wanted(asked / whole, before) * whole
        if wanted < least:
            raise ConfigError(
                f"--size {asked / MB:g} cannot be reached: {least / MB:.3g} MB are left {self._left()}"
            )
        plan = self._allocate(cost, wanted)
        made = weight_bytes(apply_plan(self.checkpoint, plan).backbone)
        return plan, {
            "asked": {"size": asked / MB},
            "megabytes": made / MB,
            "megabytes_before": whole / MB,
            "relative": made / whole,
            "held": made <= wanted * (1 + _HELD),
        }

    def by_time(self, yardstick: "Yardstick") -> "tuple[PrunePlan, dict[str, Any]]":
        """Choose by the table, time the finished graph, correct the budget by what was off."""
        from benchmarks.latency_table import latency_table
        from compress.apply_plan import apply_plan

        table = latency_table(self.narrow, yardstick, self.aim.target.tables, self.tell)
        cost = table.cost(self.narrow.backbone)
        least = self._lowest(cost)
        source = table.milliseconds / table.relative  # of one call, by the table
        wanted = self._wanted(self._ratio(source), table.relative)
        asked = " ".join(f"--{k} {v:g}" for k, v in self.aim.target.given.items())
        if wanted > table.relative * (1 + _HELD):  # not where a round before went a little too far
            raise ConfigError(
                f"{asked}: the graph is {1 / table.relative:.2f} × as fast, "
                f"{table.milliseconds:.3g} ms a call, with all there is of it; ask for more"
            )
        if wanted * source < least:
            raise ConfigError(
                f"{asked} cannot be reached: the graph is {source / least:.2f} × as fast, "
                f"{least:.3g} ms a call, {self._left()}"
            )
        budget = min(wanted * source, table.milliseconds)
        tried: list[tuple[PrunePlan, Timed, float]] = []
        while len(tried) <= _CORRECTIONS:
            plan = self._allocate(cost, budget)
            if any(plan == earlier for earlier, _, _ in tried):
                break
            timed = yardstick.time({"pruned": apply_plan(self.checkpoint, plan)}, self.tell)[
                "pruned"
            ]
            wanted = self._wanted(self._ratio(timed.reference_milliseconds), table.relative)
            tried.append((plan, timed, timed.relative / wanted - 1))
            if abs(tried[-1][2]) <= _CLOSE:
                break
            budget += (wanted - timed.relative) * source
            budget = min(max(budget, least), table.milliseconds)
        plan, timed, off = min(tried, key=lambda each: abs(each[2]))
        return plan, {
            "asked": self.aim.target.given,
            "speedup": timed.speedup,
            "interval": [1 / timed.interval[1], 1 / timed.interval[0]],
            "milliseconds": timed.milliseconds,
            "milliseconds_before": timed.reference_milliseconds,
            "relative": timed.relative,
            "table": table.digest,
            "attempts": [each.speedup for _, each, _ in tried],
            "held": abs(off) <= _HELD,
            **(
                {}
                if abs(off) <= _HELD
                else {"note": self._why_not(timed, wanted, budget <= least and off > 0)}
            ),
        }

    def _ratio(self, source: float) -> float:
        """Return the time asked for as a share of the source's, which is `source` milliseconds."""
        target = self.aim.target
        if target.latency is None:
            return 1 / (target.speedup or 1.0)
        return target.latency / source

    def _wanted(self, ratio: float, before: float) -> float:
        """Return how the result of this round is to compare with the source, `before` being now."""
        return float(before * (ratio / before) ** self.share)

    def _lowest(self, cost: "Cost") -> float:
        from compress.allocate import lowest

        return lowest(self.found.groups, cost, self.limits, self.found.layers)

    def _allocate(self, cost: "Cost", budget: float) -> "PrunePlan":
        from compress.allocate import allocate

        plan = allocate(
            self.found.groups, self.found.units, cost, budget, self.limits, self.found.layers
        )
        return replace(plan, hidden=self.hidden)

    def _left(self) -> str:
        """Return what stays in any case, for a message."""
        least = self.limits.minimum
        neurons = self.limits.least("neurons")
        text = f"with {least.get('heads', 1)} heads and {neurons} neurons in every layer"
        if self.aim.target.whole_layers:
            return f"{text} of one layer; ask for less"
        return f"{text}; ask for less, or add --whole-layers"

    def _why_not(self, timed: "Timed", wanted: float, exhausted: bool) -> str:
        low, high = timed.interval
        if low <= wanted <= high:
            why = (
                f"the times of its rounds vary from {low / wanted:.2f} to {high / wanted:.2f} of those "
                "asked for: something else is at work on this machine"
            )
        elif exhausted:
            why = f"nothing more can go {self._left()}"
        else:
            why = "sizes in between are not to be had: heads and steps of --round-to are too coarse"
        return f"{timed.speedup:.2f} × where {1 / wanted:.2f} × was aimed at: {why}"
