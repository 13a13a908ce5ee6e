"""What `compress inspect` tells of a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calib_data.errors import DestinationError, ModelError
from compress.checkpoint import Checkpoint, parameter_count, weights_of
from compress.files import destination_errors
from compress.kept import kept_layers, kept_units
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
        "hidden": _hidden(checkpoint),
        "stacks": kept_layers(checkpoint),
        "layers": _layers(checkpoint),
        "lineage": [dict(stage) for stage in checkpoint.lineage],
    }


def draw(found: Mapping[str, Any], path: Path, overwrite: bool = False) -> None:
    """Write a picture of what each layer keeps, as `describe` found it.

    Raises `DestinationError` where the file exists (without `overwrite`) or cannot be written.
    """
    from benchmarks.kept_plot import save_kept_plot

    title = f"{found['class']}, {found['parameters']:,} parameters"
    if found["hidden"]:
        title += f", hidden size {found['hidden']['kept']} of {found['hidden']['units']}"
    if path.exists() and not overwrite:
        raise DestinationError(f"{path} exists; pass --overwrite to replace it")
    with destination_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_kept_plot(found["layers"], title, path)


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
        return kept_units(checkpoint)
    except ModelError:
        return {}


def _hidden(checkpoint: Checkpoint) -> dict[str, int | None] | None:
    """Return the channels kept and those before of the residual stream, where no config tells: None."""
    if checkpoint.hidden_size is None:
        return None
    return {
        "kept": checkpoint.hidden_size,
        "units": getattr(checkpoint.config, "hidden_size", None),
    }
