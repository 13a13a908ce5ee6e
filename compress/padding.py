"""Which positions of a layer's input are padding.

A batch's masks tell which tokens are real; a layer's input has the tokens of one of them side by side,
(B, T, in) or (B × T, in), or something else: patches of an image, one vector a text, positions. Which it
is shows in two small runs of the model, in which no two numbers of tokens are the same: the shapes of a
real batch may fit by accident, as where both texts of an encoder–decoder are equally long.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from calib_data.objectives import IGNORED
from compress.checkpoint import Checkpoint
from compress.layer_inputs import watching

TEXT, ANSWER = "attention_mask", "decoder_attention_mask"
_ANSWER_IDS = "decoder_input_ids"
_SIZES = ((2, 5), (3, 4))  # (batch, sequence) of the two runs

# layer → for each time it is called in a run, the mask that its input goes by
Layouts = Mapping[str, tuple[str | None, ...]]


def masks_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return which tokens are real, (B, T) bool, by the name of the mask.

    For a decoder's tokens that is its mask, or where there is a label. Without either, all are real.
    """
    masks = {name: batch[name] != 0 for name in (TEXT, ANSWER) if name in batch}
    if _ANSWER_IDS in batch and "labels" in batch and ANSWER not in masks:
        masks[ANSWER] = batch["labels"] != IGNORED
    return {name: mask for name, mask in masks.items() if mask.dim() == 2}


def real_vectors(
    x: Tensor, layouts: tuple[str | None, ...], call: int, masks: Mapping[str, Tensor]
) -> Tensor:
    """Return the vectors (n, in) of a layer's input (…, in) that are no padding.

    `layouts` is what `input_layouts` says of the layer, and `call` how often it was called before in
    this run. All vectors are taken for real where the input does not fit its mask.
    """
    vectors = x.reshape(-1, x.shape[-1])
    name = layouts[min(call, len(layouts) - 1)] if layouts else None
    mask = masks.get(name) if name is not None else None
    if mask is None or x.shape[:-1] not in _fitting(mask.shape):
        return vectors
    chosen = mask.reshape(-1)
    return vectors if bool(chosen.all()) else vectors[chosen]


def input_layouts(checkpoint: Checkpoint, names: Iterable[str]) -> Layouts:
    """Return by which mask the inputs of the layers `names` go, call by call."""
    names = list(names)
    if not {TEXT, _ANSWER_IDS} & set(checkpoint.signature.names):
        return {}
    runs = [_fits(checkpoint, names, *size) for size in _SIZES]
    layouts = {}
    for name in names:
        calls = zip(*(run[name] for run in runs))
        both = [one & other for one, other in calls]
        layouts[name] = tuple(next(iter(fit)) if len(fit) == 1 else None for fit in both)
    return layouts


def _fits(
    checkpoint: Checkpoint, names: list[str], batch: int, sequence: int
) -> dict[str, list[set[str]]]:
    """Return the masks that fit each layer's input in each of its calls, in a run of this size."""
    longest = checkpoint.signature.longest or sequence + 1
    device = next(checkpoint.module.parameters()).device
    sample = checkpoint.signature.sample(batch, max(min(sequence, longest - 1), 1), ragged=True)
    if _ANSWER_IDS in sample:  # one more than the encoder's
        ids = sample[_ANSWER_IDS]
        sample[_ANSWER_IDS] = torch.cat([ids, ids[:, -1:]], 1)
    tokens = {TEXT: sample.get(TEXT), ANSWER: sample.get(_ANSWER_IDS)}
    shapes = {name: value.shape for name, value in tokens.items() if value is not None}
    found: dict[str, list[set[str]]] = {name: [] for name in names}

    def note(name: str, x: Tensor) -> None:
        found[name].append({mask for mask, its in shapes.items() if x.shape[:-1] in _fitting(its)})

    with watching(checkpoint, names, note), torch.no_grad():
        checkpoint.forward({name: value.to(device) for name, value in sample.items()})
    return found


def _fitting(mask: torch.Size) -> tuple[torch.Size, torch.Size]:
    """Return the shapes that vectors for all tokens of a mask (B, T) may have, less the last axis."""
    return mask, torch.Size([mask.numel()])
