"""The pruning stage: importance → plan → surgery."""

from collections.abc import Callable
from dataclasses import dataclass

from calib_data.batches import Batches
from calib_data.errors import ModelError
from compress.adapters import refuse_adapters
from compress.apply_plan import apply_plan
from compress.blocks import find_groups, locked_attentions
from compress.checkpoint import Checkpoint, StageResult, parameter_count, weights_sha256
from compress.config import StageConfig, require
from compress.importance import gradient_importance
from compress.kept import plan_record
from compress.plan import PrunePlan, plan_removal


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
            **plan_record(checkpoint, plan),
            metrics={k: report[k] for k in ("parameters_before", "parameters_after")},
        ),
        report,
    )
