"""Shares to remove in one of several rounds, which together remove the whole share."""

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress.checkpoint import Checkpoint
    from compress.prune_config import PruneConfig


def next_shares(
    config: "PruneConfig", source: "Checkpoint", current: "Checkpoint", progress: float
) -> "PruneConfig":
    """Return the settings that take `current` as far as `progress` of the way from `source`.

    1 is all of the way, counted in ratios: half of the way to a quarter is a half. What is less than a
    step is left to a later round; layers that are named go in the first.
    """
    from compress.blocks import find_groups
    from compress.stacks import droppable_stacks

    changes: dict[str, object] = {}
    steps = config.limits.steps
    for kind, option in (("heads", "heads"), ("neurons", "ffn")):
        before, now = (
            [g.units for g in find_groups(each.backbone) if g.kind == kind]
            for each in (source, current)
        )
        asked = getattr(config, option)
        if asked and before:
            # by block: layers that went took theirs with them
            wanted = sum(before) / len(before) * (1 - asked) ** progress
            share = max(0.0, 1 - wanted * len(now) / sum(now))
            step = steps.get(kind, 1)  # type: ignore[call-overload]
            changes[option] = share if round(sum(now) * share / step) else 0.0
    depths = [
        {name: len(stack) for name, stack in droppable_stacks(each.backbone).items()}
        for each in (source, current)
    ]
    if config.layers and depths[0]:
        name = max(depths[0], key=lambda n: depths[0][n])
        share = max(0.0, 1 - depths[0][name] * (1 - config.layers) ** progress / depths[1][name])
        changes["layers"] = share if round(depths[1][name] * share) else 0.0
    if config.keep_layers and depths[0] != depths[1]:
        changes["keep_layers"] = ()
    if config.hidden is not None:
        whole = int(source.config.hidden_size)
        wide = whole * (config.hidden / whole) ** progress
        steps_of = config.round_to
        changes["hidden"] = (
            config.hidden
            if progress == 1
            else max(config.hidden, round(wide / steps_of) * steps_of)
        )
    return replace(config, **changes)  # type: ignore[arg-type]
