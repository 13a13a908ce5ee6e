"""Masks of ones on what a model computes: their gradients tell what a part of it is worth."""

from collections.abc import Mapping

import torch
from torch import Tensor

from calib_data.errors import ModelError
from compress.checkpoint import Checkpoint
from compress.example_loss import example_loss

NO_GRADIENT = "all gradients are zero; does the loss depend on the model's weights?"


class Masks:
    """Scales features by masks of ones, one per example of a batch and unit, and reads their gradients.

    What is computed stays the same. A mask that is used in several places, as where layers share their
    weights, gathers the gradients of all of them. Whether weights take gradients does not matter.
    """

    def __init__(self) -> None:
        self._rows = 1
        self._masks: dict[str, Tensor] = {}

    def scale(self, key: str, x: Tensor, units: int) -> Tensor:
        """Return `x` (…, units × width) times the mask `key`, (examples, units)."""
        # a batch's rows lie one after another, in windows or flattened to tokens too
        rows = self._rows if x.shape[0] % self._rows == 0 else x.shape[0]
        if key not in self._masks:
            self._masks[key] = x.new_ones(rows, units).requires_grad_()
        mask = self._masks[key]
        split = x.reshape(mask.shape[0], -1, units, x.shape[-1] // units)
        return (split * mask[:, None, :, None]).reshape(x.shape)

    def gradients(
        self, checkpoint: Checkpoint, batch: Mapping[str, Tensor], random: torch.Generator
    ) -> dict[str, Tensor]:
        """Return ∂L/∂mask on `batch` by key, (examples, units), L being each example's own loss.

        `scale` must be called by hooks of the model. Raises what `example_loss` raises, and `ModelError`
        where the loss depends on no mask.
        """
        self._masks = {}
        self._rows = len(next(iter(batch.values())))
        with torch.enable_grad():
            loss = example_loss(checkpoint, batch, random)
        masks, self._masks = self._masks, {}
        if not masks or not loss.requires_grad:
            raise ModelError(NO_GRADIENT)
        found = torch.autograd.grad(loss, list(masks.values()), allow_unused=True)
        return {
            key: torch.zeros_like(mask) if gradient is None else gradient
            for (key, mask), gradient in zip(masks.items(), found)
        }
