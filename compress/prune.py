"""The pruning stage: what calibration says, a plan, and the plan carried out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from calib_data.batches import Batches
from calib_data.errors import ConfigError, ModelError
from compress.adapters import refuse_adapters
from compress.allocate import best_units, layer_of, plan_removal, removable_layers
from compress.apply_plan import apply_plan
from compress.blocks import Group, find_groups, locked_attentions
from compress.checkpoint import Checkpoint, StageResult, parameter_count, weights_sha256
from compress.criteria import unit_importance
from compress.kept import plan_record
from compress.moments import Moment, moments
from compress.plan import PrunePlan
from compress.prune_config import PruneConfig
from compress.reconstruct import reconstruct_
from compress.redundancy import stand_in_costs
from compress.stacks import droppable_stacks
from compress.stream_importance import hidden_importance, layer_importance

__all__ = ["PruneConfig", "Study", "carry_out", "fitted_to", "plan_by_shares", "prune", "study"]

Progress = Callable[[], None]


@dataclass(frozen=True)
class Study:
    """What calibration says of a model: the loss of each unit, layer and channel; all add up."""

    groups: tuple[Group, ...]
    units: Mapping[str, Tensor]  # by group's key
    layers: Mapping[str, Tensor]  # by stack; empty unless layers are to be chosen
    hidden: Tensor | None  # None unless channels are to be chosen


def prune(
    checkpoint: Checkpoint,
    batches: Batches,
    config: PruneConfig,
    progress: Progress = lambda: None,
    plan: PrunePlan | None = None,
) -> StageResult:
    """Return the checkpoint without what matters least, or with what `plan` keeps; smaller for real.

    The input is untouched. The report holds what every layer keeps, and the parameters before and
    after. Raises `ModelError` for a quantized checkpoint or one without blocks to prune, and for a
    sparse one where `config` says to reconstruct.
    """
    refuse_pruning(checkpoint, config.reconstruct)
    seen = fitted_to(checkpoint, batches, config, progress)
    if plan is None:
        found = study(checkpoint, batches, config, seen, progress)
        plan = plan_by_shares(checkpoint, found, config)
    return carry_out(checkpoint, plan, config, batches, seen)


def refuse_pruning(checkpoint: Checkpoint, reconstruct: bool) -> None:
    """Raise `ModelError` for a checkpoint whose weights cannot be cut, or not fitted afterwards."""
    if checkpoint.quantization:
        raise ModelError("this checkpoint is quantized already; prune first, then quantize")
    refuse_adapters(checkpoint, "prune")
    if checkpoint.sparse and reconstruct:
        raise ModelError(
            "reconstruction fills the zeros of a sparse model; prune before --sparsity, or pass "
            "--no-reconstruct"
        )


def fitted_to(
    checkpoint: Checkpoint,
    batches: Batches | None,
    config: PruneConfig,
    progress: Progress = lambda: None,
) -> Mapping[str, Moment] | None:
    """Return what reconstruction fits to, by group; None where there is none. It computes when asked."""
    if batches is None or not config.reconstruct:
        return None
    return moments(checkpoint, find_groups(checkpoint.backbone), batches, progress)


def study(
    checkpoint: Checkpoint,
    batches: Batches,
    config: PruneConfig,
    seen: Mapping[str, Moment] | None,
    progress: Progress = lambda: None,
    *,
    units: bool | None = None,
    layers: bool | None = None,
) -> Study:
    """Return what calibration says of all that `config` has to choose among.

    With `seen`, which `fitted_to` gives, units count by what reconstruction will leave of their loss;
    those chosen by chance do not.
    `units` and `layers` say whether those are to be chosen where it is not the shares that tell.
    Raises `ModelError` for heads that are to go and cannot.
    """
    locked = list(locked_attentions(checkpoint.backbone))
    if config.heads and locked:
        raise ModelError(
            f"{locked[0]} shares a bias per head with other layers, so its heads cannot be removed "
            "one layer at a time; pass --heads 0"
        )
    groups = find_groups(checkpoint.backbone)
    wants_units = bool(config.heads or config.ffn) if units is None else units
    found = {}
    if wants_units:
        found = unit_importance(
            checkpoint, groups, batches, config.criterion, config.seed, progress
        )
        if seen is not None and config.criterion != "random":
            found = stand_in_costs(checkpoint, groups, found, seen)
    stacks = droppable_stacks(checkpoint.backbone)
    by_layer, channels = {}, None
    if bool(config.layers) if layers is None else layers:
        by_layer = layer_importance(checkpoint, stacks, batches, progress)
    if config.hidden is not None:
        channels = hidden_importance(checkpoint, stacks, batches, config.seed, progress)
    return Study(groups, found, by_layer, channels)


def plan_by_shares(checkpoint: Checkpoint, found: Study, config: PruneConfig) -> PrunePlan:
    """Return the plan that removes the config's shares, losing the least of each."""
    layers = _kept_layers(checkpoint, found, config)
    staying = [group for group in found.groups if _stays(group, layers)]
    heads = plan_removal(staying, found.units, "heads", config.heads, config.limits)
    neurons = plan_removal(staying, found.units, "neurons", config.ffn, config.limits)
    return PrunePlan({**heads.keep, **neurons.keep}, layers, kept_channels(found, config))


