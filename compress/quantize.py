"""The quantize stage: linear layers and embedding tables become small ones, decided in PyTorch.

Statistics → preparation → replacement: `prepare` sees the calibration data and moves outliers,
`quantize_only` replaces the layers named, `quantize` does both.
"""

import copy
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calib_data.errors import ConfigError, DataError, ModelError
from compress.adapters import refuse_adapters
from compress.blocks import features
from compress.calibration import Calibration, CalibrationData, InputStats, calibrate
from compress.checkpoint import Checkpoint, StageResult, weights_sha256
from compress.int8 import DynamicInt8Linear, Int8Embedding
from compress.packed_embedding import PackedEmbedding, block_size
from compress.patches import (
    fold_float_patches_,
    is_over_patches,
    shown_names,
    unfold_patches_,
)
from compress.patterns import check_pattern
from compress.quantize_config import (
    EMBEDDING_BITS,
    EMBEDDING_BLOCK_SIZES,
    SCHEME_SETTINGS,
    QuantizeConfig,
)
from compress.smoothing import smoothed
from compress.static_int8 import StaticInt8Linear
from compress.weight_only import WeightOnlyLinear


@dataclass(frozen=True)
class Scheme:
    """What takes a linear layer's place, and the settings that an empty one is made with."""

    linear: type[nn.Module]
    shape: tuple[str, ...] = ()
    # what a manifest means that was written before there was the setting
    before: Mapping[str, Any] = field(default_factory=dict)


SCHEMES = {
    "dynamic": Scheme(DynamicInt8Linear, ("per_channel",), {"per_channel": True}),
    "static": Scheme(StaticInt8Linear, ("activations", "per_channel")),
    "weight-only": Scheme(WeightOnlyLinear, ("bits", "block_size")),
}
_TABLES_BEFORE = {"embedding_bits": 8, "embedding_block_size": 128}  # as Scheme's


@dataclass(frozen=True)
class Prepared:
    """A float checkpoint with all that is needed to quantize any of its layers.

    In it a convolution over patches is a linear layer, the child `linear` of its name.
    """

    checkpoint: Checkpoint
    names: tuple[str, ...]  # of the layers and tables that can be quantized
    calibration: Calibration | None  # where the settings need data


def quantize(
    checkpoint: Checkpoint,
    config: QuantizeConfig,
    batches: CalibrationData | None = None,
    progress: Callable[[], None] = lambda: None,
    state: Path | None = None,
) -> StageResult:
    """Return the checkpoint with its linear layers as the scheme has them, and int8 embedding tables.

    The input is untouched. A linear layer whose weight is tied to an embedding keeps its own
    copy, since the two are laid out along different axes. What calibration has seen so far is kept in
    `state`, if that is given. Raises `ModelError` for a checkpoint that is quantized already, or has
    nothing to quantize, and `ConfigError` where the settings need data and there are none.
    """
    prepared = prepare(checkpoint, config, batches, progress, state)
    quantized = quantize_only(prepared, prepared.names, config, progress)
    return as_result(checkpoint, prepared, quantized, config)


def as_result(
    source: Checkpoint,
    prepared: Prepared,
    quantized: Checkpoint,
    config: QuantizeConfig,
    **found: Any,
) -> StageResult:
    """Return what `source` became as the stage's result; `found` joins the metrics of its lineage."""
    before, after = (_bytes(c.backbone) for c in (source, quantized))
    metrics: dict[str, Any] = {"bytes_before": before, "bytes_after": after, **found}
    report: dict[str, Any] = {**metrics, "modules": list((quantized.quantization or {})["modules"])}
    seen: dict[str, Any] = {}
    if prepared.calibration is not None:
        seen["data"] = prepared.calibration.fingerprint
        metrics["calibration_samples"] = prepared.calibration.samples
        if config.ranges is not None:
            seen["ranges"] = prepared.calibration.ranges(config)
    return StageResult(
        quantized.with_stage(
            "quantize",
            settings=config.to_json(),
            parent=weights_sha256(source.backbone),
            metrics=metrics,
            **seen,
        ),
        report,
    )


