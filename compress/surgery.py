"""Removing units for real: smaller weights, and the numbers that the forward pass reads off them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from calib_data.errors import ModelError
from compress.blocks import Group, Part, find_groups


def keep_units_(model: nn.Module, group: Group, keep: Sequence[int]) -> None:
    """Cut `group`'s weights down to the units in `keep` (ascending), all its projections together."""
    for part in group.parts:
        _keep_features_(model.get_submodule(part.module), part, group.units, keep)
    holder: Any = model.get_submodule(group.name) if group.name else model
    if group.kind == "heads":
        _follow_heads_(holder, group, len(keep))


def feature_indices(part: Part, units: int, keep: Sequence[int]) -> Tensor:
    """Return the indices along the part's axis that belong to the units in `keep`, ascending."""
    starts = torch.as_tensor(keep, dtype=torch.long) * part.width
    one_copy = (starts.unsqueeze(1) + torch.arange(part.width)).flatten()
    offsets = torch.arange(part.copies) * units * part.width
    return (offsets.unsqueeze(1) + one_copy).flatten()


def resize_(model: nn.Module, structure: Mapping[str, int]) -> None:
    """Shrink `model` to the recorded numbers of units; which ones does not matter before loading.

    Raises `ModelError` for a group that the model does not have, or has fewer units of.
    """
    if not structure:
        return
    groups = {group.key: group for group in find_groups(model)}
    for key, count in structure.items():
        fits = key in groups and isinstance(count, int) and 1 <= count <= groups[key].units
        if not fits:
            raise ModelError(f"the manifest keeps {count} of {key}, which the model cannot hold")
        keep_units_(model, groups[key], range(count))


def _keep_features_(module: Any, part: Part, units: int, keep: Sequence[int]) -> None:
    indices = feature_indices(part, units, keep).to(module.weight.device)
    # nn.Linear holds (outputs, inputs), Conv1D (inputs, outputs)
    axis = 0 if part.outputs == isinstance(module, nn.Linear) else 1
    module.weight = nn.Parameter(
        module.weight.detach().index_select(axis, indices).contiguous(),
        requires_grad=module.weight.requires_grad,
    )
    if part.outputs and module.bias is not None:
        module.bias = nn.Parameter(
            module.bias.detach().index_select(0, indices), requires_grad=module.bias.requires_grad
        )
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif part.outputs:
        module.nf = module.weight.shape[1]


def _follow_heads_(holder: Any, group: Group, count: int) -> None:
    """Update the head counts that an attention stores beside its weights."""
    for name in ("num_attention_heads", "num_heads", "n_heads", "num_key_value_heads"):
        stored = getattr(holder, name, None)
        if isinstance(stored, int):
            setattr(holder, name, stored * count // group.units)
    for name in ("all_head_size", "split_size", "inner_dim"):
        stored = getattr(holder, name, None)
        if isinstance(stored, int):
            setattr(holder, name, stored // group.units * count)
