"""A plan applied: smaller for real, or masked, which it must be equal to."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from compress.blocks import Group, find_groups, input_columns, query_groups
from compress.checkpoint import Checkpoint
from compress.depth import keep_layers, skip_layers_
from compress.plan import PrunePlan, check_plan, kept_queries
from compress.stacks import droppable_stacks
from compress.surgery import keep_units_


def apply_plan(checkpoint: Checkpoint, plan: PrunePlan) -> Checkpoint:
    """Return a copy of `checkpoint` that keeps only what `plan` says.

    Its structure records what the config does not tell, by the new numbers of the layers. Raises
    `ConfigError` for a plan that does not fit the model, `ModelError` for a model that cannot lose
    what the plan takes.
    """
    check_plan(plan, checkpoint.backbone)
    pruned = replace(checkpoint, module=copy.deepcopy(checkpoint.module))
    structure = dict(checkpoint.structure)
    for group in find_groups(pruned.backbone):
        structure |= _cut_(pruned.backbone, group, plan.keep.get(group.key, range(group.units)))
    # renumbered by what the removed key/value heads leave
    whole = {group.key: group for group in query_groups(checkpoint.backbone)}
    for group in query_groups(pruned.backbone):
        if group.key in plan.keep:
            keep = kept_queries(whole[group.key], plan.keep[group.key], plan)
            structure |= _cut_(pruned.backbone, group, keep)
    pruned = replace(pruned, structure=structure)
    stacks = droppable_stacks(checkpoint.backbone) if plan.layers else {}
    fewer = {s: kept for s, kept in plan.layers.items() if len(kept) < len(stacks[s])}
    return keep_layers(pruned, fewer) if fewer else pruned


def mask_units_(model: nn.Module, plan: PrunePlan) -> None:
    """Silence what `plan` removes, without changing a shape: the reference for pruning.

    Heads and neurons hand nothing on; layers hand on what they are given.
    """
    check_plan(plan, model)
    for group in (*find_groups(model), *query_groups(model)):
        removed = set(range(group.units)) - set(plan.keep.get(group.key, range(group.units)))
        down: Any = model.get_submodule(group.down)
        columns = input_columns(down, down.weight.data)
        for unit in removed:  # (outputs, units, width of a unit)
            columns.unflatten(1, (group.units, -1))[:, unit] = 0
    skip_layers_(model, plan.layers)


def _cut_(model: nn.Module, group: Group, keep: Sequence[int]) -> dict[str, Any]:
    """Cut `group` down to `keep`; return what the structure then records of it."""
    if len(keep) == group.units:
        return {}
    keep_units_(model, group, keep)
    return {group.key: len(keep)}