def prepare(
    checkpoint: Checkpoint,
    config: QuantizeConfig,
    batches: CalibrationData | None = None,
    progress: Callable[[], None] = lambda: None,
    state: Path | None = None,
) -> Prepared:
    """Return what can be quantized, with the statistics that the settings need.

    The errors are those of `quantize`.
    """
    if checkpoint.quantization:
        raise ModelError("this checkpoint is quantized already; start from the float one")
    refuse_adapters(checkpoint, "quantize")
    checkpoint = _with_patches(checkpoint)
    names = tuple(_quantizable(checkpoint, config.skip))
    if not names:
        raise ModelError("there is no linear layer or embedding table to quantize")
    if not config.needs_data:
        return Prepared(checkpoint, names, None)
    if batches is None:
        raise ConfigError(
            f"the scheme {config.scheme} with these settings learns from data; give --data"
        )
    calibration = None
    if config.smooth:
        first = state and state.with_name(f"{state.name}.smoothing")
        checkpoint, seen = smoothed(checkpoint, config.smooth, batches, progress, first)
        calibration = replace(seen, inputs={})  # of activations that are no longer so
    if replace(config, smooth=0.0).needs_data:
        tables = {name for name in names if isinstance(_module(checkpoint, name), nn.Embedding)}
        calibration = calibrate(
            checkpoint,
            [name for name in names if name not in tables],
            batches,
            moments=config.rounding != "nearest",
            progress=progress,
            state=state,
        )
        _check_seen(calibration, config)
    return Prepared(checkpoint, names, calibration)


def _check_seen(calibration: Calibration, config: QuantizeConfig) -> None:
    """Raise where calibration did not see what the settings need, naming the layer."""
    if calibration.unseen:
        first, *others = calibration.unseen
        more = f" and {len(others)} more" if others else ""
        raise ModelError(
            f"{first}{more} never ran during calibration; give data that reaches it, or leave it in "
            f"float with --skip {first}"
        )
    if config.ranges is not None:
        calibration.ranges(config)


def quantize_only(
    prepared: Prepared,
    names: Iterable[str],
    config: QuantizeConfig,
    progress: Callable[[], None] = lambda: None,
) -> Checkpoint:
    """Return a copy of the prepared checkpoint with just the layers `names` quantized."""
    made = replace(prepared.checkpoint, module=copy.deepcopy(prepared.checkpoint.module))
    settings = config.to_json()
    chosen = {name: settings[name] for name in SCHEMES[config.scheme].shape}
    tables = {"embedding_bits": config.embedding_bits}
    if config.embedding_block_size is not None:
        tables["embedding_block_size"] = config.embedding_block_size
    quantization = {"scheme": config.scheme, **chosen, **tables, "modules": list(names)}
    inputs = prepared.calibration.inputs if prepared.calibration else {}
    for name in quantization["modules"]:
        source = made.backbone.get_submodule(name)
        try:
            small = _quantized(source, quantization, config, inputs.get(name))
        except (DataError, ModelError) as error:
            raise type(error)(f"{name}: {error}") from error
        _replace_(made.backbone, name, small)
        progress()
    fold_float_patches_(made.backbone)
    return replace(made, quantization=quantization)


def quantized_skeleton_(model: nn.Module, quantization: Mapping[str, Any]) -> None:
    """Put empty quantized modules where the manifest names them, ready to load weights into."""
    if quantization.get("scheme") not in SCHEMES:
        raise ModelError(
            f"the manifest names the scheme {quantization.get('scheme')!r}; "
            f"this version knows {', '.join(SCHEMES)}"
        )
    scheme = SCHEMES[quantization["scheme"]]
    quantization = {**_TABLES_BEFORE, **scheme.before, **quantization}
    own = SCHEME_SETTINGS[quantization["scheme"]]
    choices = {name: own[name] for name in scheme.shape}
    choices |= {"embedding_bits": EMBEDDING_BITS, "embedding_block_size": EMBEDDING_BLOCK_SIZES}
    for name, known in choices.items():
        if quantization.get(name) not in known:
            raise ModelError(
                f"the manifest names {name} {quantization.get(name)}; "
                f"this version knows {', '.join(map(str, known))}"
            )
    for name in quantization.get("modules") or ():
        try:
            unfold_patches_(model, name)
            source = model.get_submodule(name)
        except AttributeError as error:
            raise ModelError(
                f"the manifest quantizes {name}, which the model does not have"
            ) from error
        _replace_(model, name, _empty(source, quantization))


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """Return a copy whose quantized modules are float ones, weights the same: no run-time rounding."""
    copied = replace(checkpoint, module=copy.deepcopy(checkpoint.module), quantization=None)
    for name in (checkpoint.quantization or {}).get("modules", ()):
        _replace_(copied.backbone, name, _float(copied.backbone.get_submodule(name)))
    return copied


