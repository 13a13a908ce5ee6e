"""A plan applied: smaller for real, or masked, which it must be equal to."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from calib_data.errors import ModelError
from compress.blocks import Group, find_groups, input_columns, query_groups
from compress.checkpoint import Checkpoint
from compress.depth import keep_layers, skip_layers_
from compress.plan import PrunePlan, check_plan, kept_queries
from compress.sentence import SentenceEncoder, narrowed
from compress.stacks import droppable_stacks
from compress.surgery import HIDDEN, keep_units_
from compress.width import keep_channels_, mask_channels_

_ROUNDING = 1e-3  # of an output's largest value: far more than rounding, far less than a mistake


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
        keep = plan.keep.get(group.key, range(group.units))
        structure |= _cut_(pruned.backbone, group, keep)
        queries = f"{group.name}.queries"
        if group.kind == "heads" and queries in structure:  # they go along
            structure[queries] = structure[queries] * len(keep) // group.units
    # renumbered by what the removed key/value heads leave
    whole = {group.key: group for group in query_groups(checkpoint.backbone)}
    for group in query_groups(pruned.backbone):
        if group.key in plan.keep:
            stay = kept_queries(whole[group.key], plan.keep[group.key], plan)
            structure |= _cut_(pruned.backbone, group, stay)
    pruned = replace(pruned, structure=structure)
    if plan.hidden is not None and len(plan.hidden) < (pruned.hidden_size or 0):
        pruned = _keep_channels(pruned, plan.hidden)
    stacks = droppable_stacks(checkpoint.backbone) if plan.layers else {}
    fewer = {s: kept for s, kept in plan.layers.items() if len(kept) < len(stacks[s])}
    pruned = keep_layers(pruned, fewer) if fewer else pruned
    if plan.hidden is not None or checkpoint.factory:
        _check_equal(pruned, checkpoint, plan)
    return pruned


def mask_units_(model: nn.Module, plan: PrunePlan) -> None:
    """Silence what `plan` removes, without changing a shape: the reference for pruning.

    Heads and neurons hand nothing on; layers hand on what they are given; channels of the residual
    stream are zero, and norms take their statistics over the others (see `width`).
    """
    check_plan(plan, model)
    for group in (*find_groups(model), *query_groups(model)):
        removed = set(range(group.units)) - set(plan.keep.get(group.key, range(group.units)))
        down: Any = model.get_submodule(group.down)
        columns = input_columns(down, down.weight.data)
        for unit in removed:  # (outputs, units, width of a unit)
            columns.unflatten(1, (group.units, -1))[:, unit] = 0
    skip_layers_(model, plan.layers)
    if plan.hidden is not None:
        mask_channels_(model, plan.hidden)


def _keep_channels(checkpoint: Checkpoint, keep: Sequence[int]) -> Checkpoint:
    """Return `checkpoint`, changed in place, with these channels of the residual stream."""
    keep_channels_(checkpoint.backbone, keep)
    module = checkpoint.module
    if isinstance(module, SentenceEncoder):
        module = narrowed(module, module.backbone, keep).eval()
    structure = {**checkpoint.structure, HIDDEN: len(keep)}
    return replace(checkpoint, module=module, structure=structure)


def _cut_(model: nn.Module, group: Group, keep: Sequence[int]) -> dict[str, Any]:
    """Cut `group` down to `keep`; return what the structure then records of it."""
    if len(keep) == group.units:
        return {}
    keep_units_(model, group, keep)
    return {group.key: len(keep)}


def _check_equal(pruned: Checkpoint, checkpoint: Checkpoint, plan: PrunePlan) -> None:
    """Raise `ModelError` unless `pruned` computes what `checkpoint` does, masked by `plan`.

    What a user's own module describes is taken on trust, and a forward pass may read a hidden size
    off anything; so both are tried, on a sample that is made up.
    """
    masked = replace(checkpoint, module=copy.deepcopy(checkpoint.module))
    mask_units_(masked.backbone, plan)
    sample = checkpoint.signature.sample(
        batch=2, sequence=min(8, checkpoint.signature.longest or 8)
    )
    kind = type(checkpoint.backbone).__name__
    cure = "correct its description, or leave out of the plan what it cannot lose"
    try:
        found = pruned.predict(sample)
    except Exception as error:  # of shapes that do not go together: no common type
        reason = " ".join(str(error).split())[:160]
        raise ModelError(
            f"{kind} cannot run without what the plan removes ({reason}); {cure}"
        ) from error
    for name, expected in masked.predict(sample).items():
        for axis, (before, after) in enumerate(zip(expected.shape, found[name].shape)):
            if before != after and plan.hidden is not None:
                expected = expected.take(plan.hidden, axis=axis)
        off = float(
            np.abs(found[name] - expected).max() / max(float(np.abs(expected).max()), 1e-30)
        )
        if not off < _ROUNDING:
            raise ModelError(
                f"{kind} without what the plan removes gives another {name} than with it silenced "
                f"(off by {off:.1%} of the largest value); {cure}"
            )
