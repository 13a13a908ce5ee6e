"""Adapters: a few trained numbers beside a model's own, which stay as they are.

The modules keep their places, so an adapted model runs, saves and exports like any other; the
manifest says which modules are adapted and how, and `adapter_skeleton_` makes them again.
"""

import copy
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from calib_data.errors import ConfigError, ModelError
from compress.adapter_plan import (
    MERGEABLE,
    SETTINGS,
    AdapterConfig,
    in_base,
    linear_layers,
    plan_adapter,
)
from compress.bottleneck import BottleneckAdapter
from compress.checkpoint import Checkpoint, StageResult, weights_sha256
from compress.prefix import add_prefix_, prefix_shape, start_from_text_
from compress.signature import Signature


def add_adapter(
    checkpoint: Checkpoint,
    config: AdapterConfig,
    ids: Tensor | None = None,
    seed: int = 0,
    fresh: Collection[str] = (),
) -> Checkpoint:
    """Return a copy of `checkpoint` with an adapter that is trained, and changes nothing yet.

    Only a prefix changes something: it begins as the keys and values of `ids` (1, tokens), real text.
    The head of a classifier is trained as well, and so are the parameters named in `fresh`. Raises
    `ModelError` where the model does not take the method, `ConfigError` where no module matches
    `config.targets`.
    """
    adapted = replace(checkpoint, module=copy.deepcopy(checkpoint.module))
    model: Any = adapted.backbone
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = {id(parameter) for parameter in model.parameters()}
    trained = {id(model.get_parameter(name)) for name in fresh}
    if checkpoint.task_row.target == "class":
        trained |= {id(p) for name, p in model.named_parameters() if not in_base(model, name)}
    adapters = plan_adapter(model, config, fresh)
    longest = longest_adapted(checkpoint.signature, adapters)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter_skeleton_(model, adapters, config.lora_dropout or 0.0)
    if config.method == "prefix" and ids is not None:
        start_from_text_(model, _as_long_as(ids, adapters["virtual_tokens"]))
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained or id(parameter) not in before)
    signature = replace(checkpoint.signature, longest=longest)
    return replace(adapted, adapters=adapters, signature=signature)


def adapter_skeleton_(model: Any, adapters: Mapping[str, Any], dropout: float = 0.0) -> None:
    """Put adapters where the manifest names them, ready to be trained or to load weights into.

    Raises `ModelError` for a manifest that does not fit the model.
    """
    method, names = adapters.get("method"), _names(adapters, "modules")
    if method not in SETTINGS:
        raise ModelError(
            f"the manifest names the method {method!r}; this version knows {', '.join(SETTINGS)}"
        )
    linear = linear_layers(model)
    if unknown := sorted(set(names) - set(linear)):
        raise ModelError(f"the manifest adapts {unknown[0]}, which is no linear layer of the model")
    if method == "prefix":
        sizes = ("layers", "heads", "width", "virtual_tokens")
        shape = {name: _positive(adapters, name) for name in sizes}
        if prefix_shape(model) != {name: shape[name] for name in sizes[:3]}:
            raise ModelError("the manifest's prefix does not fit the model's layers")
        add_prefix_(model, shape, shape["virtual_tokens"])
    elif method == "adapter":
        width = _positive(adapters, "bottleneck")
        for name in names:
            _set_(model, name, BottleneckAdapter(model.get_submodule(name), width))
    else:
        _inject_(model, adapters, names, dropout)
    model.eval()


