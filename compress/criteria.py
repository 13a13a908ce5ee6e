"""What removing a unit costs, by the criterion that is asked for.

Every score is a squared quantity: an estimate of the loss, which adds up over units and compares
across layers, so that a plan may sum it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from calib_data.errors import DataError, ModelError
from compress.blocks import Group, Part, input_columns
from compress.checkpoint import Checkpoint
from compress.config import one_of
from compress.example_loss import example_loss
from compress.layer_inputs import watching
from compress.masks import NO_GRADIENT, Masks
from compress.padding import input_layouts, masks_of, real_vectors
from compress.processes import on_device

CRITERIA = ("fisher", "taylor", "gradient", "magnitude", "wanda", "random")

Data = Iterable[Mapping[str, Tensor]]
Scores = dict[str, Tensor]
Progress = Callable[[], None]


def unit_importance(
    checkpoint: Checkpoint,
    groups: Sequence[Group],
    batches: Data,
    criterion: str = "fisher",
    seed: int = 0,
    progress: Progress = lambda: None,
) -> Scores:
    """Return what removing each unit costs by group key: (units,), float64, at least 0.

    - `fisher`: the mean over examples of (∂L/∂mask)², a mask scaling what the unit hands on (Kwon et
      al. 2022, arXiv:2204.09656). To first order that is what removing it changes (see `example_loss`).
    - `taylor`: Σ (w·∂L/∂w)² over the unit's weights in all projections (Molchanov et al. 2019,
      arXiv:1906.10771), `gradient`: Σ (∂L/∂w)², both the mean over batches.
    - `magnitude`: Σ w² over the same weights.
    - `wanda`: Σ w²·E[x²] over the weights that carry its result onwards, x being what they are given:
      what removing it changes in the block's output (after Sun et al. 2023, arXiv:2306.11695).
    - `random`: uniform numbers from `seed`, for comparison.

    The last three look at no loss, and `magnitude` and `random` at no data. Raises `DataError` for no
    batches, `ModelError` for a loss that is not finite, gradients that are all zero, and weights that
    are frozen where their gradients are asked for.
    """
    one_of("--criterion", criterion, CRITERIA)
    if criterion == "random":
        random = torch.Generator().manual_seed(seed)
        return {g.key: torch.rand(g.units, generator=random, dtype=torch.float64) for g in groups}
    if criterion == "magnitude":
        return {g.key: _unit_sums(g, _squared_weights(checkpoint.backbone, g)) for g in groups}
    with on_device(checkpoint.module):
        if criterion == "wanda":
            return _wanda(checkpoint, groups, batches, progress)
        if criterion == "fisher":
            return _fisher(checkpoint, groups, batches, seed, progress)
        return _by_gradients(checkpoint, groups, batches, criterion, seed, progress)


def mask_importance(
    checkpoint: Checkpoint, masks: Masks, batches: Data, seed: int, progress: Progress
) -> Scores:
    """Return the mean over examples of (∂L/∂mask)² of the masks that hooks put on the model.

    Raises `DataError` for no batches, `ModelError` for gradients that are all zero.
    """
    random = torch.Generator().manual_seed(seed)
    totals: Scores = {}
    count = 0
    for batch in _moved(checkpoint, batches):
        for key, gradient in masks.gradients(checkpoint, batch, random).items():
            squares = gradient.double().square().sum(dim=0).cpu()
            totals[key] = totals[key] + squares if key in totals else squares
        count += len(next(iter(batch.values())))
        progress()
    return _mean(totals, count)


# --- each criterion -----------------------------------------------------------------------------


def _fisher(
    checkpoint: Checkpoint, groups: Sequence[Group], batches: Data, seed: int, progress: Progress
) -> Scores:
    masks = Masks()

    def scale(group: Group, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return masks.scale(group.key, inputs[0], group.units), *inputs[1:]

    handles = [
        checkpoint.backbone.get_submodule(group.down).register_forward_pre_hook(
            partial(scale, group)
        )
        for group in groups
    ]
    try:
        found = mask_importance(checkpoint, masks, batches, seed, progress)
    finally:
        for handle in handles:
            handle.remove()
    # a block that the calibration data never reach
    return {g.key: found.get(g.key, torch.zeros(g.units, dtype=torch.float64)) for g in groups}


def _by_gradients(
    checkpoint: Checkpoint,
    groups: Sequence[Group],
    batches: Data,
    criterion: str,
    seed: int,
    progress: Progress,
) -> Scores:
    model = checkpoint.backbone
    names = sorted({name for group in groups for name in _weights_of(model, group)})
    weights = [model.get_parameter(name) for name in names]
    frozen = [name for name, weight in zip(names, weights) if not weight.requires_grad]
    if frozen:
        raise ModelError(
            f"{', '.join(frozen[:3])}{' …' * (len(frozen) > 3)}: frozen weights have no gradients; "
            "unfreeze them, or pass --criterion fisher"
        )
    random = torch.Generator().manual_seed(seed)
    totals = {g.key: torch.zeros(g.units, dtype=torch.float64) for g in groups}
    count = 0
    for batch in _moved(checkpoint, batches):
        rows = len(next(iter(batch.values())))
        with torch.enable_grad():
            loss = example_loss(checkpoint, batch, random) / rows
        if not loss.requires_grad:
            raise ModelError(NO_GRADIENT)
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        squares = {
            name: (gradient * weight.detach() if criterion == "taylor" else gradient).square()
            for name, weight, gradient in zip(names, weights, gradients)
            if gradient is not None
        }
        for group in groups:
            totals[group.key] += _unit_sums(group, _of_parts(model, group, squares))
        count += 1
        progress()
    return _mean(totals, count)


def _wanda(
    checkpoint: Checkpoint, groups: Sequence[Group], batches: Data, progress: Progress
) -> Scores:
    downs = {group.down for group in groups}
    sums: Scores = {}
    counts = dict.fromkeys(downs, 0)
    layouts = input_layouts(checkpoint, downs)
    batch_masks: dict[str, Tensor] = {}
    calls: dict[str, int] = {}

    def see(name: str, x: Tensor) -> None:
        vectors = real_vectors(x, layouts.get(name, ()), calls.get(name, 0), batch_masks)
        calls[name] = calls.get(name, 0) + 1
        squares = vectors.detach().float().square().sum(dim=0).double().cpu()
        sums[name] = sums[name] + squares if name in sums else squares
        counts[name] += len(vectors)

    with watching(checkpoint, downs, see), torch.no_grad():
        for batch in _moved(checkpoint, batches):
            calls.clear()
            batch_masks = masks_of(batch)
            checkpoint.forward(batch)
            progress()
    if not any(counts.values()):
        raise DataError("there is no calibration batch; give --data at least one row")
    found = {}
    for group in groups:
        module: Any = checkpoint.backbone.get_submodule(group.down)
        norms = input_columns(module, module.weight.detach()).double().square().sum(dim=0).cpu()
        seen = sums.get(group.down, torch.zeros_like(norms)) / max(counts[group.down], 1)
        found[group.key] = (norms * seen).reshape(group.units, -1).sum(dim=1)
    return found


# --- sums over a unit's weights -----------------------------------------------------------------


def _weights_of(model: nn.Module, group: Group) -> Iterator[str]:
    """Yield the names of the parameters that a group's units lie in."""
    for part in group.parts:
        yield f"{part.module}.weight"
        module: Any = model.get_submodule(part.module)
        if part.outputs and module.bias is not None:
            yield f"{part.module}.bias"


