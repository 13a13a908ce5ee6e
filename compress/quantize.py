"""The quantize stage: linear layers and embedding tables become small ones, decided in PyTorch."""

import copy
import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from calib_data.errors import ModelError
from compress.adapters import refuse_adapters
from compress.blocks import features
from compress.checkpoint import Checkpoint, StageResult, weights_sha256
from compress.config import StageConfig, one_of, require
from compress.int8 import DynamicInt8Linear, Int8Embedding
from compress.weight_only import WeightOnlyLinear


@dataclass(frozen=True)
class Scheme:
    """What takes a linear layer's place, and the settings that it is made with."""

    linear: type[nn.Module]
    settings: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # allowed, default first


SCHEMES = {
    "dynamic": Scheme(DynamicInt8Linear),
    "weight-only": Scheme(WeightOnlyLinear, {"bits": (4, 8), "block_size": (32, 16, 64, 128, 256)}),
}


@dataclass(frozen=True)
class QuantizeConfig(StageConfig):
    """How to quantize. A setting that the scheme has and that is not given gets its default."""

    scheme: str = "dynamic"  # int8 weights per channel, uint8 activations at run time
    skip: tuple[str, ...] = ()  # patterns of module names that stay float
    bits: int | None = None  # of each weight
    block_size: int | None = None  # weights that share a scale

    def __post_init__(self) -> None:
        one_of("--scheme", self.scheme, tuple(SCHEMES))
        settings = SCHEMES[self.scheme].settings
        for name in ("bits", "block_size"):
            option, value = f"--{name.replace('_', '-')}", getattr(self, name)
            if value is not None:
                require(name in settings, f"the scheme {self.scheme} has no {option}; leave it out")
                one_of(option, value, settings[name])
            elif name in settings:
                object.__setattr__(self, name, settings[name][0])


def quantize(
    checkpoint: Checkpoint, config: QuantizeConfig, progress: Callable[[], None] = lambda: None
) -> StageResult:
    """Return the checkpoint with its linear layers as the scheme has them, and int8 embedding tables.

    The input is untouched. A linear layer whose weight is tied to an embedding keeps its own
    copy, since the two are scaled along different axes. Raises `ModelError` for a checkpoint that is
    quantized already, or has nothing to quantize.
    """
    if checkpoint.quantization:
        raise ModelError("this checkpoint is quantized already; start from the float one")
    refuse_adapters(checkpoint, "quantize")
    module = copy.deepcopy(checkpoint.module)
    quantized = replace(checkpoint, module=module)
    names = _quantizable(quantized, config.skip)
    if not names:
        raise ModelError("there is no linear layer or embedding table to quantize")
    settings = config.to_json()
    chosen = {name: settings[name] for name in SCHEMES[config.scheme].settings}
    quantization = {"scheme": config.scheme, **chosen, "modules": names}
    for name in names:
        source = quantized.backbone.get_submodule(name)
        _replace_(quantized.backbone, name, _quantized(source, quantization))
        progress()
    before, after = (_bytes(c.backbone) for c in (checkpoint, quantized))
    report = {"modules": names, "bytes_before": before, "bytes_after": after}
    return StageResult(
        replace(quantized, quantization=quantization).with_stage(
            "quantize",
            settings=settings,
            parent=weights_sha256(checkpoint.backbone),
            metrics={"bytes_before": before, "bytes_after": after},
        ),
        report,
    )


def quantized_skeleton_(model: nn.Module, quantization: Mapping[str, Any]) -> None:
    """Put empty quantized modules where the manifest names them, ready to load weights into."""
    if quantization.get("scheme") not in SCHEMES:
        raise ModelError(
            f"the manifest names the scheme {quantization.get('scheme')!r}; "
            f"this version knows {', '.join(SCHEMES)}"
        )
    for name, known in SCHEMES[quantization["scheme"]].settings.items():
        if quantization.get(name) not in known:
            raise ModelError(
                f"the manifest names {name} {quantization.get(name)}; "
                f"this version knows {', '.join(map(str, known))}"
            )
    for name in quantization.get("modules") or ():
        try:
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


def _empty(source: Any, quantization: Mapping[str, Any]) -> nn.Module:
    if isinstance(source, nn.Embedding):
        return Int8Embedding(source.num_embeddings, source.embedding_dim, source.padding_idx)
    scheme = SCHEMES[quantization["scheme"]]
    settings = {name: quantization[name] for name in scheme.settings}
    return scheme.linear(*features(source), source.bias is not None, **settings)


def _quantized(source: Any, quantization: Mapping[str, Any]) -> nn.Module:
    made: Any = _empty(source, quantization)
    conv1d = not isinstance(source, nn.Linear | nn.Embedding)  # which holds (in, out)
    made.quantize_(source.weight.t() if conv1d else source.weight)
    if getattr(source, "bias", None) is not None:
        made.bias = source.bias.detach().clone()
    return made


def _float(source: Any) -> nn.Module:
    made: Any
    if isinstance(source, Int8Embedding):
        made = nn.Embedding(source.num_embeddings, source.embedding_dim)
    else:
        made = nn.Linear(source.in_features, source.out_features, source.bias is not None)
    made.weight.data = source.dequantize()
    if getattr(source, "bias", None) is not None:
        made.bias.data = source.bias.clone()
    return made


def _bytes(model: nn.Module) -> int:
    seen: dict[int, int] = {}
    for value in model.state_dict().values():
        seen[value.data_ptr()] = value.numel() * value.element_size()
    return sum(seen.values())
