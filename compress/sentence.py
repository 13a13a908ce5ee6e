"""Sentence encoders in the sentence-transformers layout: transformer, pooling, projection, norm."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calib_data.errors import ModelError
from compress.files import inside, read_json
from compress.signature import named_outputs
from compress.wrapper import Wrapper

_POOLINGS = ("cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


def pool(hidden: Tensor, mask: Tensor, mode: str) -> Tensor:
    """Return one vector per text, (batch, width), from hidden (batch, sequence, width).

    `mask` (batch, sequence) is 1 for real tokens; the modes are those of sentence-transformers.
    """
    weights = mask.unsqueeze(-1).to(hidden.dtype)  # (batch, sequence, 1)
    if mode == "cls":
        return hidden[:, 0]
    if mode == "max":
        return hidden.masked_fill(weights == 0, -1e9).amax(dim=1)
    if mode == "lasttoken":
        last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=1)
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
    if mode == "weightedmean":
        order = torch.arange(1, mask.shape[1] + 1, device=mask.device, dtype=hidden.dtype)
        weights = weights * order.reshape(1, -1, 1)
    total, count = (hidden * weights).sum(dim=1), weights.sum(dim=1).clamp(min=1e-9)
    return total / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)


class SentenceEncoder(Wrapper):
    """A transformer whose token embeddings are pooled into one vector per text."""

    def __init__(
        self, backbone: nn.Module, modes: tuple[str, ...], projections: nn.Module, normalize: bool
    ) -> None:
        super().__init__(backbone)
        self.modes = modes
        self.projections = projections
        self.normalize = normalize

    def forward(self, **inputs: Tensor) -> Mapping[str, Tensor]:
        """Return token_embeddings (batch, sequence, width) and sentence_embedding (batch, width)."""
        hidden = named_outputs(self.backbone, inputs)["last_hidden_state"]
        vector = self.embed(hidden, inputs["attention_mask"])
        return {"token_embeddings": hidden, "sentence_embedding": vector}

    def embed(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return what the layers after the transformer make of its states, (batch, width)."""
        pooled = torch.cat([pool(hidden, mask, mode) for mode in self.modes], dim=-1)
        vector: Tensor = self.projections(pooled)
        return F.normalize(vector, p=2, dim=1) if self.normalize else vector


def is_sentence_directory(directory: Path) -> bool:
    """Whether `directory` follows the sentence-transformers layout."""
    return (directory / "modules.json").is_file()


def read_modules(directory: Path) -> list[dict[str, Any]]:
    """Return the entries of `modules.json`; a `ModelError` where they lack what makes a module."""
    modules = read_json(directory / "modules.json")
    entries = modules if isinstance(modules, list) else []
    if not entries or not all(
        isinstance(m, dict) and isinstance(m.get("path"), str) and isinstance(m.get("type"), str)
        for m in entries
    ):
        raise ModelError(f"{directory}/modules.json must list modules, each with a path and a type")
    return entries


def sidecars(directory: Path) -> dict[str, bytes]:
    """Return the layout's small files by relative path, to be written beside the weights again."""
    names = ["modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"]
    for module in read_modules(directory):
        if module["path"]:
            names += [f"{module['path']}/config.json", f"{module['path']}/model.safetensors"]
    found = {name: inside(directory, name) for name in names}
    return {name: path.read_bytes() for name, path in found.items() if path.is_file()}


def wrap_backbone(backbone: nn.Module, files: Mapping[str, bytes]) -> SentenceEncoder:
    """Return the encoder that `modules.json` in `files` describes around `backbone`.

    Raises `ModelError` for a module that is not a transformer, pooling, dense or normalize module.
    """
    modes: tuple[str, ...] = ()
    projections: list[nn.Module] = []
    normalize = False
    for module in json.loads(files.get("modules.json", b"[]")):  # none: pooled by default
        kind = module["type"].rpartition(".")[2]
        if kind == "Pooling":
            modes = _pooling_modes(_settings(module["path"], files))
        elif kind == "Dense":
            projections += _dense(module["path"], files)
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise ModelError(
                f"sentence-transformers module {kind!r} is not supported; there are Transformer, "
                "Pooling, Dense and Normalize"
            )
    if not modes:
        raise ModelError("modules.json lists no pooling, so there is no sentence embedding")
    return SentenceEncoder(backbone, modes, nn.Sequential(*projections), normalize)


