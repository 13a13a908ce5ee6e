"""A model with fewer tokens: everything that grows with its config's vocabulary, cut alike."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from calib_data.errors import ModelError
from compress.checkpoint import Checkpoint
from compress.sizes import build


def token_rows(checkpoint: Checkpoint) -> int:
    """Return how many tokens the model has an embedding of."""
    model: Any = checkpoint.backbone
    table = model.get_input_embeddings() if hasattr(model, "_from_config") else None
    if not isinstance(table, nn.Embedding):
        raise ModelError(
            f"{type(model).__name__} has no table of token embeddings whose size its config says"
        )
    return table.num_embeddings


def with_rows(checkpoint: Checkpoint, kept: Sequence[int], tokenizer: Any) -> Checkpoint:
    """Return a copy of `checkpoint` whose tables have the rows `kept` alone."""
    pruned = replace(checkpoint, module=copy.deepcopy(checkpoint.module), processor=tokenizer)
    model: Any = pruned.backbone
    model.config = copy.deepcopy(model.config)
    indices = torch.as_tensor(kept)
    cut: dict[int, Any] = {}  # what is tied stays so
    for name, axis in _axes(checkpoint).items():
        path, _, last = name.rpartition(".")
        try:
            module: Any = model.get_submodule(path)
        except AttributeError:  # a part that the checkpoint does without
            continue
        value = getattr(module, last)
        if id(value) not in cut:
            cut[id(value)] = (_rows_of(value, axis, indices), value)  # the old one keeps its id
        setattr(module, last, cut[id(value)][0])
    places = {old: new for new, old in enumerate(kept)}
    for module in model.modules():
        _follow_(module, len(kept), places)
    for config in configs_of(model):
        for name, value in token_settings(config).items():
            setattr(config, name, _moved(value, places))
    _set_size_(model.config, len(kept))
    pad = places.get(checkpoint.signature.pad, 0)
    return replace(pruned, signature=replace(pruned.signature, vocabulary=len(kept), pad=pad))


def _axes(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the axis that runs along the vocabulary of each tensor that has one.

    They are those that grow with the config's vocabulary, seen in models without weights.
    """
    model: Any = checkpoint.backbone
    shapes = []
    for more in (0, 1):
        config = copy.deepcopy(model.config)
        _set_size_(config, token_rows(checkpoint) + more)
        made = build(model, config, "meta").state_dict()
        shapes.append({name: tuple(value.shape) for name, value in made.items()})
    return {
        name: next(i for i, sizes in enumerate(zip(shape, shapes[1][name])) if len({*sizes}) > 1)
        for name, shape in shapes[0].items()
        if shape != shapes[1][name]
    }


def _set_size_(config: Any, size: int) -> None:
    for part in (config, getattr(config, "text_config", None)):
        for name in ("vocab_size", "decoder_vocab_size"):
            if getattr(part, name, None) is not None:
                setattr(part, name, size)


def _rows_of(value: Tensor, axis: int, indices: Tensor) -> Tensor:
    rows = value.detach().index_select(axis, indices.to(value.device)).contiguous()
    parameter = isinstance(value, nn.Parameter)
    return nn.Parameter(rows, requires_grad=value.requires_grad) if parameter else rows


def _follow_(module: Any, size: int, places: Mapping[int, int]) -> None:
    """Update what a module that was cut says of itself."""
    if isinstance(module, nn.Embedding) and module.num_embeddings != len(module.weight):
        module.num_embeddings = size
        if module.padding_idx is not None:
            module.padding_idx = places.get(module.padding_idx)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape


def configs_of(model: Any) -> list[Any]:
    """Return the model's config, those within it, and the one of its generation."""
    found: list[Any] = []
    left = [model.config, getattr(model, "generation_config", None)]
    while left:
        config = left.pop()
        if config is not None and not any(config is other for other in found):
            found.append(config)
            left += [v for v in vars(config).values() if hasattr(v, "to_dict")]
    return found


def token_settings(config: Any) -> Mapping[str, Any]:
    """Return the settings of `config` that are token ids: one, a list, or lists in a list."""
    endings = ("_token_id", "_token_ids", "_words_ids", "_tokens")
    return {
        name: value
        for name, value in vars(config).items()
        if name.endswith(endings)
        and flat_ids(value)
        and not name.startswith(("max_", "min_", "num_"))
    }


def flat_ids(value: Any) -> list[int]:
    """Return the numbers in one, a list of them, or lists in a list."""
    if isinstance(value, bool) or value is None:
        return []
    if isinstance(value, int):
        return [value]
    if isinstance(value, list | tuple):
        return [token for entry in value for token in flat_ids(entry)]
    return []


def _moved(value: Any, places: Mapping[int, int]) -> Any:
    """Return ids as they are now; what was no token of the model stays as it was."""
    if isinstance(value, list | tuple):
        return type(value)(_moved(entry, places) for entry in value)
    return places.get(value, value)
