"""Moving outliers of activations into weights, where nothing is to be computed in addition.

SmoothQuant (Xiao et al. 2022, arXiv:2211.10438): a channel of an activation is divided by what the
weights that take it are multiplied by. The division is for free where the channel is scaled by a
weight anyway: that of a norm, the rows of a value projection (attention only mixes positions), of
the linear half of a gated feed-forward, of a projection before a ReLU.

Which of these hold for a model is not asked of its family. Candidates come from names and from a run
that sees which norm a layer reads; each is then tried with factors that are powers of two, which
change no output by even a bit where the two scalings cancel, and much where they do not: where a
residual reads the norm as well, as in BERT, or where the activation is no ReLU.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calib_data.errors import ConfigError
from compress.blocks import Group, all_groups, features, input_columns, is_linear
from compress.calibration import Calibration, CalibrationData, InputStats, calibrate
from compress.checkpoint import Checkpoint

_TOLERANCE = 1e-5  # of the largest output: a norm that multiplies by 1 + weight rounds once more


@dataclass(frozen=True)
class Link:
    """A module whose output channels can be divided by what its readers multiply theirs by."""

    source: str
    outputs: Tensor  # (channels,) where each channel lies along the source's weight
    readers: tuple[str, ...]  # linear layers, all given the same
    inputs: Tensor  # (in,) the channel that each of their inputs belongs to
    offset: bool = False  # whether the source multiplies by 1 + weight

    @property
    def channels(self) -> int:
        """How many factors the link takes."""
        return len(self.outputs)


def find_links(checkpoint: Checkpoint) -> list[Link]:
    """Return the links of the checkpoint's backbone over which scaling leaves every output alone.

    The checkpoint is untouched.
    """
    trial = replace(checkpoint, module=copy.deepcopy(checkpoint.module))
    batch = checkpoint.signature.sample(batch=2, sequence=8, ragged=True)
    expected = trial.predict(batch)
    random = torch.Generator().manual_seed(0)

    def hold(links: Sequence[Link]) -> list[Link]:
        """Return those that hold, by halves: few trials where nearly all of them do, or few."""
        if not links:
            return []
        factors = [2.0 ** torch.randint(-2, 3, (x.channels,), generator=random) for x in links]
        for link, factor in zip(links, factors):
            scale_(trial.backbone, link, factor)
        same = _same(trial.predict(batch), expected)
        for link, factor in zip(links, factors):
            scale_(trial.backbone, link, 1 / factor)
        if same or len(links) == 1:
            return list(links) if same else []
        middle = len(links) // 2
        return hold(links[:middle]) + hold(links[middle:])

    readers, called = _run(trial)
    backbone = trial.backbone
    kinds = (_norms(backbone, readers), _values(backbone), _feed_forwards(backbone))
    found = [[link for link in kind if called.issuperset(link.readers)] for kind in kinds]
    return [link for kind in found for link in hold(kind)]


def smoothed(
    checkpoint: Checkpoint,
    alpha: float,
    batches: CalibrationData,
    progress: Callable[[], None] = lambda: None,
    state: Path | None = None,
) -> tuple[Checkpoint, Calibration]:
    """Return a copy of the checkpoint with its links scaled, and what told by how much.

    Raises `ConfigError` where the model has no link.
    """
    links = find_links(checkpoint)
    if not links:
        raise ConfigError(
            "no norm, value projection or feed-forward of this model can be scaled for nothing; "
            "leave out --smooth"
        )
    readers = dict.fromkeys(link.readers[0] for link in links)
    calibration = calibrate(checkpoint, readers, batches, progress=progress, state=state)
    made = replace(checkpoint, module=copy.deepcopy(checkpoint.module))
    smooth_(made, links, calibration.inputs, alpha)
    return made, calibration


def smooth_(
    checkpoint: Checkpoint, links: Iterable[Link], inputs: Mapping[str, InputStats], alpha: float
) -> None:
    """Scale the links of the checkpoint's backbone; what it computes stays the same.

    `inputs` tell what came into the first reader of each link. A channel is divided by
    max|x|^alpha / max|w|^(1 − alpha), over all weights that take it; the factors of a link have the
    geometric mean 1, so that no weight leaves the range of its type.
    """
    for link in links:
        if link.readers[0] in inputs:  # otherwise the data never reach it
            scale_(checkpoint.backbone, link, _factors(checkpoint.backbone, link, inputs, alpha))


def scale_(backbone: nn.Module, link: Link, factor: Tensor) -> None:
    """Divide the channels of the link's source by `factor` (channels,), multiply its readers."""
    source: Any = backbone.get_submodule(link.source)
    with torch.no_grad():
        if is_linear(source):
            rows = input_columns(source, source.weight)  # a view (out, in)
            rows[link.outputs] /= factor.to(rows).unsqueeze(1)
        elif link.offset:
            source.weight.copy_((1 + source.weight) / factor.to(source.weight) - 1)
        else:
            source.weight /= factor.to(source.weight)
        if getattr(source, "bias", None) is not None:
            source.bias[link.outputs] /= factor.to(source.bias)
        for name in link.readers:
            reader: Any = backbone.get_submodule(name)
            columns = input_columns(reader, reader.weight)
            columns *= factor[link.inputs].to(columns)