def float_layers(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the layers and tables of a kind that can be quantized, and are not."""
    return [name for name, module in checkpoint.backbone.named_modules() if _replaceable(module)]


def _with_patches(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint, or a copy in which convolutions over patches are linear layers."""
    if not any(map(is_over_patches, checkpoint.backbone.modules())):
        return checkpoint
    made = replace(checkpoint, module=copy.deepcopy(checkpoint.module))
    unfold_patches_(made.backbone)
    return made


def _quantizable(checkpoint: Checkpoint, skip: tuple[str, ...]) -> list[str]:
    called, shown = _called(checkpoint), shown_names(checkpoint.backbone)
    every = {name: shown.get(name, name) for name in float_layers(checkpoint)}
    for pattern in skip:
        check_pattern("--skip", pattern, list(every.values()))
    return [
        name
        for name, told in every.items()
        if name in called and not any(fnmatch.fnmatch(told, pattern) for pattern in skip)
    ]


def _called(checkpoint: Checkpoint) -> set[str]:
    """Return the names of the modules that a forward pass calls.

    The others stay float: DeBERTa reads the weight of its relative embeddings past their module,
    and would take the int8 values for the numbers themselves.
    """
    called: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in checkpoint.backbone.named_modules()
        if name
    ]
    try:
        checkpoint.predict(checkpoint.signature.sample(batch=2, sequence=4))
    finally:
        for handle in handles:
            handle.remove()
    return called


def _replaceable(module: nn.Module) -> bool:
    # exact types: a subclass may scale its rows or read its own weight
    return type(module) in (nn.Linear, nn.Embedding) or type(module).__name__ == "Conv1D"


def _replace_(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _empty(source: Any, quantization: Mapping[str, Any]) -> nn.Module:
    if isinstance(source, nn.Embedding):
        shape = (source.num_embeddings, source.embedding_dim, source.padding_idx)
        size = None
        if quantization["embedding_bits"] == 4:
            size = block_size(source.embedding_dim, quantization["embedding_block_size"])
        return Int8Embedding(*shape) if size is None else PackedEmbedding(*shape, size)
    scheme = SCHEMES[quantization["scheme"]]
    settings = {name: quantization[name] for name in scheme.shape}
    return scheme.linear(*features(source), source.bias is not None, **settings)


def _quantized(
    source: Any, quantization: Mapping[str, Any], config: QuantizeConfig, stats: InputStats | None
) -> nn.Module:
    made: Any = _empty(source, quantization)
    if not all(torch.isfinite(value).all() for value in source.parameters(recurse=False)):
        raise ModelError("has weights that are no finite numbers; repair the model")
    if isinstance(source, nn.Embedding):
        made.quantize_(source.weight)
        return made
    bias = None if source.bias is None else source.bias.detach().clone()
    # Conv1D holds (in, out)
    weight = source.weight if isinstance(source, nn.Linear) else source.weight.t()
    made.quantize_(weight.detach(), bias, config, stats)
    return made


def _float(source: Any) -> nn.Module:
    made: Any
    if isinstance(source, Int8Embedding | PackedEmbedding):
        made = nn.Embedding(source.num_embeddings, source.embedding_dim)
        made.weight.data = source.dequantize()
        return made
    bias = source.dequantized_bias()
    made = nn.Linear(source.in_features, source.out_features, bias is not None)
    made.weight.data = source.dequantize()
    if bias is not None:
        made.bias.data = bias.clone()
    return made


def _module(checkpoint: Checkpoint, name: str) -> nn.Module:
    return checkpoint.backbone.get_submodule(name)


def _bytes(model: nn.Module) -> int:
    seen: dict[int, int] = {}
    for value in model.state_dict().values():
        seen[value.data_ptr()] = value.numel() * value.element_size()
    return sum(seen.values())
