"""A plan applied: smaller for real, or masked, which it must be equal to."""

import copy
from dataclasses import replace

from torch import nn

from compress.blocks import find_groups
from compress.checkpoint import Checkpoint
from compress.plan import PrunePlan, check_plan
from compress.surgery import keep_units_


def apply_plan(checkpoint: Checkpoint, plan: PrunePlan) -> Checkpoint:
    """Return a copy of `checkpoint` that keeps only the units in `plan`."""
    groups = find_groups(checkpoint.backbone)
    check_plan(plan, groups)
    pruned = replace(checkpoint, module=copy.deepcopy(checkpoint.module))
    structure = dict(checkpoint.structure)
    for group in groups:
        if group.key in plan.keep and len(plan.keep[group.key]) < group.units:
            keep_units_(pruned.backbone, group, plan.keep[group.key])
            structure[group.key] = len(plan.keep[group.key])
    return replace(pruned, structure=structure)


def mask_units_(model: nn.Module, plan: PrunePlan) -> None:
    """Silence the units that `plan` removes, without changing a shape: pruning's reference."""
    for group in find_groups(model):
        keep = set(plan.keep.get(group.key, range(group.units)))
        down = model.get_submodule(group.down)
        width = next(part.width for part in group.parts if part.module == group.down)
        for unit in set(range(group.units)) - keep:
            rows: slice = slice(unit * width, (unit + 1) * width)
            weight = down.weight.data
            columns = weight[:, rows] if isinstance(down, nn.Linear) else weight[rows]  # type: ignore[index]
            columns.zero_()
