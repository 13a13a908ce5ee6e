"""Filling a smaller model of the same family with the teacher's most important weights.

The student is built from its config, so it is what `config.json` says. Each of its tensors is cut out
of the teacher's by comparing shapes: an axis along heads or neurons is known from `blocks`, and any
other axis that is shorter runs along the residual stream, whose channels are the same everywhere.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calib_data.errors import ModelError
from compress.axes import BIAS_PER_HEAD, Cut, along_units, stack_of
from compress.blocks import Group, Part, all_groups
from compress.checkpoint import Checkpoint
from compress.importance import Read, group_readers, importance_of
from compress.surgery import HIDDEN, feature_indices

CALIBRATION_BATCHES = 32  # to choose by; more hardly change which units are chosen


@dataclass(frozen=True)
class _Source:
    """Where a tensor of the student comes from."""

    name: str  # in the teacher
    cuts: tuple[Cut, ...]


def fill_(
    student: Any,
    teacher: Checkpoint,
    kept: Mapping[str, Sequence[int]],
    batches: Iterable[Mapping[str, Tensor]],
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, tuple[int, ...]]:
    """Copy the teacher's weights into `student`; return the units chosen, by group or "hidden".

    `kept` names the teacher's layers that the student's stacks are made of. Heads, neurons and
    channels are chosen by the derivative of the loss by a mask on each (see `importance`); a
    channel's mask covers every weight that writes to it or reads from it. Attentions that share
    something per head choose the same heads. `batches` are only read where there is a choice.
    Raises `ModelError` where a tensor is neither the teacher's nor cut out of one.
    """
    groups = {g.key: g for g in all_groups(teacher.backbone)}
    sizes = _sizes(groups, all_groups(student), kept)
    hidden = teacher.hidden_size, student.config.hidden_size
    sources = _sources(student, teacher.backbone, groups, sizes, hidden, kept)
    used = {cut.key for source in sources.values() for cut in source.cuts}
    chosen: dict[str, tuple[int, ...]] = {}
    if used:
        readers = group_readers(teacher, (groups[key] for key in used if key in groups))
        if HIDDEN in used:
            readers[HIDDEN] = _channel_reader(teacher.backbone, hidden[0], sources.values())
            sizes[HIDDEN] = hidden[1]
        calibration = itertools.islice(batches, CALIBRATION_BATCHES)
        scores = importance_of(teacher, readers, calibration, seed, progress)
        _share_scores_(scores, teacher.backbone, groups)
        chosen = {key: _best(scores[key], sizes[key]) for key in sorted(used)}
    own = student.state_dict()
    theirs = teacher.backbone.state_dict()
    with torch.no_grad():
        for name, source in sources.items():
            own[name].copy_(_cut_out(theirs[source.name], source.cuts, groups, chosen))
    return chosen


def original_name(name: str, kept: Mapping[str, Sequence[int]]) -> str:
    """Return the teacher's name of a module or tensor that the student calls `name`."""
    for stack, layers in kept.items():
        head, found, rest = name.partition(f"{stack}.")
        place, dot, tail = rest.partition(".")
        if found and not head and place.isdigit():
            return f"{stack}.{layers[int(place)]}{dot}{tail}"
    return name


def _sizes(
    teacher: Mapping[str, Group], student: Iterable[Group], kept: Mapping[str, Sequence[int]]
) -> dict[str, int]:
    """Return how many units the student keeps of each of the teacher's groups that it has."""
    sizes = {}
    for group in student:
        key = f"{original_name(group.name, kept)}.{group.kind}"
        if key not in teacher:
            raise ModelError(f"the teacher has no {key}, which the student's {group.key} needs")
        if teacher[key].units < group.units:
            option = {"heads": "--heads", "neurons": "--ffn"}[group.kind]
            raise ModelError(
                f"the teacher is pruned: {key} has {teacher[key].units} of {group.units}; "
                f"pass {option} with what its smallest layer has, or start from an unpruned teacher"
            )
        sizes[key] = group.units
    return sizes


def _sources(
    student: Any,
    teacher: Any,
    groups: Mapping[str, Group],
    sizes: Mapping[str, int],
    hidden: tuple[int | None, int],
    kept: Mapping[str, Sequence[int]],
) -> dict[str, _Source]:
    """Return, for each tensor of the student, where it comes from."""
    theirs = teacher.state_dict()
    along = along_units(teacher, (groups[key] for key in sizes))
    found = {}
    for name, value in student.state_dict().items():
        original = original_name(name, kept)
        if original not in theirs:  # T5's first layer holds the position bias of all
            original = original_name(name, {stack: [0] for stack in kept if f"{stack}.0." in name})
        if original not in theirs:
            raise ModelError(f"the teacher has no {original}, which the student's config asks for")
        shape = tuple(theirs[original].shape)
        cuts = []
        for axis, (before, after) in enumerate(zip(shape, value.shape)):
            if before == after:
                continue
            cut = along.get((original, axis))
            if cut is None and (before, after) == hidden:
                cut = Cut(HIDDEN, axis, Part("", False, 1))
            if cut is None:
                raise ModelError(
                    f"{original} has shape {shape} and becomes {tuple(value.shape)}, along an axis "
                    "that is no head's, neuron's or channel's; make the student by hand and pass "
                    "--student"
                )
            cuts.append(cut)
        found[name] = _Source(original, tuple(cuts))
    return found


def _channel_reader(model: Any, width: int | None, sources: Iterable[_Source]) -> Read:
    """Return what reads ∂L/∂mask of the residual stream's channels: Σ w·∂L/∂w over their weights."""
    parameters: Mapping[str, Tensor] = dict(model.named_parameters())  # tied ones once
    axes = sorted(
        {(s.name, c.axis) for s in sources for c in s.cuts if c.key == HIDDEN}
        & {(name, axis) for name, value in parameters.items() for axis in range(value.dim())}
    )

    def read() -> Tensor:
        total = torch.zeros(width or 0, dtype=torch.float64)
        for name, axis in axes:
            value = parameters[name]
            if value.grad is not None:
                product = (value.detach() * value.grad).double().movedim(axis, 0)
                total += product.flatten(1).sum(dim=1).cpu() if product.dim() > 1 else product.cpu()
        return total

    return read


def _share_scores_(
    scores: dict[str, Tensor], model: nn.Module, groups: Mapping[str, Group]
) -> None:
    """Give attentions that share something per head one score for all: the sum of their squares."""
    biased = {stack_of(name) for name in model.state_dict() if name.endswith(BIAS_PER_HEAD)}
    for stack in biased:
        members = [
            k for k in scores if k in groups and groups[k].kind == "heads" and stack_of(k) == stack
        ]
        total = sum(scores[k].square() for k in members)
        for key in members:
            scores[key] = total.sqrt()  # type: ignore[union-attr]


def _best(scores: Tensor, count: int) -> tuple[int, ...]:
    """Return the `count` highest scores' indices, ascending; the first ones among equals."""
    order = torch.argsort(scores, descending=True, stable=True)
    return tuple(sorted(order[:count].tolist()))


def _cut_out(
    value: Tensor,
    cuts: Sequence[Cut],
    groups: Mapping[str, Group],
    chosen: Mapping[str, Sequence[int]],
) -> Tensor:
    for cut in cuts:
        units = groups[cut.key].units if cut.key in groups else value.shape[cut.axis]
        indices = feature_indices(cut.part, units, chosen[cut.key])
        value = value.index_select(cut.axis, indices.to(value.device))
    return value
