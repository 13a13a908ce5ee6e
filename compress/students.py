"""Layer stacks: finding them; and making students that are smaller teachers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from calib_data.errors import ConfigError, ModelError
from compress.adapters import refuse_adapters
from compress.checkpoint import Checkpoint
from compress.resize import fill_
from compress.sentence import SentenceEncoder, narrowed
from compress.sizes import LAYERS, StudentShape, build, student_config
from compress.surgery import resize_


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


def evenly_spaced(layers: int, keep: int) -> list[int]:
    """Return `keep` layer indices from 0 to layers − 1, first and last among them where keep > 1."""
    if not 1 <= keep <= layers:
        raise ConfigError(f"--layers must be from 1 to the teacher's {layers}, got {keep}")
    if keep == 1:
        return [0]
    return [int(i * (layers - 1) / (keep - 1)) for i in range(keep)]


def make_student(
    teacher: Checkpoint,
    shape: StudentShape,
    batches: Iterable[Mapping[str, Tensor]] = (),
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> Checkpoint:
    """Return a smaller model of the teacher's family, filled with the teacher's weights.

    It has the layers that `shape` names, the same ones of encoder and decoder, and its widths:
    heads, neurons and channels of the residual stream chosen by importance on `batches` (see
    `resize.fill_`). Its config says all of its sizes, unless only layers of a pruned teacher are
    chosen, which keep their own widths. Raises `ConfigError` for a shape that the family cannot
    have, `ModelError` for a teacher that no student can be made of.
    """
    model: Any = teacher.backbone
    if teacher.quantization:
        raise ModelError("a quantized checkpoint cannot be trained; start from the float one")
    refuse_adapters(teacher, "make a student of")
    if teacher.factory or not hasattr(model, "_from_config"):
        raise ModelError(
            f"{type(model).__name__} has its sizes in code, not in a config; "
            "make the student by hand and pass --student"
        )
    kept = _kept_layers(model, shape)
    backbone = build(model, student_config(model, kept, shape))
    if getattr(model, "pooler", True) is None:
        backbone.pooler = None
    if hasattr(model, "generation_config"):
        backbone.generation_config = model.generation_config
    structure = {} if shape.narrows else _structure(teacher, kept)
    resize_(backbone, structure)
    chosen = fill_(backbone, teacher, kept, batches, seed, progress)
    student = replace(teacher, module=backbone.eval(), structure=structure)
    if isinstance(teacher.module, SentenceEncoder):
        channels = chosen.get("hidden", range(model.config.hidden_size))
        student = replace(student, module=narrowed(teacher.module, backbone, channels).eval())
    return student


def _kept_layers(model: nn.Module, shape: StudentShape) -> dict[str, Sequence[int]]:
    """Return the teacher's layers that stay, by stack; nothing where the shape names none."""
    if not (shape.layers or shape.keep_layers):
        return {}
    stacks = layer_stacks(model)
    if not stacks:
        raise ModelError(
            f"{type(model).__name__} has no list of layers as long as its config says, so none can "
            "be chosen; it may share one layer's weights among all"
        )
    kept: dict[str, Sequence[int]] = {}
    for name, stack in stacks.items():
        kept[name] = shape.keep_layers or evenly_spaced(len(stack), shape.layers or 0)
        if not 0 <= min(kept[name]) <= max(kept[name]) < len(stack):
            raise ConfigError(
                f"--keep-layers must be from 0 to {len(stack) - 1}, the layers of the teacher's "
                f"{name}, got {','.join(map(str, kept[name]))}"
            )
    return kept


def _structure(teacher: Checkpoint, kept: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return the teacher's pruned widths under the student's names."""
    places = {
        f"{stack}.{layer}.": f"{stack}.{place}."
        for stack, layers in kept.items()
        for place, layer in enumerate(layers)
    }
    structure = {}
    for key, count in teacher.structure.items():
        stack = next((s for s in kept if key.startswith(f"{s}.")), None)
        layer = next((old for old in places if key.startswith(old)), None)
        if layer is not None:
            structure[places[layer] + key.removeprefix(layer)] = count
        elif stack is None:
            structure[key] = count
    return structure
