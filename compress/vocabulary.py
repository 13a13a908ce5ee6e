"""The vocabulary stage: tokens that a corpus never uses go, in the model and in its tokenizer."""

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from calib_data.errors import DataError, ModelError
from calib_data.sources import Examples
from compress.adapters import refuse_adapters
from compress.checkpoint import Checkpoint, StageResult, parameter_count, weights_sha256
from compress.sizes import build
from compress.tokenizer_subset import check_tokenizer, closed, subset, token_ids, unknown_words

_HELD_OUT = 10  # every so-manieth text tells what happens to words that were not seen
_FIRST = 256  # ids below the padding's stay if it is among these: RoBERTa counts positions from it
_TOLERANCE = 1e-4  # of the largest value of an output; fewer columns are summed in another order


def texts_of(examples: Examples) -> list[str]:
    """Return all texts of `examples`, those of pairs too; `DataError` where there are none."""
    roles = [role for role in ("text", "text_pair") if role in examples.roles]
    if not roles:
        raise DataError(f"{examples.spec} has no text to tell used tokens by")
    return [str(text) for role in roles for text in examples.column(role)]


def prune_vocabulary(
    checkpoint: Checkpoint, texts: Sequence[str], keep: Iterable[str] = ()
) -> StageResult:
    """Return the checkpoint without the tokens that neither `texts` nor `keep` use.

    `keep` are tokens, or texts whose tokens stay. Special and added tokens stay, and single
    characters, so that words that were never seen are still split. `texts` are split as before, and
    the model gives for what remains what it gave: both are checked. The input is untouched.

    The report holds the tokens and parameters before and after, and `unknown_words`: of the words in a
    tenth of the texts, the share that would be unknown to a vocabulary made of the others,
    `unknown_words_before` with the whole one. Raises `DataError` for no texts, and `ModelError` for a
    model or tokenizer whose vocabulary cannot be changed.
    """
    if checkpoint.quantization:
        raise ModelError(
            "this checkpoint is quantized already; prune the vocabulary first, then quantize"
        )
    refuse_adapters(checkpoint, "prune the vocabulary of")
    tokenizer = checkpoint.processor
    check_tokenizer(tokenizer)
    if not texts:
        raise DataError("there is no text to tell used tokens by; give --vocab-from some")
    rows = _rows(checkpoint)
    kept = _kept(checkpoint, texts, keep, rows)
    smaller = subset(tokenizer, kept)
    _check_same_split(tokenizer, smaller, texts, kept)
    pruned = _shrunk(checkpoint, kept, smaller)
    _check_same_outputs(checkpoint, pruned, kept)
    report = {
        "tokens_before": rows,
        "tokens_after": len(kept),
        "parameters_before": parameter_count(checkpoint.backbone),
        "parameters_after": parameter_count(pruned.backbone),
        **_unknown(checkpoint, texts, keep, rows),
    }
    return StageResult(
        pruned.with_stage(
            "vocabulary",
            parent=weights_sha256(checkpoint.backbone),
            data=_fingerprint(texts, keep),
            metrics=report,
        ),
        report,
    )


# --- which tokens -------------------------------------------------------------------------------


def _rows(checkpoint: Checkpoint) -> int:
    """Return how many tokens the model has an embedding of."""
    model: Any = checkpoint.backbone
    table = model.get_input_embeddings() if hasattr(model, "_from_config") else None
    if not isinstance(table, nn.Embedding):
        raise ModelError(
            f"{type(model).__name__} has no table of token embeddings whose size its config says"
        )
    return table.num_embeddings


def _kept(
    checkpoint: Checkpoint, texts: Iterable[str], keep: Iterable[str], rows: int
) -> list[int]:
    """Return the old ids of the tokens that stay, ascending."""
    tokenizer = checkpoint.processor
    vocabulary = tokenizer.get_vocab()
    used = {token for chunk in token_ids(tokenizer, texts) for ids in chunk for token in ids}
    for entry in keep:
        used |= {vocabulary[entry]} if entry in vocabulary else set(tokenizer(entry)["input_ids"])
    pad = tokenizer.pad_token_id
    if pad is not None and pad < _FIRST:
        used |= set(range(pad))
    for config in _configs(checkpoint.backbone):
        for value in _named_ids(config).values():
            used |= set(_flat(value))
    return closed(tokenizer, {token for token in used if token < rows})


