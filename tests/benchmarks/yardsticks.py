"""A yardstick that counts instead of timing: what is asked of it takes what a formula says."""

from collections.abc import Callable, Mapping
from typing import Any, Self

from benchmarks.yardstick import Conditions, Timed
from compress.blocks import find_groups
from compress.checkpoint import Checkpoint
from compress.stacks import droppable_stacks

PER_UNIT = {"heads": 2.0, "neurons": 0.25}
LAYER, FIXED = 3.0, 5.0


def milliseconds(checkpoint: Checkpoint) -> float:
    """Return what a call takes: linear in heads, neurons and layers."""
    spent = sum(PER_UNIT[g.kind] * g.units for g in find_groups(checkpoint.backbone))
    layers = sum(len(stack) for stack in droppable_stacks(checkpoint.backbone).values())
    return FIXED + LAYER * layers + spent


class CountingYardstick:
    """Stands in for `Yardstick`; `real` turns what the formula says into what is measured."""

    real: Callable[[float], float] = staticmethod(lambda relative: relative)
    noise = 0.0

    def __init__(self, reference: Checkpoint, conditions: Conditions) -> None:
        self.reference, self.conditions = reference, conditions
        self.asked: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def time(self, checkpoints: Mapping[str, Checkpoint], progress: Any = None) -> dict[str, Timed]:
        """Return what each would take."""
        whole = milliseconds(self.reference)
        self.asked += checkpoints
        found = {}
        for name, checkpoint in checkpoints.items():
            relative = type(self).real(milliseconds(checkpoint) / whole)
            interval = (relative - self.noise, relative + self.noise)
            found[name] = Timed(relative, interval, relative * whole, whole)
        return found
