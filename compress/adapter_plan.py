"""Which adapter, and which modules of a model it adapts: what the manifest says of it."""

import fnmatch
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from calib_data.errors import ConfigError, ModelError
from compress.blocks import all_groups, is_linear
from compress.config import StageConfig, one_of, require
from compress.prefix import prefix_shape
from compress.signature import forward_names

# method → its settings with their defaults
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8, "alpha": 16.0, "lora_dropout": 0.05, "targets": ()},
    "ia3": {"targets": ()},
    "adapter": {"bottleneck": 48, "placement": "houlsby", "targets": ()},
    "prefix": {"virtual_tokens": 20},
}
MERGEABLE = ("lora", "ia3")
_OPTIONS = ("rank", "alpha", "lora_dropout", "bottleneck", "placement", "virtual_tokens", "targets")
_PLACEMENTS = {"houlsby": ("heads", "neurons"), "pfeiffer": ("neurons",)}


@dataclass(frozen=True)
class AdapterConfig(StageConfig):
    """Which adapter. A setting that the method has and that is not given gets its default."""

    method: str
    rank: int | None = None  # lora: of the two factors
    alpha: float | None = None  # lora: the product counts alpha / rank
    lora_dropout: float | None = None  # lora: of what goes in
    bottleneck: int | None = None  # adapter: neurons of each
    placement: str | None = None  # adapter: houlsby or pfeiffer
    virtual_tokens: int | None = None  # prefix: positions
    targets: tuple[str, ...] = ()  # patterns of linear layers; empty: the method's own choice

    def __post_init__(self) -> None:
        one_of("--method", self.method, tuple(SETTINGS))
        settings = SETTINGS[self.method]
        for name in _OPTIONS:
            option, value = f"--{name.replace('_', '-')}", getattr(self, name)
            if value in (None, ()):
                object.__setattr__(self, name, settings.get(name, value))
            else:
                require(name in settings, f"the method {self.method} has no {option}; leave it out")
        for name in ("rank", "bottleneck", "virtual_tokens"):
            value = getattr(self, name)
            if value is not None:
                option = f"--{name.replace('_', '-')}"
                require(value >= 1, f"{option} must be at least 1, got {value}")
        require(self.alpha is None or self.alpha > 0, f"--alpha must be above 0, got {self.alpha}")
        require(
            self.lora_dropout is None or 0 <= self.lora_dropout < 1,
            f"--lora-dropout must be in [0, 1), got {self.lora_dropout}",
        )
        if self.placement is not None:
            one_of("--placement", self.placement, tuple(_PLACEMENTS))


def plan_adapter(model: Any, config: AdapterConfig, fresh: Collection[str]) -> dict[str, Any]:
    """Return what the manifest says of an adapter: the method, its settings and the modules.

    Modules whose parameters are `fresh` are trained whole, and need none.
    """
    if config.method == "prefix":
        if "input_ids" not in forward_names(model):
            raise ModelError(f"{type(model).__name__} reads no text; use --method lora")
        shape = prefix_shape(model)
        return {"method": "prefix", "virtual_tokens": config.virtual_tokens, **shape}
    names = _matching(model, config) if config.targets else _DEFAULT[config.method](model, config)
    names = [name for name in names if f"{name}.weight" not in fresh]
    if not names:
        raise ModelError(
            f"{type(model).__name__} has no layer that {config.method} adapts by itself; "
            "name some with --targets"
        )
    kept: dict[str, Any] = {
        key: getattr(config, key)
        for key in ("rank", "alpha", "bottleneck")
        if key in SETTINGS[config.method]
    }
    found: dict[str, Any] = {"method": config.method, **kept, "modules": names}
    if config.method == "ia3":
        downs = {group.down for group in all_groups(model) if group.kind == "neurons"}
        found["feedforward"] = [name for name in names if name in downs]
    return found


def _matching(model: Any, config: AdapterConfig) -> list[str]:
    linear = linear_layers(model)
    for pattern in config.targets:
        if not any(_matches(name, pattern) for name in linear):
            last = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(
                f"--targets {pattern} matches no linear layer; their names end in {', '.join(last)}"
            )
    return [name for name in linear if any(_matches(name, p) for p in config.targets)]


def _matches(name: str, pattern: str) -> bool:
    """Whether a module's whole name, or the end of it after a dot, is what the pattern says."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def linear_layers(model: Any) -> list[str]:
    """Return the names of the linear layers, without those that share an embedding's weight."""
    shared = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return [
        name
        for name, module in model.named_modules()
        if name and is_linear(module) and id(getattr(module, "weight", None)) not in shared
    ]


def _lora_layers(model: Any, config: AdapterConfig) -> list[str]:
    """Return all linear layers but the head's: Dettmers et al. 2023, arXiv:2305.14314, needed all."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    names = [name for name in linear_layers(model) if in_base(model, name)]
    return [name for name in names if model.get_submodule(name) is not output]


def _scaled_layers(model: Any, config: AdapterConfig) -> list[str]:
    """Return keys, values and the feed-forward's output, as Liu et al. 2022, arXiv:2205.05638."""
    names: list[str] = []
    for group in all_groups(model):
        ups = [part.module for part in group.parts if part.outputs]
        names += ups[-2:] if group.kind == "heads" else [group.down]
    return list(dict.fromkeys(names))


def _output_layers(model: Any, config: AdapterConfig) -> list[str]:
    kinds = _PLACEMENTS[config.placement or "houlsby"]
    return list(dict.fromkeys(g.down for g in all_groups(model) if g.kind in kinds))


_DEFAULT = {"lora": _lora_layers, "ia3": _scaled_layers, "adapter": _output_layers}


def in_base(model: Any, name: str) -> bool:
    """Whether a module or parameter belongs to the transformer and not to the head on it."""
    if getattr(model, "base_model", model) is model:
        return True
    return name.startswith(f"{model.base_model_prefix}.")
