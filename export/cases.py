"""What a graph is tried on: inputs of many shapes, and which numbers of its outputs matter."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from calib_data.embedded import pydoc_sentences
from compress.checkpoint import Checkpoint, parameter_count
from compress.signature import positions_from
from compress.tokens import typed

LONGEST = 512  # for models without a limit
MOST = 4096  # tokens of one row: beyond, the reference alone would fill a machine
_TRACED = 11  # tokens in the sample that the tracer saw
_BATCHES = (1, 3, 8)
_TEXTS, _TEXT_TOKENS = 8, 64
# tokens of all cases but the longest: 8 rows of 512, or fewer where a model has many weights
_TOKENS = 8 * 512
_PRODUCTS = 2e11  # tokens × weights


def parity_cases(
    part: Checkpoint, batched_chunks: bool = True
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield named inputs: batches, lengths with the longest, ragged padding, real text, caches.

    With a cache there are prompts, steps and a chunk after several past lengths; `batched_chunks`
    says whether the graph can append several tokens to a batch of caches at once.
    """
    signature = part.signature
    if not signature.has_sequence:
        for seed, batch in enumerate(_BATCHES):
            yield f"batch {batch}", typed(part, signature.sample(batch, seed=seed))
        return
    longest = longest_case(part)
    shapes = [(1, longest, 0)]
    shapes += [(b, n, 0) for n in (1, 2, _TRACED, _TRACED + 1) for b in _BATCHES]
    if signature.has_past:
        shapes += [(b, 1, past) for past in (1, 5, _TRACED) for b in _BATCHES]
        shapes += [(b, 3, 5) for b in (1, 3) if b == 1 or batched_chunks]
        shapes += [(1, 1, longest - 1)]
    shapes += [(8, 37, 0), (3, longest, 0)]
    budget = min(_TOKENS, _PRODUCTS / max(parameter_count(part.module), 1)) + longest
    for seed, (batch, sequence, past) in enumerate(dict.fromkeys(shapes)):
        if past + sequence > longest or batch * sequence > budget:
            continue
        budget -= batch * sequence
        name = f"batch {batch} × {sequence}" + (f" after {past}" if past else "")
        ragged = batch > 1 and past + sequence > 1
        sample = signature.sample(batch, sequence, seed=seed, ragged=ragged, past=past)
        yield f"{name}{', ragged' if ragged else ''}", typed(part, sample)
    texts = _real_text(part, min(_TEXT_TOKENS, longest))
    if texts:
        yield "real text", typed(part, texts)


def longest_case(part: Checkpoint) -> int:
    """Return how many tokens the longest case has."""
    return min(part.signature.longest or LONGEST, MOST)


def _real_text(part: Checkpoint, longest: int) -> dict[str, Tensor] | None:
    """Return sentences as the tokenizer encodes them, or None where the model takes no text."""
    signature = part.signature
    kinds = {item.kind for item in signature.inputs}
    if not callable(part.processor) or "ids" not in kinds or kinds & {"hidden", "pixels"}:
        return None
    texts = pydoc_sentences()[:_TEXTS]
    if signature.has_past:
        return _left_padded(
            part,
            [part.processor(t, truncation=True, max_length=longest)["input_ids"] for t in texts],
        )
    if getattr(part.processor, "pad_token", None) is None:
        texts = texts[:1]
    encoded = part.processor(
        texts, padding=len(texts) > 1, truncation=True, max_length=longest, return_tensors="pt"
    )
    if not all(name in encoded for name in signature.names):
        return None
    return {name: encoded[name] for name in signature.names}


def _left_padded(part: Checkpoint, rows: list[list[int]]) -> dict[str, Tensor]:
    """Return the token ids as prompts of one length, the short ones padded on the left."""
    longest = max(len(row) for row in rows)
    made = part.signature.sample(len(rows), longest)
    ids = torch.full((len(rows), longest), part.signature.pad)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(row)
        mask[index, longest - len(row) :] = 1
    values = {"ids": ids, "mask": mask, "positions": positions_from(mask, longest)}
    return {
        item.name: values.get(item.kind, made[item.name]) for item in part.signature.inputs
    }  # fmt: skip


def padded_row(
    cases: Mapping[str, Mapping[str, Tensor]], part: Checkpoint
) -> tuple[str, int] | None:
    """Return a case without a past and the row in it that has most padding; None where none has."""
    masks = [item.name for item in part.signature.inputs if item.kind == "mask"]
    pasts = [n.name for n in part.signature.inputs if "past_sequence" in dict(n.axes).values()]
    for name, case in reversed(list(cases.items())):
        mask = case[masks[0]] if masks else torch.ones(1)
        if mask.all() or mask.numel() > _TEXTS * _TEXT_TOKENS:
            continue
        if not any(case[past].shape[2] for past in pasts):
            return name, int(mask.sum(dim=1).argmin())
    return None
