"""What each stage changed, told by variants of which one was made from the other's model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import statistics
from benchmarks.report import BenchmarkReport, SpeedUp, VariantReport, speedup_of

_WRAPPING = ("export",)  # stages that change no model


@dataclass(frozen=True)
class Step:
    """One variant, and the one measured that is nearest to what it was made from."""

    variant: VariantReport
    parent: VariantReport
    stages: tuple[str, ...]  # that lie between them, in order

    def speedup(self, workload: str) -> SpeedUp | None:
        """Return how many times faster than the parent, round by round."""
        pair = [
            next((x for x in v.latency if x.workload == workload), None)
            for v in (self.variant, self.parent)
        ]
        ours, theirs = pair
        if ours is None or theirs is None or len(ours.rounds) != len(theirs.rounds):
            return None
        ratios = statistics.round_ratios(ours.rounds, theirs.rounds, ours.kind == "traffic")
        return speedup_of(ratios)

    def quality(self, metric: str | None) -> float | None:
        """Return by how much a metric differs from the parent's."""
        pair = [
            next((x.value for x in v.quality if x.metric == metric), None)
            for v in (self.variant, self.parent)
        ]
        ours, theirs = pair
        return None if ours is None or theirs is None else ours - theirs


def steps(report: BenchmarkReport) -> list[Step]:
    """Return a step for every variant whose lineage goes on from another's, in the report's order.

    The baseline counts as the model that all begin from, where its lineage is the beginning of theirs.
    """
    measured = [variant for variant in report.variants if variant.status == "ok"]
    chains = {variant.name: _chain(variant.lineage) for variant in measured}
    found = []
    for variant in measured:
        own = chains[variant.name]
        parents = [
            other
            for other in measured
            if other is not variant
            and _begins(own, chains[other.name])
            and (len(chains[other.name]) < len(own) or other.name == report.baseline)
        ]
        if not parents or variant.name == report.baseline:
            continue
        nearest = max(parents, key=lambda v: (len(chains[v.name]), v.runtime == variant.runtime))
        between = own[len(chains[nearest.name]) :]
        same = "export" if variant.runtime == "onnx" else variant.runtime  # another way to run it
        stages = tuple(str(entry.get("stage")) for entry in between) or (same,)
        found.append(Step(variant, nearest, stages))
    return found


def _chain(lineage: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [entry for entry in lineage if entry.get("stage") not in _WRAPPING]


def _begins(lineage: Sequence[Mapping[str, Any]], start: Sequence[Mapping[str, Any]]) -> bool:
    return bool(start) and list(lineage[: len(start)]) == list(start)
