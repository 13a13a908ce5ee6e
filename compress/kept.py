"""What a model has kept of every layer it once had, told from what each pruning recorded."""

from collections.abc import Mapping
from typing import Any

from calib_data.errors import ModelError
from compress.blocks import find_groups, query_groups
from compress.checkpoint import Checkpoint
from compress.plan import PrunePlan
from compress.resize import original_name
from compress.stacks import droppable_stacks


def plan_record(checkpoint: Checkpoint, plan: PrunePlan) -> dict[str, Any]:
    """Return what the lineage holds of `plan`, applied to `checkpoint`: sizes before, layers kept."""
    model = checkpoint.backbone
    groups = find_groups(model) + tuple(g for g in query_groups(model) if g.key in plan.keep)
    record: dict[str, Any] = {"units": {group.key: group.units for group in groups}}
    stacks = droppable_stacks(model) if plan.layers else {}
    if plan.layers:
        record["layers"] = {
            stack: {"kept": list(kept), "of": len(stacks[stack])}
            for stack, kept in plan.layers.items()
        }
    if plan.hidden is not None:
        record["hidden"] = {"kept": len(plan.hidden), "of": checkpoint.hidden_size}
    return record


def kept_layers(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Return, by stack that layers were dropped from, which are `kept` and how many it is `of`."""
    found: dict[str, dict[str, Any]] = {}
    for stage in checkpoint.lineage:
        for stack, row in (stage.get("layers") or {}).items():
            if row["of"] == len(row["kept"]):
                continue
            before = found.get(stack, {"kept": range(row["of"]), "of": row["of"]})
            kept = [before["kept"][layer] for layer in row["kept"]]
            found[stack] = {"kept": kept, "of": before["of"]}
    return found


def layers_left(original: Checkpoint, pruned: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Return, by stack that layers were dropped from since `original`, which of its layers are left.

    Raises `ModelError` where `pruned` has layers that the other has not: it was made of another one.
    """
    known = {stack: list(row["kept"]) for stack, row in kept_layers(original).items()}
    found = {}
    for stack, row in kept_layers(pruned).items():
        before = known.get(stack, list(range(row["of"])))
        if not set(row["kept"]) <= set(before):
            raise ModelError(
                f"layers {row['kept']} of the first model are left, of the original only {before}: "
                "name a model that this one was pruned from"
            )
        if len(row["kept"]) < len(before):
            found[stack] = tuple(before.index(layer) for layer in row["kept"])
    return found


def kept_units(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    """Return the units `kept` and the `units` before by group, 0 in the layers that were dropped.

    The groups have the names that they had in the model before any pruning, and their order.
    """
    before = _units_before(checkpoint)
    stacks = {stack: row["kept"] for stack, row in kept_layers(checkpoint).items()}
    model: Any = checkpoint.backbone
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    kept = {}
    for group in (*find_groups(model), *query_groups(model)):
        # under a task's head, names are longer than when it was pruned
        names = (group.key, group.key.removeprefix(prefix))
        name = next((n for key in names if (n := original_name(key, stacks)) in before), group.key)
        if group.kind != "queries" or name in before:
            kept[name] = group.units
    # a group that has no units to choose among any more is found no longer, but its count is recorded
    for key, count in checkpoint.structure.items():
        if isinstance(count, int) and original_name(key, stacks) in before:
            kept.setdefault(original_name(key, stacks), count)
    return {
        name: {"kept": kept.get(name, 0), "units": before.get(name, kept.get(name, 0))}
        for name in (*before, *(name for name in kept if name not in before))
    }


def _units_before(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the units that each group had when it was first pruned, by its name at the first time."""
    before: dict[str, int] = {}
    stacks: dict[str, Any] = {}
    for stage in checkpoint.lineage:
        for key, units in (stage.get("units") or {}).items():
            before.setdefault(original_name(key, stacks), units)
        layers: Mapping[str, Any] = stage.get("layers") or {}
        for stack, row in layers.items():
            known = stacks.get(stack, range(row["of"]))
            stacks[stack] = [known[layer] for layer in row["kept"]]
    return before
