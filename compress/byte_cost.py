"""What a model's parts weigh: the cost that a plan for a size is chosen by."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from compress.allocate import Cost, layer_of
from compress.blocks import Group, find_groups
from compress.checkpoint import weights_of
from compress.stacks import droppable_stacks


def byte_cost(model: nn.Module) -> Cost:
    """Return the bytes of each part of the model's weights; shared ones count once, as fixed."""
    groups = find_groups(model)
    per_unit = {group.key: _bytes_per_unit(model, group) for group in groups}
    stacks = droppable_stacks(model)
    total = _bytes(weights_of(model).values())
    layers: dict[str, float] = {}
    for stack, members in stacks.items():
        # the average: layers may differ, and plans do not look at which is which
        inside = [group for group in groups if layer_of(group, [stack])]
        whole = _bytes(weights_of(members).values())
        blocks = sum(per_unit[group.key] * group.units for group in inside)
        layers[stack] = (whole - blocks) / len(members)
    spent = sum(per_unit[group.key] * group.units for group in groups)
    spent += sum(layers[stack] * len(members) for stack, members in stacks.items())
    depth = {stack: len(members) for stack, members in stacks.items()}
    return Cost(lambda group, units: per_unit[group.key] * units, total - spent, layers, depth)


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of the model's weights, shared ones once."""
    return int(_bytes(weights_of(model).values()))


def _bytes(tensors: Iterable[Tensor]) -> float:
    return float(sum(value.numel() * value.element_size() for value in tensors))


def _bytes_per_unit(model: nn.Module, group: Group) -> float:
    """Return the bytes that go with one of the group's units."""
    taken = 0.0
    seen: Mapping[str, Any] = {
        part.module: model.get_submodule(part.module) for part in group.parts
    }
    for part in group.parts:
        module = seen[part.module]
        features = part.width * part.copies
        # a unit's rows or columns are as long as the other axis
        along = _axis(module, part.outputs)
        weight = module.weight
        taken += weight.numel() / weight.shape[along] * features * weight.element_size()
        if part.outputs and module.bias is not None:
            taken += features * module.bias.element_size()
    return taken


def _axis(module: Any, outputs: bool) -> int:
    """Return the axis of the weight that `outputs` or inputs lie along: Conv1D's are the other way."""
    return 0 if outputs == isinstance(module, nn.Linear) else 1
