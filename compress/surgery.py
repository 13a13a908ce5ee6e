"""Removing units for real: smaller weights, and the numbers that the forward pass reads off them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from calib_data.errors import ModelError
from compress.axes import follow_shape_, keep_along
from compress.blocks import Group, Part, find_groups, query_groups
from compress.stacks import described_stacks, drop_layers_
from compress.width import keep_channels_

HIDDEN = "hidden"  # the key of the residual stream's channels, beside the groups' own
_COUNTS = ("num_attention_heads", "num_heads", "n_heads")  # of query heads
_FOLLOW = {
    "heads": (*_COUNTS, "num_key_value_heads", "all_head_size", "split_size", "inner_dim"),
    "queries": (*_COUNTS, "num_key_value_groups", "all_head_size", "inner_dim"),
    "neurons": (),
}


def keep_units_(model: nn.Module, group: Group, keep: Sequence[int]) -> None:
    """Cut `group`'s weights down to the units in `keep` (ascending), all its projections together."""
    for part in group.parts:
        _keep_features_(model.get_submodule(part.module), part, group.units, keep)
    holder: Any = model.get_submodule(group.name) if group.name else model
    for name in dict.fromkeys((*_FOLLOW[group.kind], *group.follow)):
        stored = getattr(holder, name, None)
        if isinstance(stored, int):
            setattr(holder, name, stored * len(keep) // group.units)


def feature_indices(part: Part, units: int, keep: Sequence[int]) -> Tensor:
    """Return the indices along the part's axis that belong to the units in `keep`, ascending."""
    starts = torch.as_tensor(keep, dtype=torch.long) * part.width
    one_copy = (starts.unsqueeze(1) + torch.arange(part.width)).flatten()
    offsets = torch.arange(part.copies) * units * part.width
    return (offsets.unsqueeze(1) + one_copy).flatten()


def resize_(model: nn.Module, structure: Mapping[str, Any]) -> None:
    """Shrink `model` to the recorded numbers of units; which ones does not matter before loading.

    A group's number stands under its key, that of the residual stream's channels under `hidden`.
    Which layers a stack keeps stands under `STACK.layers` where no config tells how many; they may
    differ. Raises `ModelError` for what the model does not have, or has fewer of.
    """
    left = dict(structure)
    for stack, layers in described_stacks(model).items():
        kept = left.pop(f"{stack}.layers", None)
        if kept is not None:
            if not kept or not set(kept) <= set(range(len(layers))):
                raise _misfit(f"{stack}.layers", kept)
            drop_layers_(model, stack, kept)
    if HIDDEN in left:
        count = left.pop(HIDDEN)
        if not (isinstance(count, int) and count >= 1):
            raise _misfit(HIDDEN, count)
        keep_channels_(model, range(count))
    # an attention's key/value heads first: they bring their query heads along
    for find in (find_groups, query_groups):
        groups = {group.key: group for group in find(model)} if left else {}
        for key in [key for key in left if key in groups]:
            count = left.pop(key)
            if not (isinstance(count, int) and 1 <= count <= groups[key].units):
                raise _misfit(key, count)
            keep_units_(model, groups[key], range(count))
    for key, count in left.items():
        raise _misfit(key, count)


def _misfit(key: str, kept: Any) -> ModelError:
    return ModelError(f"the manifest keeps {kept} of {key}, which the model cannot hold")


def _keep_features_(module: Any, part: Part, units: int, keep: Sequence[int]) -> None:
    indices = feature_indices(part, units, keep)
    # nn.Linear holds (outputs, inputs), Conv1D (inputs, outputs)
    axis = 0 if part.outputs == isinstance(module, nn.Linear) else 1
    module.weight = keep_along(module.weight, axis, indices)
    if part.outputs and module.bias is not None:
        module.bias = keep_along(module.bias, 0, indices)
    follow_shape_(module)
