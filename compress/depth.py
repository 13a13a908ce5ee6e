"""Dropping whole layers: the residual path goes on as if they were not there."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from calib_data.errors import ModelError
from compress.checkpoint import Checkpoint
from compress.resize import fill_, original_name
from compress.sentence import SentenceEncoder, narrowed
from compress.sizes import build, keep_layers_
from compress.stacks import described_stacks, drop_layers_, layer_stacks
from compress.surgery import resize_


def keep_layers(checkpoint: Checkpoint, kept: Mapping[str, Sequence[int]]) -> Checkpoint:
    """Return a copy of `checkpoint` with only the layers in `kept`, by stack, ascending.

    A transformers model is built anew from a config of fewer layers, so that all it derives from
    their number follows; a user's own is cut. Raises `ModelError` for a model whose config does not
    set the number of its layers alone, or that builds a layer differently in its new place.
    """
    model: Any = checkpoint.backbone
    structure = renumbered(checkpoint.structure, kept)
    stacks = described_stacks(model)
    if all(stack in stacks for stack in kept):
        module = copy.deepcopy(checkpoint.module)
        cut = replace(checkpoint, module=module)
        for stack, layers in kept.items():
            drop_layers_(cut.backbone, stack, layers)
            before = checkpoint.structure.get(f"{stack}.layers", range(len(stacks[stack])))
            structure[f"{stack}.layers"] = [before[i] for i in layers]
        return replace(cut, structure=structure)
    if checkpoint.factory or not hasattr(model, "_from_config"):
        raise ModelError(
            f"{type(model).__name__} has its sizes in code, not in a config; name the lists whose "
            'blocks may be dropped in its onnxpress_blocks = {"layers": […]} (see the guide)'
        )
    config = copy.deepcopy(model.config)
    keep_layers_(config, kept)
    backbone = rebuilt(model, config)
    _check_layers(backbone, model, kept)
    resize_(backbone, structure)
    fill_(backbone, checkpoint, kept, ())
    _be_alike_(backbone, model, kept)
    outer = checkpoint.module
    if isinstance(outer, SentenceEncoder):
        module = narrowed(outer, backbone, range(checkpoint.hidden_size or 0))
    else:
        module = backbone
    return replace(checkpoint, module=module.eval(), structure=structure)


def skip_layers_(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
    """Let every other layer hand on what it is given: what dropping it must be equal to."""
    for stack, layers in kept.items():
        for place, layer in enumerate(model.get_submodule(stack).children()):
            if place not in layers:
                layer.register_forward_hook(_given, with_kwargs=True)


def rebuilt(model: Any, config: Any) -> Any:
    """Return a fresh model of the class of `model` from `config`, without the parts that it lacks."""
    backbone = build(model, config)
    if getattr(model, "pooler", True) is None:
        backbone.pooler = None
    if hasattr(model, "generation_config"):
        backbone.generation_config = model.generation_config
    return backbone


def renumbered(structure: Mapping[str, Any], kept: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return the recorded widths under the names that they have with only the layers in `kept`."""
    places = {
        f"{stack}.{layer}.": f"{stack}.{place}."
        for stack, layers in kept.items()
        for place, layer in enumerate(layers)
    }
    found = {}
    for key, count in structure.items():
        layer = next((old for old in places if key.startswith(old)), None)
        if layer is not None:
            found[places[layer] + key.removeprefix(layer)] = count
        elif not any(key.startswith(f"{stack}.") for stack in kept):
            found[key] = count
    return found


def _check_layers(backbone: Any, model: Any, kept: Mapping[str, Sequence[int]]) -> None:
    """Raise `ModelError` unless `backbone` has the layers in `kept`, each with all it holds now."""
    stacks = layer_stacks(backbone)
    for stack, layers in kept.items():
        if len(stacks.get(stack, ())) != len(layers):
            raise ModelError(
                f"the config of {model.config.model_type} does not set the layers of {stack} alone "
                "(layers may share their weights), so none can be dropped"
            )
        for place, layer in enumerate(layers):
            new = set(stacks[stack][place].state_dict())
            lost = sorted(set(model.get_submodule(f"{stack}.{layer}").state_dict()) - new)
            if lost:
                raise ModelError(
                    f"{model.config.model_type} builds {stack}.{place} without {lost[0]}, which "
                    f"layer {layer} has and would lose in that place; keep layer {place}"
                )


def _be_alike_(backbone: Any, model: Any, kept: Mapping[str, Sequence[int]]) -> None:
    """Put `backbone` where `model` is, in its precision, and freeze what is frozen there."""
    first = next(model.parameters())
    backbone.to(device=first.device, dtype=first.dtype)
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    for name, value in backbone.named_parameters():
        value.requires_grad_(original_name(name, kept) not in frozen)


def _given(_module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    """Return a layer's output with the hidden states that it was given instead of its own."""
    given = args[0] if args else kwargs["hidden_states"]
    return given if isinstance(output, Tensor) else (given, *output[1:])