def _factors(
    backbone: nn.Module, link: Link, inputs: Mapping[str, InputStats], alpha: float
) -> Tensor:
    """Return what divides the channels, (channels,) float32; 1 where there is nothing to weigh."""
    activation, weight = torch.zeros(2, link.channels)
    seen = inputs[link.readers[0]].channel_max.float().cpu()
    activation.scatter_reduce_(0, link.inputs, seen, "amax")
    for name in link.readers:
        reader: Any = backbone.get_submodule(name)
        largest = input_columns(reader, reader.weight.detach()).float().abs().amax(0).cpu()
        weight.scatter_reduce_(0, link.inputs, largest, "amax")
    known = (activation > 0) & (weight > 0)
    factor = torch.ones(link.channels)
    found = activation[known] ** alpha / weight[known] ** (1 - alpha)
    factor[known] = found / found.log().mean().exp()
    return factor


def _same(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> bool:
    for name, y in expected.items():
        finite = np.abs(y[np.isfinite(y)])
        bound = _TOLERANCE * float(finite.max(initial=0))
        if not np.allclose(found[name], y, rtol=0, atol=bound, equal_nan=True):
            return False
    return True


# --- candidates ----------------------------------------------------------------------------------


def _run(checkpoint: Checkpoint) -> tuple[dict[str, list[str]], set[str]]:
    """Return the names of the linear layers that read each norm, and of all that were called."""
    made: list[tuple[str, Tensor]] = []
    readers: dict[str, list[str]] = {}
    called: set[str] = set()

    def read(name: str, args: tuple[Tensor, ...]) -> None:
        called.add(name)
        source = next((norm for norm, y in reversed(made) if args and _holds(y, args[0])), None)
        if source is not None and name not in readers.setdefault(source, []):
            readers[source].append(name)

    def write(name: str, y: Any) -> None:
        if isinstance(y, Tensor) and y.dim() > 1:
            made.append((name, y))

    handles = []
    for name, module in checkpoint.backbone.named_modules():
        if is_linear(module):
            before = lambda _, args, name=name: read(name, args)  # noqa: E731
            handles.append(module.register_forward_pre_hook(before))
        elif getattr(module, "weight", None) is not None and module.weight.dim() == 1:
            after = lambda _, args, y, name=name: write(name, y)  # noqa: E731
            handles.append(module.register_forward_hook(after))
    try:
        checkpoint.predict(checkpoint.signature.sample(batch=2, sequence=4))
    finally:
        for handle in handles:
            handle.remove()
    return readers, called


def _holds(y: Tensor, x: Tensor) -> bool:
    """Whether x is a view of y, or has y's vectors in another order, as windows of an image have."""
    if x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr():
        return True
    if x.numel() != y.numel() or x.shape[-1] != y.shape[-1]:
        return False
    return x.flatten(0, -2).amax(0).equal(y.flatten(0, -2).amax(0))


def _norms(backbone: nn.Module, readers: Mapping[str, list[str]]) -> Iterator[Link]:
    """Yield each norm that linear layers read, with all of those."""
    for source, names in readers.items():
        norm: Any = backbone.get_submodule(source)
        every = torch.arange(len(norm.weight))
        yield Link(source, every, tuple(names), every, _has_offset(norm))


def _has_offset(norm: Any) -> bool:
    """Whether a norm multiplies by 1 + its weight, as Gemma's does."""
    probe = copy.deepcopy(norm)
    with torch.no_grad():
        for value in probe.parameters():
            value.zero_()
        return bool(probe(torch.arange(1.0, 1 + len(norm.weight)).to(norm.weight)).any())


def _values(backbone: nn.Module) -> Iterator[Link]:
    """Yield the value projection of each attention, with the output projection that reads it."""
    for group in all_groups(backbone):
        if group.kind != "heads":
            continue
        *_, value, down = group.parts
        rows = torch.arange(features(backbone.get_submodule(value.module))[1])
        if len(group.parts) == 2:  # query, key and value in one, in turn within each copy
            width = down.width
            rows = rows.view(value.copies, group.units, -1, width)[-1, :, -1]
        rows = rows.reshape(group.units, -1)  # (key/value heads, width of one)
        channels = torch.arange(rows.numel()).view(group.units, 1, -1)
        repeats = down.width // rows.shape[1]  # query heads that share a key/value head
        inputs = channels.expand(-1, repeats, -1).flatten()
        if len(inputs) == features(backbone.get_submodule(down.module))[0]:
            yield Link(value.module, rows.flatten(), (down.module,), inputs)


def _feed_forwards(backbone: nn.Module) -> Iterator[Link]:
    """Yield the last projection up of each feed-forward: the linear half of those that are gated."""
    for group in all_groups(backbone):
        if group.kind == "neurons":
            yield _feed_forward(group)


def _feed_forward(group: Group) -> Link:
    up = group.parts[-2]
    every = torch.arange(group.units)
    return Link(up.module, every + (up.copies - 1) * group.units, (group.down,), every)
