"""The vocabulary stage: tokens that a corpus never uses go, in the model and in its tokenizer."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calib_data.errors import DataError, ModelError
from calib_data.sources import Examples
from compress.adapters import refuse_adapters
from compress.checkpoint import Checkpoint, StageResult, parameter_count, weights_sha256
from compress.config import require
from compress.sentence_modules import WithoutPrompt
from compress.token_rows import configs_of, flat_ids, token_rows, token_settings, with_rows
from compress.tokenizer_subset import check_tokenizer, closed, subset, token_ids, word_pieces

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
    checkpoint: Checkpoint, texts: Sequence[str], keep: Iterable[str] = (), min_count: int = 1
) -> StageResult:
    """Return the checkpoint without the tokens that neither `texts` nor `keep` use.

    A token is used that occurs `min_count` times. `keep` are tokens, or texts whose tokens stay. Special
    and added tokens stay, and the characters of the others, so that words that were never seen are still
    split. Texts whose tokens stay are split as before, and the model gives for them what it gave: both
    are checked. The input is untouched.

    The report holds the tokens and parameters before and after, and `unknown_words`: of the words in a
    tenth of the texts, the share that would be unknown to a vocabulary made of the others, and
    `pieces_per_word`, how many tokens it would make of each, beside what the whole vocabulary makes of
    them. Raises `DataError` for no texts, and `ModelError` for a
    model or tokenizer whose vocabulary cannot be changed.
    """
    if checkpoint.quantization:
        raise ModelError(
            "this checkpoint is quantized already; prune the vocabulary first, then quantize"
        )
    refuse_adapters(checkpoint, "prune the vocabulary of")
    if any(isinstance(part, WithoutPrompt) for part in checkpoint.module.modules()):
        raise ModelError(
            "the encoder's pooling looks for the tokens of its prompts (include_prompt: false), which "
            "would have other ids; leave the vocabulary whole"
        )
    tokenizer = checkpoint.processor
    check_tokenizer(tokenizer)
    if not texts:
        raise DataError("there is no text to tell used tokens by; give --vocab-from some")
    require(min_count >= 1, f"--vocab-min-count must be at least 1, got {min_count}")
    rows, keep = token_rows(checkpoint), list(keep)
    ids = [np.array(x, np.int32) for chunk in token_ids(tokenizer, texts) for x in chunk]
    kept = _kept(checkpoint, ids, keep, min_count)
    smaller = subset(tokenizer, kept)
    _check_same_split(checkpoint, smaller, texts, ids, kept)
    pruned = with_rows(checkpoint, kept, smaller)
    _check_same_outputs(checkpoint, pruned, kept)
    report = {
        "tokens_before": rows,
        "tokens_after": len(kept),
        "parameters_before": parameter_count(checkpoint.backbone),
        "parameters_after": parameter_count(pruned.backbone),
        **_unknown(checkpoint, texts, ids, keep, min_count),
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


def _kept(
    checkpoint: Checkpoint, ids: Sequence[np.ndarray], keep: Iterable[str], min_count: int
) -> list[int]:
    """Return the old ids of the tokens that stay, ascending; `ids` are those of each text."""
    tokenizer, rows = checkpoint.processor, token_rows(checkpoint)
    vocabulary = tokenizer.get_vocab()
    counts = np.bincount(np.concatenate(ids), minlength=rows)[:rows]
    used = set(np.flatnonzero(counts >= min_count).tolist())
    for entry in keep:
        used |= {vocabulary[entry]} if entry in vocabulary else set(tokenizer(entry)["input_ids"])
    pad = tokenizer.pad_token_id
    if pad is not None and pad < _FIRST:
        used |= set(range(pad))
    for config in configs_of(checkpoint.backbone):
        for value in token_settings(config).values():
            used |= set(flat_ids(value))
    return closed(tokenizer, {token for token in used if token < rows})


def _unknown(
    checkpoint: Checkpoint,
    texts: Sequence[str],
    ids: Sequence[np.ndarray],
    keep: Iterable[str],
    min_count: int,
) -> dict[str, float]:
    """Return what to expect of words that were not seen, from texts that are held out."""
    if len(texts) < _HELD_OUT:
        return {}
    others = [one for i, one in enumerate(ids) if i % _HELD_OUT]
    without = subset(checkpoint.processor, _kept(checkpoint, others, keep, min_count))
    before, after = (
        word_pieces(made, texts[::_HELD_OUT]) for made in (checkpoint.processor, without)
    )
    return {
        "unknown_words_before": before.unknown,
        "unknown_words": after.unknown,
        "pieces_per_word_before": before.pieces,
        "pieces_per_word": after.pieces,
    }


def _check_same_split(
    checkpoint: Checkpoint,
    after: Any,
    texts: Sequence[str],
    ids: Sequence[np.ndarray],
    kept: Sequence[int],
) -> None:
    """Raise `ModelError` for a text whose tokens all stay and that is split otherwise."""
    stays = np.zeros(1 + max(int(one.max(initial=0)) for one in ids), dtype=bool)
    stays[[old for old in kept if old < len(stays)]] = True
    places = np.asarray(kept)
    found = (np.asarray(x) for chunk in token_ids(after, texts) for x in chunk)
    for old, new in zip(ids, found):
        if stays[old].all() and not np.array_equal(places[new], old):
            raise ModelError(
                f"{type(checkpoint.processor).__name__} splits texts otherwise once it knows fewer "
                "tokens; leave the vocabulary whole"
            )


def _fingerprint(texts: Iterable[str], keep: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in (*texts, "", *keep):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


# --- the check ---------------------------------------------------------------------------------


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
