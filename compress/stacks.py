"""Stacks of transformer layers: finding them, and cutting layers out of a model without a config."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from calib_data.errors import ModelError
from compress.described import described_stacks

# what configs call the number of layers; of a decoder where "decoder" is part of the name
LAYERS = ("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


def layer_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the model's transformer layers.

    That is its only list of as many modules as the config says it has layers. Raises `ModelError`
    where there is none, or one in an encoder and one in a decoder.
    """
    found = layer_stacks(model)
    if len(found) != 1:
        raise ModelError(
            f"{type(model).__name__} has {len(found)} stacks of layers, and here there must be "
            "exactly one"
        )
    return next(iter(found.items()))


def layer_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the model's stacks of transformer layers by name: two where it encodes and decodes."""
    config = getattr(model, "config", None)
    counts = {getattr(config, name, None) for name in LAYERS}
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) in counts
        and len({type(layer) for layer in module}) == 1
        and any(parameter.dim() == 2 for parameter in module[0].parameters())
    }
    return {n: m for n, m in found.items() if not any(n.startswith(f"{o}.") for o in found)}


def droppable_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the stacks whose layers can be dropped one by one: a model's own, or as it says."""
    return described_stacks(model) or layer_stacks(model)


def drop_layers_(model: nn.Module, stack: str, keep: Sequence[int]) -> None:
    """Cut the list called `stack` down to the layers in `keep`, numbered anew where they know it."""
    layers: Any = model.get_submodule(stack)
    holder, _, name = stack.rpartition(".")
    setattr(model.get_submodule(holder), name, nn.ModuleList(layers[i] for i in keep))
    for place, layer in enumerate(model.get_submodule(stack).children()):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = place  # type: ignore[assignment]
