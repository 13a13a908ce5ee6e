"""How much each head and neuron matters: gradients accumulated over calibration data."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from calib_data.errors import DataError, ModelError
from compress.blocks import Group, input_columns
from compress.checkpoint import Checkpoint
from compress.example_loss import example_loss

# reads one backward pass: ∂L/∂mask of each of some units, shape (units,)
Read = Callable[[], Tensor]


def gradient_importance(
    checkpoint: Checkpoint,
    groups: tuple[Group, ...],
    batches: Iterable[Mapping[str, Tensor]],
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Return each group's importance per unit, shape (units,), float64, at least 0.

    A unit's score is the root mean square over batches of Σ w·∂L/∂w over the weights that carry its
    result onwards: the derivative of the loss by a mask on the unit (first-order Taylor, Molchanov
    et al. 2017, arXiv:1611.06440), L being the sum of its examples' losses (see `example_loss`).

    Raises `DataError` for no batches, `ModelError` for a loss that is not finite or gradients that
    are all zero.
    """
    return importance_of(checkpoint, group_readers(checkpoint, groups), batches, seed, progress)


def group_readers(checkpoint: Checkpoint, groups: Iterable[Group]) -> dict[str, Read]:
    """Return what reads each group's mask gradients after a backward pass, by the group's key."""
    readers: dict[str, Read] = {}
    for group in groups:
        if not _down_weight(checkpoint.backbone, group).requires_grad:
            raise ModelError(f"{group.down}.weight is frozen, so it has no gradient; unfreeze it")
        readers[group.key] = partial(_mask_gradient, checkpoint.backbone, group)
    return readers


def importance_of(
    checkpoint: Checkpoint,
    readers: Mapping[str, Read],
    batches: Iterable[Mapping[str, Tensor]],
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Return the root mean square over `batches` of what each reader reads, as float64.

    The loss and the errors are those of `gradient_importance`.
    """
    module = checkpoint.module
    totals: dict[str, Tensor] = {}
    random = torch.Generator().manual_seed(seed)
    count = 0
    for batch in batches:
        loss = example_loss(checkpoint, batch, random)
        module.zero_grad(set_to_none=True)
        loss.backward()
        for key, read in readers.items():
            squares = read().double().square().cpu()
            totals[key] = totals[key] + squares if key in totals else squares
        count += 1
        progress()
    module.zero_grad(set_to_none=True)
    if count == 0:
        raise DataError("there is no calibration batch; give --data at least one row")
    if not any(total.any() for total in totals.values()):
        raise ModelError("all gradients are zero; does the loss depend on the model's weights?")
    return {key: (total / count).sqrt() for key, total in totals.items()}


def _down_weight(model: nn.Module, group: Group) -> Tensor:
    weight: Tensor = model.get_submodule(group.down).weight  # type: ignore[assignment]
    return weight


def _mask_gradient(model: nn.Module, group: Group) -> Tensor:
    """Return ∂L/∂mask per unit, shape (units,): Σ w·∂L/∂w over each unit's columns."""
    module: Any = model.get_submodule(group.down)
    if module.weight.grad is None:
        return torch.zeros(group.units, dtype=torch.float64)
    product = input_columns(module, module.weight.detach() * module.weight.grad)
    return product.double().sum(dim=0).reshape(group.units, -1).sum(dim=1)