def _unknown(
    checkpoint: Checkpoint, texts: Sequence[str], keep: Iterable[str], rows: int
) -> dict[str, float]:
    """Return what to expect of words that were not seen, from texts that are held out."""
    held_out = texts[::_HELD_OUT] if len(texts) >= _HELD_OUT else []
    if not held_out:
        return {}
    others = [text for i, text in enumerate(texts) if i % _HELD_OUT]
    without = subset(checkpoint.processor, _kept(checkpoint, others, keep, rows))
    return {
        "unknown_words_before": unknown_words(checkpoint.processor, held_out),
        "unknown_words": unknown_words(without, held_out),
    }


def _check_same_split(before: Any, after: Any, texts: Sequence[str], kept: Sequence[int]) -> None:
    pairs = zip(token_ids(before, texts), token_ids(after, texts))
    for one, other in ((a, b) for old, new in pairs for a, b in zip(old, new)):
        if one != [kept[token] for token in other]:
            raise ModelError(
                f"{type(before).__name__} splits texts otherwise once it knows fewer tokens; leave "
                "the vocabulary whole"
            )


def _fingerprint(texts: Iterable[str], keep: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in (*texts, "", *keep):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


# --- the model ----------------------------------------------------------------------------------


def _shrunk(checkpoint: Checkpoint, kept: Sequence[int], tokenizer: Any) -> Checkpoint:
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
    for config in _configs(model):
        for name, value in _named_ids(config).items():
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
        _set_size_(config, _rows(checkpoint) + more)
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


def _configs(model: Any) -> list[Any]:
    """Return the model's config, those within it, and the one of its generation."""
    found: list[Any] = []
    left = [model.config, getattr(model, "generation_config", None)]
    while left:
        config = left.pop()
        if config is not None and not any(config is other for other in found):
            found.append(config)
            left += [v for v in vars(config).values() if hasattr(v, "to_dict")]
    return found


def _named_ids(config: Any) -> Mapping[str, Any]:
    """Return the settings of `config` that are token ids: one, a list, or lists in a list."""
    endings = ("_token_id", "_token_ids", "_words_ids", "_tokens")
    return {
        name: value
        for name, value in vars(config).items()
        if name.endswith(endings) and _flat(value) and not name.startswith(("max_", "min_", "num_"))
    }


def _flat(value: Any) -> list[int]:
    if isinstance(value, bool) or value is None:
        return []
    if isinstance(value, int):
        return [value]
    if isinstance(value, list | tuple):
        return [token for entry in value for token in _flat(entry)]
    return []


def _moved(value: Any, places: Mapping[int, int]) -> Any:
    """Return ids as they are now; what was no token of the model stays as it was."""
    if isinstance(value, list | tuple):
        return type(value)(_moved(entry, places) for entry in value)
    return places.get(value, value)


def _check_same_outputs(before: Checkpoint, after: Checkpoint, kept: Sequence[int]) -> None:
    """Raise `ModelError` unless both give the same for the same tokens."""
    ids = [item.name for item in after.signature.inputs if item.kind == "ids"]
    new = after.signature.sample(batch=2, sequence=8, ragged=True)
    old = {n: torch.as_tensor(kept)[value] if n in ids else value for n, value in new.items()}
    mine, theirs = _outputs(after, new), _outputs(before, old)
    for name, value in theirs.items():
        if value.shape != mine[name].shape:  # logits of the tokens
            value = value[..., list(kept)]
        worst = float((value - mine[name]).abs().max()) / max(float(value.abs().max()), 1e-9)
        if not worst <= _TOLERANCE:
            raise ModelError(
                f"{type(before.backbone).__name__} gives another {name} once its tokens have other "
                f"ids (by {worst:.1g} of the largest); leave the vocabulary whole"
            )


def _outputs(checkpoint: Checkpoint, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    device = next(checkpoint.module.parameters()).device
    with torch.no_grad():
        found = checkpoint.forward({name: value.to(device) for name, value in batch.items()})
    return {name: value.float().cpu() for name, value in found.items()}
