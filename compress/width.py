"""The width of the residual stream: what runs along it, and cutting it through a whole model.

Which axes those are is asked of the model itself: it is built twice from its config, as it is and twice
as wide, without memory for the weights. What became twice as long and holds neither heads nor neurons
runs along the stream. So positions that happen to be as many as channels are told apart from them.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from calib_data.errors import ModelError
from compress.axes import along_units, follow_shape_, keep_along, named_tensors
from compress.blocks import all_groups
from compress.sizes import build, wider_config

# by class and config, which tell it all: a plan is checked, applied and tried against the same axes
_KNOWN: dict[tuple[type, str], dict[str, tuple[int, ...]]] = {}


def hidden_axes(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the axes along the residual stream of each tensor that has any, by its name.

    Raises `ModelError` for a model whose sizes stand in code, or whose family ties them otherwise.
    """
    if not hasattr(model, "_from_config"):
        raise ModelError(
            f"{type(model).__name__} has its sizes in code, not in a config, so what its hidden size "
            "runs through cannot be found; leave hidden whole"
        )
    key = type(model), model.config.to_json_string(use_diff=False)
    if key not in _KNOWN:
        _KNOWN[key] = _find_axes(model)
    return dict(_KNOWN[key])


def _find_axes(model: Any) -> dict[str, tuple[int, ...]]:
    config = wider_config(model)
    plain, wide = build(model, model.config, "meta"), build(model, config, "meta").state_dict()
    along = along_units(plain, all_groups(plain))
    hidden = model.config.hidden_size, config.hidden_size
    found: dict[str, tuple[int, ...]] = {}
    for name, value in plain.state_dict().items():
        for axis, pair in enumerate(zip(value.shape, wide[name].shape)):
            if pair[0] == pair[1] or (name, axis) in along:
                continue
            if pair != hidden:
                raise ModelError(
                    f"{name} of {model.config.model_type} has {pair[0]} features that change with the "
                    f"hidden size {hidden[0]}, but not alike; leave hidden whole"
                )
            found[name] = (*found.get(name, ()), axis)
    return found


def hidden_size(model: nn.Module, axes: Mapping[str, tuple[int, ...]] | None = None) -> int:
    """Return how many channels the residual stream of `model` has now, given its `hidden_axes`."""
    known = hidden_axes(model) if axes is None else axes
    return next(value.shape[known[n][0]] for n, value in named_tensors(model) if n in known)


def keep_channels_(model: nn.Module, keep: Sequence[int]) -> None:
    """Cut everything along the residual stream of `model` down to the channels in `keep`, ascending.

    Its config stays, for the width of heads and the scale of embeddings were set by it.
    """
    axes, indices = hidden_axes(model), torch.as_tensor(keep)
    before = hidden_size(model, axes)
    if not 0 <= min(keep) <= max(keep) < before:
        raise ModelError(f"{len(keep)} channels up to {max(keep)} cannot be kept of {before}")
    cut: dict[int, Tensor] = {}  # by what it was, so that tied weights stay tied
    old = list(named_tensors(model))  # kept alive, so that no new tensor takes an old one's id
    for name, value in old:
        if name not in axes:
            continue
        if id(value) not in cut:
            cut[id(value)] = value
            for axis in axes[name]:
                cut[id(value)] = keep_along(cut[id(value)], axis, indices)
        holder, _, last = name.rpartition(".")
        module = model.get_submodule(holder)
        setattr(module, last, cut[id(value)])
        follow_shape_(module)
    for module in model.modules():
        if _is_bare_norm(module, before):
            module.normalized_shape = (len(keep),)  # type: ignore[assignment]


def mask_channels_(model: nn.Module, keep: Sequence[int]) -> None:
    """Silence the channels of the residual stream beyond `keep`: what cutting must be equal to.

    What writes to them or reads from them is zero. A norm takes its statistics over the channels that
    stay, for so it will once the others are gone.
    """
    axes = hidden_axes(model)
    before = hidden_size(model, axes)
    stay = torch.as_tensor(keep)
    gone = torch.tensor(sorted(set(range(before)) - set(keep)), dtype=torch.long)
    for name, module in list(model.named_modules()):
        own = dict(module.named_parameters(recurse=False))
        elementwise = all(f"{name}.{k}" in axes and v.dim() == 1 for k, v in own.items())
        is_leaf = not list(module.children())
        if (own and elementwise and is_leaf) or _is_bare_norm(module, before):
            module.forward = _over(_narrowed(module, stay), stay)
    with torch.no_grad():
        for name, value in named_tensors(model):
            for axis in axes.get(name, ()):
                value.index_fill_(axis, gone.to(value.device), 0)


def _is_bare_norm(module: nn.Module, width: int) -> bool:
    """Whether `module` is a norm over `width` channels without weights."""
    shape = getattr(module, "normalized_shape", None)
    return shape is not None and tuple(shape) == (width,) and not list(module.parameters())


def _narrowed(module: Any, stay: Tensor) -> nn.Module:
    """Return a copy of a norm, or of a scale per channel, over the channels that stay."""
    small: nn.Module = copy.deepcopy(module)
    for name, value in module.named_parameters(recurse=False):
        setattr(small, name, keep_along(value, 0, stay))
    if hasattr(small, "normalized_shape"):
        small.normalized_shape = (len(stay),)  # type: ignore[assignment]
    return small


def _over(small: nn.Module, stay: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what applies `small` to the channels in `stay` and gives zeros for the others."""

    def forward(hidden: Tensor) -> Tensor:
        made = torch.zeros_like(hidden)
        made[..., stay] = small(hidden[..., stay])
        return made

    return forward