def merge_adapter(checkpoint: Checkpoint) -> Checkpoint:
    """Return a copy whose adapters are part of the weights: equal to rounding, and any other model.

    Raises `ModelError` for a checkpoint without adapters, or with those that cannot be merged, and for a
    sparse one.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not checkpoint.adapters:
        raise ModelError("this checkpoint has no adapter to merge")
    method = checkpoint.adapters["method"]
    if method not in MERGEABLE:
        raise ModelError(
            f"the method {method} computes what no weight can hold; only {' and '.join(MERGEABLE)} "
            "can be merged"
        )
    if checkpoint.sparse:
        raise ModelError(
            "merging fills the zeros of a sparse model; fine-tune it whole (--method full), which "
            "keeps them, or keep the adapter beside it"
        )
    merged = replace(checkpoint, module=copy.deepcopy(checkpoint.module), adapters=None)
    model: Any = merged.backbone
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
            _set_(model, name, layer.get_base_layer())
    del model.peft_config
    return merged


def merge(checkpoint: Checkpoint) -> StageResult:
    """Return `merge_adapter`'s checkpoint as a stage of its own; the input is untouched."""
    merged = merge_adapter(checkpoint)
    adapters = checkpoint.adapters or {}
    report = {"method": adapters["method"], "modules": len(adapters["modules"])}
    parent = weights_sha256(checkpoint.backbone)
    return StageResult(merged.with_stage("merge", parent=parent, metrics=report), report)


def refuse_adapters(checkpoint: Checkpoint, stage: str) -> None:
    """Raise `ModelError` where `checkpoint` has adapters, which `stage` cannot work on."""
    if checkpoint.adapters:
        method = checkpoint.adapters["method"]
        cure = (
            "merge it into the weights first: onnxpress compress merge, or finetune --merge"
            if method in MERGEABLE
            else f"{stage} the model first, then fine-tune it"
        )
        raise ModelError(f"cannot {stage} a model with a {method} adapter; {cure}")


def longest_adapted(signature: Signature, adapters: Mapping[str, Any] | None) -> int | None:
    """Return how many tokens the model takes: a prefix uses up some of its positions.

    Raises `ConfigError` where it leaves none.
    """
    longest = signature.longest
    used = (adapters or {}).get("virtual_tokens") or 0
    if longest is None:
        return None
    if used >= longest:
        raise ConfigError(
            f"--virtual-tokens {used} leave nothing of the model's {longest} positions; lower them"
        )
    return longest - used


# --- putting them in ----------------------------------------------------------------------------


def _inject_(model: Any, adapters: Mapping[str, Any], names: list[str], dropout: float) -> None:
    from peft import IA3Config, LoraConfig, inject_adapter_in_model

    if adapters["method"] == "lora":
        rank, alpha = _positive(adapters, "rank"), adapters.get("alpha")
        if not isinstance(alpha, int | float) or not alpha > 0:
            raise ModelError(f"the manifest's alpha is {alpha!r}, not a number above 0")
        strength: Any = alpha  # peft says int, and takes both
        settings: Any = LoraConfig(
            r=rank, lora_alpha=strength, lora_dropout=dropout, target_modules=_exactly(names)
        )
    else:
        forward = _names(adapters, "feedforward")
        settings = IA3Config(
            target_modules=_exactly(names), feedforward_modules=_exactly(forward or ["\0"])
        )
    with warnings.catch_warnings():  # of GPT-2's transposed weights, which it then takes care of
        warnings.simplefilter("ignore")
        inject_adapter_in_model(settings, model)


def _exactly(names: list[str]) -> str:
    """Return the pattern of these names and no others, as peft reads a string."""
    return "|".join(re.escape(name) for name in names)


def _names(adapters: Mapping[str, Any], key: str) -> list[str]:
    names = adapters.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"the manifest's {key} must be a list of names")
    return names


def _positive(adapters: Mapping[str, Any], key: str) -> int:
    value = adapters.get(key)
    if type(value) is not int or value < 1:
        raise ModelError(f"the manifest's {key} is {value!r}, not a number above 0")
    return value


def _set_(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _as_long_as(ids: Tensor, tokens: int) -> Tensor:
    """Return (1, tokens) ids, those in `ids` (1, any) over and over."""
    return ids.repeat(1, -(-tokens // ids.shape[1]))[:, :tokens]