def _of_parts(
    model: nn.Module, group: Group, values: Mapping[str, Tensor]
) -> Iterator[tuple[Part, Tensor]]:
    """Yield each part's sums along its axis, (features,), of `values` by the parameter's name."""
    for part in group.parts:
        module: Any = model.get_submodule(part.module)
        weight, bias = values.get(f"{part.module}.weight"), values.get(f"{part.module}.bias")
        if weight is not None:
            yield part, input_columns(module, weight).double().sum(dim=1 if part.outputs else 0)
        if part.outputs and bias is not None:
            yield part, bias.double()


def _squared_weights(model: nn.Module, group: Group) -> Iterator[tuple[Part, Tensor]]:
    names = _weights_of(model, group)
    return _of_parts(model, group, {n: model.get_parameter(n).detach().square() for n in names})


def _unit_sums(group: Group, sums: Iterable[tuple[Part, Tensor]]) -> Tensor:
    """Return Σ over each unit's features of all parts, (units,)."""
    total = torch.zeros(group.units, dtype=torch.float64)
    for part, features in sums:
        # (copies, units, width)
        total += features.reshape(part.copies, group.units, part.width).sum(dim=(0, 2)).cpu()
    return total


# --- passes -------------------------------------------------------------------------------------


def _moved(checkpoint: Checkpoint, batches: Data) -> Iterator[dict[str, Tensor]]:
    device = next(checkpoint.module.parameters()).device
    for batch in batches:
        yield {name: value.to(device) for name, value in batch.items()}


def _mean(totals: Scores, count: int) -> Scores:
    if count == 0:
        raise DataError("there is no calibration batch; give --data at least one row")
    if not any(bool(total.any()) for total in totals.values()):
        raise ModelError(NO_GRADIENT)
    return {key: total / count for key, total in totals.items()}
