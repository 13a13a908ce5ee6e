"""What runs along the axes of a model's tensors, and cutting along them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from compress.blocks import Group, Part

BIAS_PER_HEAD = ("relative_attention_bias.weight",)  # (buckets, heads), one for a whole stack
_LIKE_QUERY = ("pos_key_proj", "pos_query_proj", "pos_proj", "pos_q_proj")  # of positions, per head


@dataclass(frozen=True)
class Cut:
    """One axis of one tensor that keeps some units of a group, or some channels."""

    key: str  # of the units that are chosen
    axis: int
    part: Part  # where the units lie along the axis


def along_units(model: nn.Module, groups: Iterable[Group]) -> dict[tuple[str, int], Cut]:
    """Return what lies along the axes of the tensors that hold heads or neurons of `groups`."""
    found = {}
    groups = tuple(groups)
    for group in groups:
        for part in group.parts:
            # nn.Linear holds (outputs, inputs), Conv1D (inputs, outputs)
            axis = (
                0 if part.outputs == isinstance(model.get_submodule(part.module), nn.Linear) else 1
            )
            found[f"{part.module}.weight", axis] = Cut(group.key, axis, part)
            if part.outputs:
                found[f"{part.module}.bias", 0] = Cut(group.key, 0, part)
    heads = [group for group in groups if group.kind == "heads"]
    for name, value in model.state_dict().items():
        holder, _, kind = name.rpartition(".")
        if name.endswith(BIAS_PER_HEAD):
            beside = [g for g in heads if stack_of(g.name) == stack_of(name)]
            axis, width = value.dim() - 1, 1
        elif holder.endswith(_LIKE_QUERY) and kind in ("weight", "bias"):
            beside = [g for g in heads if g.name == holder.rpartition(".")[0]]
            axis, width = 0, beside[0].parts[0].width if beside else 0
        else:
            continue
        if beside:
            found[name, axis] = Cut(beside[0].key, axis, Part(name, False, width))
    return found


def stack_of(name: str) -> str:
    """Return the first part of a module's name: what shares a bias begins alike."""
    return name.partition(".")[0]


def keep_along(value: Tensor, axis: int, indices: Tensor) -> Tensor:
    """Return `value`, or a parameter of its kind, with only `indices` along `axis`."""
    kept = value.detach().index_select(axis, indices.to(value.device)).contiguous()
    is_parameter = isinstance(value, nn.Parameter)
    return nn.Parameter(kept, requires_grad=value.requires_grad) if is_parameter else kept


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers by name, tied ones under each of theirs."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def follow_shape_(module: Any) -> None:
    """Correct the sizes that a module stores beside its weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif type(module).__name__ == "Conv1D":
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = module.weight.shape[:2]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = tuple(module.weight.shape)
