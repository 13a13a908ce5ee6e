"""The pruning stage: importance → plan → surgery."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from calib_data.batches import Batches
from calib_data.errors import ModelError
from compress.adapters import refuse_adapters
from compress.blocks import find_groups, locked_attentions
from compress.checkpoint import Checkpoint, StageResult, parameter_count, weights_sha256
from compress.config import StageConfig, require
from compress.importance import gradient_importance
from compress.plan import PrunePlan, check_plan, plan_removal
from compress.surgery import keep_units_


@dataclass(frozen=True)
class PruneConfig(StageConfig):
    """How much to remove."""

    heads: float = 0.25  # share of all attention heads, 0 ≤ heads < 1
    ffn: float = 0.25  # share of all feed-forward neurons, 0 ≤ ffn < 1
    round_to: int = 16  # neurons are removed in steps of this many, so that kernels stay full
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("heads", self.heads), ("ffn", self.ffn)):
            require(0 <= value < 1, f"--{name} must be at least 0 and below 1, got {value}")
        require(self.round_to >= 1, f"--round-to must be at least 1, got {self.round_to}")


def prune(
    checkpoint: Checkpoint,
    batches: Batches,
    config: PruneConfig,
    progress: Callable[[], None] = lambda: None,
) -> StageResult:
    """Return the checkpoint without its least important heads and neurons, smaller for real.

    The input is untouched. The report holds what every layer keeps, and the parameters before and
    after. Raises `ModelError` for a quantized checkpoint or one without blocks to prune.
    """
    if checkpoint.quantization:
        raise ModelError("this checkpoint is quantized already; prune first, then quantize")
    refuse_adapters(checkpoint, "prune")
    groups = find_groups(checkpoint.backbone)
    locked = list(locked_attentions(checkpoint.backbone))
    if config.heads and locked:
        raise ModelError(
            f"{locked[0]} shares a bias per head with other layers, so its heads cannot be removed "
            "one layer at a time; pass --heads 0"
        )
    plan = PrunePlan({})
    if config.heads or config.ffn:
        scores = gradient_importance(checkpoint, groups, batches, config.seed, progress)
        heads = plan_removal(groups, scores, "heads", config.heads)
        neurons = plan_removal(groups, scores, "neurons", config.ffn, config.round_to)
        plan = PrunePlan({**heads.keep, **neurons.keep})
    pruned = apply_plan(checkpoint, plan)
    report = {
        "parameters_before": parameter_count(checkpoint.backbone),
        "parameters_after": parameter_count(pruned.backbone),
        "layers": {
            group.key: {"units": group.units, "kept": len(plan.keep.get(group.key, range(group.units)))}
            for group in groups
        },
        "plan": plan.to_json(),
    }  # fmt: skip
    return StageResult(
        pruned.with_stage(
            "prune",
            settings=config.to_json(),
            parent=weights_sha256(checkpoint.backbone),
            data=batches.fingerprint,
            units={group.key: group.units for group in groups},
            metrics={k: report[k] for k in ("parameters_before", "parameters_after")},
        ),
        report,
    )


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
