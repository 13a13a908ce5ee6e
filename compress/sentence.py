"""Sentence encoders in the sentence-transformers layout: a transformer and the modules after it."""

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from calib_data.errors import ModelError
from compress.files import inside, read_json
from compress.sentence_modules import (
    KINDS,
    SENTENCE,
    TOKENS,
    Dense,
    Features,
    cut_columns_,
    make_module,
    reads_tokens,
    weights_as_safetensors,
)
from compress.signature import named_outputs
from compress.wrapper import Wrapper

_FIRST = ("Transformer",)


class SentenceEncoder(Wrapper):
    """A transformer and the modules after it, run in the order of their directory."""

    def __init__(self, backbone: nn.Module, steps: Iterable[nn.Module]) -> None:
        super().__init__(backbone)
        self.steps = nn.ModuleList(steps)

    def forward(self, **inputs: Tensor) -> Mapping[str, Tensor]:
        """Return what the modules leave of these: token_embeddings (batch, sequence, width) and
        sentence_embedding (batch, width).

        Where a module changes the token embeddings, last_hidden_state is what the transformer gave.
        """
        hidden = named_outputs(self.backbone, inputs)["last_hidden_state"]
        features = self._run({**inputs, TOKENS: hidden})
        made = {name: features[name] for name in (TOKENS, SENTENCE) if name in features}
        return made if made[TOKENS] is hidden else {**made, "last_hidden_state": hidden}

    def embed(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return what the modules after the transformer make of its states, (batch, width)."""
        return self._run({TOKENS: hidden, "attention_mask": mask})[SENTENCE]

    def _run(self, features: Features) -> Features:
        for step in self.steps:
            features = step(features)
        return features


def is_sentence_directory(directory: Path) -> bool:
    """Whether `directory` holds a sentence encoder in the sentence-transformers layout.

    A cross-encoder is saved in that layout, too, and is a classifier.
    """
    settings = directory / "config_sentence_transformers.json"
    kind = read_json(settings).get("model_type") if settings.is_file() else None
    return (directory / "modules.json").is_file() and kind != "CrossEncoder"


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
    """Return the layout's small files by relative path, to be written beside the weights again.

    The transformer is at the top there; weights that are a pickle become safetensors.
    """
    entries = read_modules(directory)
    home = entries[0]["path"]
    named = {"config_sentence_transformers.json": "config_sentence_transformers.json"}
    named["sentence_bert_config.json"] = f"{home}/sentence_bert_config.json".lstrip("/")
    for module in entries[1:]:
        if not module["path"]:
            continue
        for name in ("config.json", "model.safetensors", "pytorch_model.bin"):
            named[f"{module['path']}/{name}"] = f"{module['path']}/{name}"
    found = {name: inside(directory, path) for name, path in named.items()}
    files = {name: path.read_bytes() for name, path in found.items() if path.is_file()}
    for name in [name for name in files if name.endswith("/pytorch_model.bin")]:
        stored, safe = files.pop(name), name.replace("pytorch_model.bin", "model.safetensors")
        files.setdefault(safe, weights_as_safetensors(stored, str(directory / name)))
    entries = [{**entries[0], "path": ""}, *entries[1:]] if home else entries
    listed = json.dumps(entries, indent=2).encode()
    return {
        "modules.json": listed if home else inside(directory, "modules.json").read_bytes()
    } | files


def wrap_backbone(
    backbone: nn.Module, files: Mapping[str, bytes], tokenizer: Any = None
) -> SentenceEncoder:
    """Return the encoder that `modules.json` in `files` describes around `backbone`.

    Raises `ModelError` for a module outside the closed list, or one that `make_module` refuses.
    """
    first, *rest = json.loads(files["modules.json"])
    kinds = [_kind(first["type"]), *(_kind(module["type"]) for module in rest)]
    odd = [kind for place, kind in enumerate(kinds) if kind not in (KINDS if place else _FIRST)]
    if odd:
        raise ModelError(
            f"sentence-transformers module {odd[0]!r} is not supported here; there are Transformer, "
            f"first, and then {', '.join(KINDS)}"
        )
    _check_transformer(files)
    if not {"Pooling", "Dense"} & set(kinds):
        raise ModelError("modules.json lists no pooling, so there is no sentence embedding")
    prompts = _json(files, "config_sentence_transformers.json").get("prompts") or {}
    return SentenceEncoder(
        backbone,
        [
            make_module(kind, module["path"], files, prompts, tokenizer)
            for kind, module in zip(kinds[1:], rest)
        ],
    )


def _kind(name: str) -> str:
    """Return the class that `modules.json` names if it is sentence-transformers' own, else all of it."""
    package, _, kind = name.rpartition(".")
    return kind if package.partition(".")[0] == "sentence_transformers" else name


def _check_transformer(files: Mapping[str, bytes]) -> None:
    """Raise `ModelError` where the first module takes or gives something else than token embeddings."""
    settings = _json(files, "sentence_bert_config.json")
    text = (settings.get("modality_config") or {}).get("text") or {}
    said = (
        text.get("method", "forward"),
        text.get("method_output_name", "last_hidden_state"),
        settings.get("module_output_name", TOKENS),
    )
    if said != ("forward", "last_hidden_state", TOKENS):
        raise ModelError(
            f"sentence_bert_config.json takes {said[1]!r} of {said[0]!r} as {said[2]!r}; only the "
            "last hidden states of a text as token embeddings are supported"
        )


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        return dict(json.loads(files.get(name, b"{}")))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{name} cannot be read as settings: {error}") from error


def narrowed(
    encoder: SentenceEncoder, backbone: nn.Module, channels: Sequence[int]
) -> SentenceEncoder:
    """Return `encoder` around a `backbone` that keeps only `channels` of the hidden states.

    A projection takes fewer features then, and gives as many as before. Raises `ModelError` for a
    module that cannot.
    """
    steps = copy.deepcopy(encoder.steps)
    columns: dict[str, tuple[Sequence[int], int]] = {TOKENS: (channels, 1)}
    for step in steps:
        cut_columns_(step, columns)
    return SentenceEncoder(backbone, steps)


def current_files(
    encoder: SentenceEncoder, files: Mapping[str, bytes], width: int | None
) -> dict[str, bytes]:
    """Return `files` with the widths of `encoder` and the weights of its modules as they are.

    `width` is that of the transformer's hidden states.

    What is still true stays as it is, byte for byte.
    """
    from safetensors.torch import load, save

    found = dict(files)
    entries = json.loads(files.get("modules.json", b"[{}]"))[1:]  # none: pooled by default
    for module, step in zip(entries, encoder.steps):
        path, kind = module["path"], _kind(module["type"])
        settings: dict[str, Any] = {}
        if kind == "Pooling":
            settings = {"word_embedding_dimension": width, "embedding_dimension": width}
        elif kind == "Dense":
            linear: Any = step.linear
            settings = {"in_features": linear.in_features, "out_features": linear.out_features}
            width = linear.out_features if reads_tokens(step) else width
        _update_settings_(found, f"{path}/config.json", settings)
        weights = {k: v.detach().cpu().contiguous() for k, v in step.state_dict().items()}
        if weights:
            stored = load(files[f"{path}/model.safetensors"])
            if isinstance(step, Dense):
                stored = {f"linear.{k.removeprefix('linear.')}": v for k, v in stored.items()}
            if any(not stored[k].float().equal(v) for k, v in weights.items()):
                found[f"{path}/model.safetensors"] = save(weights)
    return found


def _update_settings_(files: dict[str, bytes], name: str, values: Mapping[str, Any]) -> None:
    """Correct those of `values` that the settings in `files[name]` hold and that differ."""
    old = json.loads(files.get(name, b"{}"))
    new = {**old, **{key: value for key, value in values.items() if key in old}}
    if new != old:
        files[name] = json.dumps(new, indent=2).encode()
