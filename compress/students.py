"""Layer stacks: finding them, reading their outputs, and making students from some of a teacher's."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from calib_data.errors import ConfigError, ModelError
from compress.adapters import refuse_adapters
from compress.checkpoint import Checkpoint


def layer_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the model's transformer layers.

    That is its only list of as many modules as the config says it has layers. Raises `ModelError`
    where there is none, or one in an encoder and one in a decoder.
    """
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and len({type(layer) for layer in module}) == 1
        and any(parameter.dim() == 2 for parameter in module[0].parameters())
    ]
    outermost = [(n, m) for n, m in found if not any(n.startswith(f"{o}.") for o, _ in found)]
    if len(outermost) != 1:
        raise ModelError(
            f"{type(model).__name__} has {len(outermost)} stacks of {count} layers; "
            "layers can be chosen where there is exactly one"
        )
    return outermost[0]


def evenly_spaced(layers: int, keep: int) -> list[int]:
    """Return `keep` layer indices from 0 to layers − 1, first and last among them where keep > 1."""
    if not 1 <= keep <= layers:
        raise ConfigError(f"--layers must be from 1 to the teacher's {layers}, got {keep}")
    if keep == 1:
        return [0]
    return [int(i * (layers - 1) / (keep - 1)) for i in range(keep)]


def student_from_layers(teacher: Checkpoint, keep: Sequence[int]) -> Checkpoint:
    """Return a copy of `teacher` with only the layers in `keep`, weights and config together."""
    if teacher.quantization:
        raise ModelError("a quantized checkpoint cannot be trained; start from the float one")
    refuse_adapters(teacher, "take layers of")
    module = copy.deepcopy(teacher.module)
    student = replace(teacher, module=module)
    stack_name, stack = layer_stack(student.backbone)
    parent_name, _, last = stack_name.rpartition(".")
    kept = nn.ModuleList(stack[i] for i in keep)
    setattr(student.backbone.get_submodule(parent_name), last, kept)
    for index, layer in enumerate(kept):
        for part in layer.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = index  # type: ignore[assignment]
    config: Any = student.config
    config.num_hidden_layers = len(keep)
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = [config.layer_types[i] for i in keep]
    structure = {}
    for key, count in teacher.structure.items():
        head, middle, rest = key.partition(f"{stack_name}.")
        index_text, _, tail = rest.partition(".")
        if not middle:
            structure[key] = count
        elif int(index_text) in keep:
            structure[f"{head}{middle}{list(keep).index(int(index_text))}.{tail}"] = count
    return replace(student, structure=structure)


@contextlib.contextmanager
def captured_layers(model: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that fills with each layer's output (batch, sequence, width) as `model` runs."""
    captured: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        captured.append(output if isinstance(output, torch.Tensor) else output[0])

    handles = [layer.register_forward_hook(keep) for layer in layer_stack(model)[1]]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()