def kept_channels(found: Study, config: PruneConfig) -> tuple[int, ...] | None:
    """Return the channels of the residual stream that stay, None where all do."""
    if config.hidden is None or found.hidden is None or config.hidden == len(found.hidden):
        return None
    if config.hidden > len(found.hidden):
        raise ConfigError(
            f"--hidden {config.hidden} is more than the model's {len(found.hidden)} channels"
        )
    return best_units(found.hidden, config.hidden)


def carry_out(
    checkpoint: Checkpoint,
    plan: PrunePlan,
    config: PruneConfig,
    batches: Batches | None,
    seen: Mapping[str, Moment] | None,
    **details: Any,
) -> StageResult:
    """Return the checkpoint cut down to `plan`, what stays fitted to what `fitted_to` has `seen`.

    `details` go into the lineage, and the fingerprint of `batches`.
    """
    groups = find_groups(checkpoint.backbone)
    pruned = apply_plan(checkpoint, plan)
    fitted: dict[str, dict[str, float]] = {}
    if seen is not None and plan.keep:
        fits = reconstruct_(pruned, checkpoint, plan, seen)
        fitted = {key: {"before": fit.before, "after": fit.after} for key, fit in fits.items()}
    report = {
        "parameters_before": parameter_count(checkpoint.backbone),
        "parameters_after": parameter_count(pruned.backbone),
        "layers": {
            group.key: {"units": group.units, "kept": _kept(group, plan)} for group in groups
        },
        "plan": plan.to_json(),
        **({"reconstruction": fitted} if fitted else {}),
    }
    return StageResult(
        pruned.with_stage(
            "prune",
            settings=config.to_json(),
            parent=weights_sha256(checkpoint.backbone),
            data=None if batches is None else batches.fingerprint,
            **plan_record(checkpoint, plan),
            plan=plan.to_json(),
            **details,
            metrics={k: report[k] for k in ("parameters_before", "parameters_after")},
        ),
        report,
    )


def _kept_layers(
    checkpoint: Checkpoint, found: Study, config: PruneConfig
) -> dict[str, tuple[int, ...]]:
    stacks = droppable_stacks(checkpoint.backbone)
    if (config.layers or config.keep_layers) and not stacks:
        raise ModelError(
            f"{type(checkpoint.backbone).__name__} has no list of layers as long as its config says, "
            "so none can be dropped; it may share one layer's weights among all"
        )
    if config.keep_layers:
        return dict.fromkeys(stacks, config.keep_layers)
    kept = {}
    for stack, scores in found.layers.items() if config.layers else ():
        count = round(len(scores) * config.layers)
        if count == 0:
            raise ConfigError(
                f"removing {config.layers:.0%} of {len(scores)} layers is less than one; raise --layers"
            )
        gone = {index for _, index in removable_layers({stack: scores})[:count]}
        kept[stack] = tuple(i for i in range(len(scores)) if i not in gone)
    return kept


def _stays(group: Group, layers: Mapping[str, tuple[int, ...]]) -> bool:
    place = layer_of(group, layers)
    return place is None or place[1] in layers[place[0]]


def _kept(group: Group, plan: PrunePlan) -> int:
    """Return how many of the group's units stay, none where its layer goes."""
    return len(plan.keep.get(group.key, range(group.units))) if _stays(group, plan.layers) else 0
