"""What `compress inspect` tells of a checkpoint."""

from typing import Any

from calib_data.errors import ModelError
from compress.blocks import find_groups
from compress.checkpoint import Checkpoint, parameter_count, weights_of


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return a JSON-able description: size, signature, units kept per layer, lineage."""
    return {
        "task": checkpoint.task,
        "class": type(checkpoint.backbone).__name__,
        "parameters": parameter_count(checkpoint.backbone),
        "bytes": sum(
            value.numel() * value.element_size()
            for value in weights_of(checkpoint.backbone).values()
        ),
        "inputs": list(checkpoint.signature.names),
        "outputs": list(checkpoint.signature.outputs),
        "max_length": checkpoint.max_length,
        "int8_modules": len((checkpoint.quantization or {}).get("modules", ())),
        "adapter": (checkpoint.adapters or {}).get("method"),
        "layers": _layers(checkpoint),
        "lineage": [dict(stage) for stage in checkpoint.lineage],
    }


def _layers(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    """Return units kept and units before pruning by group; empty where no block is found."""
    try:
        groups = find_groups(checkpoint.backbone)
    except ModelError:
        return {}
    # the groups of one kind start alike, so the largest count any layer keeps bounds the original;
    # what pruning recorded is exact
    before: dict[str, int] = {}
    for stage in checkpoint.lineage:
        for name, units in (stage.get("units") or {}).items():
            before.setdefault(name, units)
    return {
        group.key: {"kept": group.units, "units": before.get(group.key, group.units)}
        for group in groups
    }
