"""Which numbers of a model's inputs and outputs belong to real tokens, and which to padding."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compress.checkpoint import Checkpoint


@dataclass(frozen=True)
class Tokens:
    """Which axis of each output runs along the tokens, and which input says what tokens are real.

    What a model gives for padding is nobody's concern, and graphs may differ there.
    """

    mask: str | None
    axes: Mapping[str, int]

    def real(self, output: str, array: np.ndarray, case: Mapping[str, Tensor]) -> np.ndarray:
        """Return the part of an output that belongs to real tokens, the tokens along axis 0."""
        axis = self.axes.get(output)
        if self.mask is None or axis is None or array.ndim <= axis:
            return array
        mask = case[self.mask].bool().numpy()[:, -array.shape[axis] :]
        if mask.all() or mask.shape != (array.shape[0], array.shape[axis]):
            return array
        return np.moveaxis(array, axis, 1)[mask]

    def row(
        self, output: str, array: np.ndarray, case: Mapping[str, Tensor], row: int
    ) -> np.ndarray:
        """Return what `array` would be if the case held this row alone, without its padding."""
        if array.ndim == 0:
            return array
        axis = self.axes.get(output)
        kept = array[row : row + 1]
        if self.mask is None or axis is None:
            return kept
        mask = case[self.mask].bool().numpy()[row, -array.shape[axis] :]
        return np.compress(mask, kept, axis=axis)


def tokens_of(checkpoint: Checkpoint) -> Tokens:
    """Return which outputs have a token axis: the one that grows with the sequence."""
    axes = [name for item in checkpoint.signature.inputs for _, name in item.axes]
    masks = [
        item.name
        for item in checkpoint.signature.inputs
        if item.kind == "mask" and {"sequence", "total_sequence"} & set(dict(item.axes).values())
    ]
    if not masks or "decoder_sequence" in axes:
        return Tokens(None, {})
    short, long = (
        checkpoint.predict(typed(checkpoint, checkpoint.signature.sample(2, sequence)))
        for sequence in (3, 4)
    )
    found = {
        name: axis
        for name in checkpoint.signature.outputs
        for axis in range(1, short[name].ndim)
        if (short[name].shape[axis], long[name].shape[axis]) == (3, 4)
    }
    return Tokens(masks[0], found)


def row_alone(case: Mapping[str, Tensor], checkpoint: Checkpoint, row: int) -> dict[str, Tensor]:
    """Return one row of a case without its padding, along every axis that a mask covers."""
    kept: dict[str, Tensor] = {}
    for item in checkpoint.signature.inputs:
        if item.kind == "mask":
            kept[dict(item.axes)[1]] = case[item.name][row].nonzero().flatten()
    if "total_sequence" in kept:  # without a past, which is where this is used
        kept.setdefault("sequence", kept["total_sequence"])
    alone = {}
    for item in checkpoint.signature.inputs:
        if item.name not in case:  # token types, which models default to zeros
            continue
        value = case[item.name]
        for axis, name in item.axes:
            if name == "batch":
                value = value[row : row + 1] if axis == 0 else value
            elif name in kept:
                value = value.index_select(axis, kept[name])
        alone[item.name] = value.contiguous()
    return alone


def typed(checkpoint: Checkpoint, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs in the dtypes of the signature: half-precision models take no float32."""
    kinds = {item.name: getattr(torch, item.dtype) for item in checkpoint.signature.inputs}
    return {name: value.to(kinds[name]) for name, value in inputs.items()}
