"""The int8 stage: linear layers and embedding tables become int8 modules, decided in PyTorch."""

import copy
import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from calib_data.errors import ModelError
from compress.blocks import features
from compress.checkpoint import Checkpoint, StageResult, weights_sha256
from compress.config import StageConfig, one_of
from compress.int8 import DynamicInt8Linear, Int8Embedding, quantize_per_channel


@dataclass(frozen=True)
class QuantizeConfig(StageConfig):
    """How to quantize."""

    scheme: str = "dynamic"  # int8 weights per channel, uint8 activations at run time
    skip: tuple[str, ...] = ()  # patterns of module names that stay float

    def __post_init__(self) -> None:
        one_of("--scheme", self.scheme, ("dynamic",))


def quantize(
    checkpoint: Checkpoint, config: QuantizeConfig, progress: Callable[[], None] = lambda: None
) -> StageResult:
    """Return the checkpoint with its linear layers and embedding tables in int8.

    The input is untouched. A linear layer whose weight is tied to an embedding keeps its own int8
    copy, since the two are scaled along different axes. Raises `ModelError` for a checkpoint that is
    quantized already, or has nothing to quantize.
    """
    if checkpoint.quantization:
        raise ModelError("this checkpoint is quantized already; start from the float one")
    module = copy.deepcopy(checkpoint.module)
    quantized = replace(checkpoint, module=module)
    names = _quantizable(quantized, config.skip)
    if not names:
        raise ModelError("there is no linear layer or embedding table to quantize")
    for name in names:
        _replace_(quantized.backbone, name, _int8(quantized.backbone.get_submodule(name)))
        progress()
    settings = config.to_json()
    before, after = (_bytes(c.backbone) for c in (checkpoint, quantized))
    report = {"modules": names, "bytes_before": before, "bytes_after": after}
    return StageResult(
        replace(quantized, quantization={"scheme": config.scheme, "modules": names}).with_stage(
            "quantize",
            settings=settings,
            parent=weights_sha256(checkpoint.backbone),
            metrics={"bytes_before": before, "bytes_after": after},
        ),
        report,
    )


def quantized_skeleton_(model: nn.Module, quantization: Mapping[str, Any]) -> None:
    """Put empty int8 modules where the manifest names them, ready to load weights into."""
    if quantization.get("scheme") != "dynamic":
        raise ModelError(
            f"the manifest names the scheme {quantization.get('scheme')!r}; this version knows dynamic"
        )
    for name in quantization.get("modules") or ():
        try:
            source = model.get_submodule(name)
        except AttributeError as error:
            raise ModelError(
                f"the manifest quantizes {name}, which the model does not have"
            ) from error
        _replace_(model, name, _empty(source))


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """Return a copy whose int8 modules are float ones with the same weights: no rounding at run time."""
    copied = replace(checkpoint, module=copy.deepcopy(checkpoint.module), quantization=None)
    for name in (checkpoint.quantization or {}).get("modules", ()):
        _replace_(copied.backbone, name, _float(copied.backbone.get_submodule(name)))
    return copied


def _quantizable(checkpoint: Checkpoint, skip: tuple[str, ...]) -> list[str]:
    called = _called(checkpoint)
    return [
        name
        for name, module in checkpoint.backbone.named_modules()
        if _replaceable(module)
        and name in called
        and not any(fnmatch.fnmatch(name, pattern) for pattern in skip)
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


def _empty(source: Any) -> nn.Module:
    if isinstance(source, nn.Embedding):
        return Int8Embedding(source.num_embeddings, source.embedding_dim, source.padding_idx)
    inputs, outputs = features(source)
    return DynamicInt8Linear(inputs, outputs, source.bias is not None)


def _int8(source: Any) -> nn.Module:
    made: Any = _empty(source)
    if isinstance(source, nn.Embedding):
        made.weight, made.scale = quantize_per_channel(source.weight, axis=0)
        return made
    weight = source.weight.t() if isinstance(source, nn.Linear) else source.weight  # (in, out)
    values, made.scale = quantize_per_channel(weight, axis=1)
    made.weight = values.contiguous()
    if source.bias is not None:
        made.bias = source.bias.detach().clone()
    return made


def _float(source: Any) -> nn.Module:
    if isinstance(source, Int8Embedding):
        table = nn.Embedding(source.num_embeddings, source.embedding_dim)
        table.weight.data = source.weight.float() * source.scale.unsqueeze(1)
        return table
    linear = nn.Linear(source.in_features, source.out_features, source.bias is not None)
    linear.weight.data = (source.weight.float() * source.scale).t().contiguous()
    if source.bias is not None:
        linear.bias.data = source.bias.clone()
    return linear


def _bytes(model: nn.Module) -> int:
    seen: dict[int, int] = {}
    for value in model.state_dict().values():
        seen[value.data_ptr()] = value.numel() * value.element_size()
    return sum(seen.values())
