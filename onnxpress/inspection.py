"""What `compress inspect` tells of a checkpoint."""

from typing import Any

from calib_data.errors import ModelError
from compress.blocks import find_groups
from compress.checkpoint import Checkpoint, parameter_count, weights_of
from compress.quantize import float_layers
from compress.sparsity import zero_share


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
        "quantization": _quantization(checkpoint),
        "zeros": zero_share(checkpoint) if checkpoint.sparse else 0.0,
        "adapter": (checkpoint.adapters or {}).get("method"),
        "layers": _layers(checkpoint),
        "lineage": [dict(stage) for stage in checkpoint.lineage],
    }


def _quantization(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return scheme, settings, what stayed float and what calibrated; None for a float model."""
    if not checkpoint.quantization:
        return None
    stages = [stage for stage in checkpoint.lineage if stage["stage"] == "quantize"]
    stage = stages[-1] if stages else {}
    metrics = stage.get("metrics") or {}
    layout = {k: v for k, v in checkpoint.quantization.items() if k not in ("scheme", "modules")}
    settings = {k: v for k, v in (stage.get("settings") or {}).items() if k != "scheme"}
    return {
        "scheme": checkpoint.quantization["scheme"],
        "settings": {**settings, **layout},
        "modules": list(checkpoint.quantization.get("modules") or ()),
        "float": float_layers(checkpoint),
        "kept_float": list(metrics.get("kept_float", ())),  # for the sake of a budget
        "calibration": stage.get("data"),
        "calibration_samples": metrics.get("calibration_samples"),
        "batch_drift": metrics.get("batch_drift"),
        "padding_drift": metrics.get("padding_drift"),
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
