"""Students that are smaller teachers: of some of their layers, and narrower."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from calib_data.errors import ConfigError, ModelError
from compress.adapters import refuse_adapters
from compress.checkpoint import Checkpoint
from compress.depth import rebuilt, renumbered
from compress.resize import fill_
from compress.sentence import SentenceEncoder, narrowed
from compress.sizes import StudentShape, student_config
from compress.stacks import layer_stacks
from compress.surgery import HIDDEN, resize_


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
    _check_hidden(teacher, shape)
    backbone = rebuilt(model, student_config(model, kept, shape))
    structure = {} if shape.narrows else renumbered(teacher.structure, kept)
    resize_(backbone, structure)
    chosen = fill_(backbone, teacher, kept, batches, seed, progress)
    student = replace(teacher, module=backbone.eval(), structure=structure)
    if isinstance(teacher.module, SentenceEncoder):
        channels = chosen.get(HIDDEN, range(teacher.hidden_size or 0))
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


def _check_hidden(teacher: Checkpoint, shape: StudentShape) -> None:
    """Raise `ModelError` where a narrower student would be wider than a pruned teacher."""
    width, whole = teacher.hidden_size, getattr(teacher.config, "hidden_size", None)
    if shape.narrows and width and (shape.hidden or whole or 0) > width:
        raise ModelError(
            f"the teacher is pruned: its hidden size is {width} of {whole}; pass --hidden with at most "
            f"{width}, or start from an unpruned teacher"
        )