def narrowed(
    encoder: SentenceEncoder, backbone: nn.Module, channels: Sequence[int]
) -> SentenceEncoder:
    """Return `encoder` around a `backbone` that keeps only `channels` of the hidden states.

    A projection after the pooling takes fewer features then, and gives as many as before.
    """
    projections = copy.deepcopy(encoder.projections)
    first = next((m for m in projections.modules() if isinstance(m, nn.Linear)), None)
    if first is not None:
        width = first.in_features // len(encoder.modes)
        columns = [mode * width + c for mode in range(len(encoder.modes)) for c in channels]
        first.weight = nn.Parameter(first.weight.detach()[:, columns].clone())
        first.in_features = len(columns)
    return SentenceEncoder(backbone, encoder.modes, projections, encoder.normalize)


def current_files(
    encoder: SentenceEncoder, files: Mapping[str, bytes], width: int | None
) -> dict[str, bytes]:
    """Return `files` with the widths of `encoder` and the weights of its projections as they are.

    `width` is that of the transformer's hidden states.

    What is still true stays as it is, byte for byte.
    """
    from safetensors.torch import load, save

    found = dict(files)
    linears = iter(m for m in encoder.projections.modules() if isinstance(m, nn.Linear))
    for module in json.loads(files.get("modules.json", b"[]")):  # none: pooled by default
        path, kind = module["path"], module["type"].rpartition(".")[2]
        settings: dict[str, Any] = {}
        if kind == "Pooling":
            settings = {"word_embedding_dimension": width, "embedding_dimension": width}
        elif kind == "Dense":
            dense = next(linears)
            settings = {"in_features": dense.in_features, "out_features": dense.out_features}
            weights = {
                f"linear.{k}": v.detach().cpu().contiguous() for k, v in dense.state_dict().items()
            }
            stored = load(files[f"{path}/model.safetensors"])
            named = {k if k.startswith("linear.") else f"linear.{k}": v for k, v in stored.items()}
            if not all(named[k].equal(v) for k, v in weights.items()):
                found[f"{path}/model.safetensors"] = save(weights)
        _update_settings_(found, f"{path}/config.json", settings)
    return found


def _update_settings_(files: dict[str, bytes], name: str, values: Mapping[str, Any]) -> None:
    """Correct those of `values` that the settings in `files[name]` hold and that differ."""
    old = json.loads(files.get(name, b"{}"))
    new = {**old, **{key: value for key, value in values.items() if key in old}}
    if new != old:
        files[name] = json.dumps(new, indent=2).encode()


def _settings(path: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        return dict(json.loads(files.get(f"{path}/config.json", b"{}")))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path}/config.json cannot be read as settings: {error}") from error


def _dense(path: str, files: Mapping[str, bytes]) -> list[nn.Module]:
    """Return the projection in `path` and its activation."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    settings = _settings(path, files)
    activation = _activation(settings.get("activation_function", "Tanh"))
    try:
        dense = nn.Linear(
            settings["in_features"], settings["out_features"], settings.get("bias", True)
        )
        weights = load(files[f"{path}/model.safetensors"])
        dense.load_state_dict({k.removeprefix("linear."): v for k, v in weights.items()})
    except (KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path}: the projection cannot be read: {reason}") from error
    return [dense, activation]


def _pooling_modes(settings: Mapping[str, Any]) -> tuple[str, ...]:
    named = settings.get("pooling_mode")  # the newer layout names the mode itself
    if named:
        modes = tuple([named] if isinstance(named, str) else named)
    else:
        flags = {
            "cls": "cls_token",
            "mean": "mean_tokens",
            "max": "max_tokens",
            "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
            "weightedmean": "weightedmean_tokens",
            "lasttoken": "lasttoken",
        }
        modes = tuple(m for m, flag in flags.items() if settings.get(f"pooling_mode_{flag}"))
    unknown = [mode for mode in modes if mode not in _POOLINGS]
    if unknown or not modes:
        raise ModelError(f"pooling mode {unknown or '(none)'}; there are {', '.join(_POOLINGS)}")
    return modes


def _activation(name: str) -> nn.Module:
    """Return the activation that a Dense config names, from a closed list: no import by name."""
    known = {"Tanh": nn.Tanh, "Identity": nn.Identity, "ReLU": nn.ReLU, "GELU": nn.GELU}
    kind = name.rpartition(".")[2]
    if kind not in known:
        raise ModelError(
            f"Dense activation {name!r} is not supported; there are {', '.join(known)}"
        )
    return known[kind]()
