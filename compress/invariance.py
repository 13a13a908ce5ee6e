"""How far a row's outputs depend on what else is in the batch: its neighbours, and its padding.

A scheme that chooses one range for a whole tensor at run time lets rows disturb each other; one whose
ranges are fixed, or go by row, does not, but for the rounding of floats.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.tokens import row_alone, tokens_of

ROWS = 4
_SEQUENCE = 16

Outputs = Mapping[str, np.ndarray]


def drift(checkpoint: Checkpoint, batch: Mapping[str, Tensor] | None = None) -> dict[str, float]:
    """Return `batch_drift` and `padding_drift`: how much a row's outputs change, a share of their size.

    Both are root mean squares over the first rows of `batch` (without it, inputs drawn at random), of
    the output that changes most. The first compares a row in the batch with the same row, padded alike,
    alone; the second that with the row alone and unpadded. What cannot be told is left out: padding,
    where nothing is padded.
    """
    if batch is None:
        batch = checkpoint.signature.sample(ROWS, _SEQUENCE, ragged=True)
    tokens = tokens_of(checkpoint)
    masks = [item.name for item in checkpoint.signature.inputs if item.kind == "mask"]
    together = checkpoint.predict(batch)
    neighbours, padding = _Drift(), _Drift()
    for index in range(min(ROWS, _rows(checkpoint, batch))):
        one = _row(checkpoint, batch, index)
        alone = checkpoint.predict(one)
        neighbours.add({name: y[index : index + 1] for name, y in together.items()}, alone)
        if all(bool(one[mask].all()) for mask in masks):
            continue
        padded = {name: tokens.row(name, y, one, 0) for name, y in alone.items()}
        padding.add(padded, checkpoint.predict(row_alone(one, checkpoint, 0)))
    found = {"batch_drift": neighbours.share(), "padding_drift": padding.share()}
    return {name: share for name, share in found.items() if share is not None}


class _Drift:
    """Sums of squares, of differences and of what they are a share of, by output."""

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}

    def add(self, found: Outputs, expected: Outputs) -> None:
        """Count a row, but for outputs whose shape depends on the batch."""
        for name, y in expected.items():
            if y.ndim and found[name].shape == y.shape:
                difference = found[name].astype(np.float64) - y
                squares = [np.square(x).sum(dtype=np.float64) for x in (difference, y)]
                self._sums[name] = self._sums.get(name, 0.0) + np.array(squares)

    def share(self) -> float | None:
        """Return that of the output which changes most; None where nothing was counted."""
        shares = [float(np.sqrt(d / (y or 1.0))) for d, y in self._sums.values()]
        return max(shares, default=None)


def _rows(checkpoint: Checkpoint, batch: Mapping[str, Tensor]) -> int:
    return min(len(batch[name]) for name in _by_row(checkpoint) if name in batch)


def _row(checkpoint: Checkpoint, batch: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """Return one row of a batch, padding and all."""
    rows = {name: slice(index, index + 1) for name in _by_row(checkpoint)}
    return {
        name: batch[name][rows.get(name, slice(None))]
        for name in checkpoint.signature.names
        if name in batch
    }


def _by_row(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the inputs whose first axis counts rows, of texts or of images."""
    for item in checkpoint.signature.inputs:
        if dict(item.axes).get(0, "").endswith(("batch", "batch_size")):
            yield item.name
