"""What a graph is tried on: inputs of many shapes, and which numbers of its outputs matter."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from calib_data.embedded import pydoc_sentences
from compress.checkpoint import Checkpoint, parameter_count
from compress.signature import positions_from
from compress.tokens import typed
from export.precision import precision

LONGEST = 512  # for models without a limit
MOST = 4096  # tokens of one row: beyond, the reference alone would fill a machine
_TRACED = 11  # tokens in the sample that the tracer saw
_BATCHES = (1, 3, 8)
_TEXTS, _TEXT_TOKENS = 8, 64
# tokens of all cases but the longest: 8 rows of 512, or fewer where a model has many weights
_TOKENS = 8 * 512
_PRODUCTS = 2e11  # tokens × weights
_NUMBERS = 1 << 24  # of all outputs but the longest's: more where that is little beside the weights
_LARGEST = 64  # tokens of the largest embeddings: these overflow first


def parity_cases(
    part: Checkpoint, batched_chunks: bool = True, switches: Iterable[int] = ()
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield named inputs: batches, lengths with the longest, ragged padding, real text, caches.

    With a cache there are prompts, steps and a chunk after several past lengths, and the longest case
    is one token after all others; `batched_chunks` says whether the graph can append several tokens to
    a batch of caches at once. Where every token gives many numbers there are fewer tokens, so that
    what is compared stays small beside the model. At `switches` the source begins to compute otherwise:
    both sides of them are met.
    """
    signature = part.signature
    if not signature.has_sequence:
        for seed, batch in enumerate(_BATCHES):
            yield f"batch {batch}", typed(part, signature.sample(batch, seed=seed))
        return
    weights = max(parameter_count(part.module), 1)
    per_token, per_past = _numbers(part)
    numbers = max(_NUMBERS, weights // 8)
    longest = longest_case(part)
    if signature.has_past:
        past = min(longest - 1, max(numbers // max(2 * per_past, 1), _TRACED))
        shapes = [(1, 1, past), (3, 1, 5), (1, 3, 5), (1, 1, 1), (8, 1, _TRACED)]
        shapes += [(3, 3, 5)] * batched_chunks
    else:
        shapes = [(1, longest, 0)]
    shapes += [(1, 1, 0), (3, 1, 0), (1, 2, 0), (8, 2, 0), (1, _TRACED, 0), (3, _TRACED, 0)]
    shapes += [(3, _TRACED + 1, 0), (8, 37, 0), (2, longest // 2, 0)]
    tokens = min(_TOKENS, _PRODUCTS / weights)
    for seed, (batch, sequence, past) in enumerate(dict.fromkeys(shapes)):
        cost = batch * (sequence * per_token + (past + sequence) * per_past)
        if not 0 < past + sequence <= longest:
            continue
        if seed and (batch * sequence > tokens or cost > numbers):
            continue
        if seed:
            tokens, numbers = tokens - batch * sequence, numbers - cost
        name = f"batch {batch} × {sequence}" + (f" after {past}" if past else "")
        ragged = batch > 1 and past + sequence > 1
        sample = signature.sample(batch, sequence, seed=seed, ragged=ragged, past=past)
        yield f"{name}{', ragged' if ragged else ''}", typed(part, sample)
    for length in dict.fromkeys(n for switch in switches for n in (switch - 1, switch)):
        sequence = 1 if signature.has_past else length
        sample = signature.sample(2, sequence, seed=length, ragged=True, past=length - sequence)
        yield f"both sides of a switch, batch 2 × {length}", typed(part, sample)
    for name, case in (
        ("real text", _real_text(part, min(_TEXT_TOKENS, longest))),
        ("the largest embeddings", _largest_embeddings(part, longest)),
    ):
        if case:
            yield name, typed(part, case)


def _numbers(part: Checkpoint) -> tuple[int, int]:
    """Return how many numbers the outputs have for each token, and for each token in the cache."""
    outputs = part.predict(typed(part, part.signature.sample(1, 2)))
    sizes = {name: -(-value.size // 2) for name, value in outputs.items()}
    past = sum(size for name, size in sizes.items() if name.startswith("present"))
    return sum(sizes.values()) - past, past


def _largest_embeddings(part: Checkpoint, longest: int) -> dict[str, Tensor] | None:
    """Return the tokens whose embeddings have the largest numbers, for half precision alone."""
    if precision(part.module) == torch.float32:
        return None
    signature = part.signature
    for module in part.module.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings >= signature.vocabulary > 0:
            peaks = module.weight[: signature.vocabulary].detach().float().abs().amax(dim=1)
            peaks[signature.pad] = 0
            ids = peaks.topk(min(_LARGEST, longest, signature.vocabulary - 1)).indices
            case = signature.sample(1, len(ids))
            names = [item.name for item in signature.inputs if item.kind == "ids"]
            return case | {name: ids.unsqueeze(0) for name in names}
    return None


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
