"""Second moments of what linear layers are given, each vector counted by what it is given to.

A vector counts by one over its output's mean square. In a transformer a few tokens' vectors are a
hundred times the others', which a plain moment would be about; layer norms make of each what counts
relative to its size.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calib_data.errors import DataError, ModelError
from compress.blocks import Group, features
from compress.checkpoint import Checkpoint
from compress.padding import input_layouts, masks_of, real_vectors
from compress.processes import on_device

_FLOOR = 0.1  # of a batch's median mean square is added, or an output of almost zero would decide
_LIMIT = 4 * 2**30  # bytes of moments that are held at once


@dataclass(frozen=True)
class Moment:
    """What came into a linear layer: Σ weight × x xᵀ, float32, (in + 1, in + 1).

    The last row and column belong to the constant 1 that its bias goes with; without a bias there are
    none, (in, in).
    """

    gram: Tensor
    count: int  # vectors seen


class Moments(Mapping[str, Moment]):
    """The moment of each layer by key, gathered in as many passes over the data as memory asks for.

    Nothing is gathered before it is asked for. Where all fit into `limit` bytes that is one pass.
    Otherwise each holds as many as do, and a layer of another one costs another pass: ask in order.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: Mapping[str, str],
        batches: Iterable[Mapping[str, Tensor]],
        progress: Callable[[], None],
        limit: int,
    ) -> None:
        self._checkpoint, self._batches, self._progress = checkpoint, batches, progress
        self._layers = layers  # key → name of the module
        sizes = {key: _bytes(checkpoint, name) for key, name in layers.items()}
        self._passes = _split(sizes, limit)
        self._held: dict[str, Moment] = {}

    def __getitem__(self, key: str) -> Moment:
        if key not in self._held:
            if key not in self._layers:
                raise KeyError(key)
            self._gather(next(keys for keys in self._passes if key in keys))
        return self._held[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def passes(self) -> int:
        """How often the data are gone through for all layers."""
        return len(self._passes)

    def _gather(self, keys: Sequence[str]) -> None:
        self._held = {}  # before the next ones need the memory
        names = list(dict.fromkeys(self._layers[key] for key in keys))
        found = _gather(self._checkpoint, names, self._batches, self._progress)
        self._held = {key: found[self._layers[key]] for key in keys}


def moments(
    checkpoint: Checkpoint,
    groups: Sequence[Group],
    batches: Iterable[Mapping[str, Tensor]],
    progress: Callable[[], None] = lambda: None,
    limit: int = _LIMIT,
) -> Moments:
    """Return what the last projections of `groups` are given by the unpruned `checkpoint`, by key.

    `progress` is told of each batch of each pass. Padding does not count. Asking for one raises
    `DataError` for no batches, `ModelError` for numbers that are not finite.
    """
    layers = {group.key: group.down for group in groups}
    return Moments(checkpoint, layers, batches, progress, limit)


def layer_moments(
    checkpoint: Checkpoint,
    names: Iterable[str],
    batches: Iterable[Mapping[str, Tensor]],
    progress: Callable[[], None] = lambda: None,
    limit: int = _LIMIT,
) -> Moments:
    """Return what the linear layers `names` of the backbone are given, by name; as `moments` does."""
    return Moments(checkpoint, {name: name for name in names}, batches, progress, limit)


# --- gathering ----------------------------------------------------------------------------------


def _gather(
    checkpoint: Checkpoint,
    names: Sequence[str],
    batches: Iterable[Mapping[str, Tensor]],
    progress: Callable[[], None],
) -> dict[str, Moment]:
    """Return the moments of the layers `names`, in one pass."""
    model = checkpoint.backbone
    with on_device(checkpoint.module) as device, torch.no_grad():
        layouts = input_layouts(checkpoint, names)
        sums = {name: _Sum(layouts.get(name, ())) for name in names}
        handles = [
            model.get_submodule(name).register_forward_hook(one.see) for name, one in sums.items()
        ]
        passed = 0
        try:
            for batch in batches:
                moved = {name: value.to(device) for name, value in batch.items()}
                masks = masks_of(moved)
                for one in sums.values():
                    one.start(masks)
                checkpoint.forward(moved)
                passed += 1
                progress()
        finally:
            for handle in handles:
                handle.remove()
    if not passed:
        raise DataError("there is no calibration batch; give --data at least one row")
    return {name: one.moment(name) for name, one in sums.items()}


class _Sum:
    """Adds up what one layer is given and gives."""

    def __init__(self, layout: tuple[str | None, ...]) -> None:
        self._layout = layout
        self._masks: Mapping[str, Tensor] = {}
        self._calls, self._count = 0, 0
        self._gram: Tensor | None = None

    def start(self, masks: Mapping[str, Tensor]) -> None:
        """Begin a batch with these masks."""
        self._masks, self._calls = masks, 0

    def see(self, module: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Count one call; a forward hook."""
        call, self._calls = self._calls, self._calls + 1
        x, y = (real_vectors(v, self._layout, call, self._masks) for v in (inputs[0], output))
        if not len(x):
            return
        x, power = x.float(), y.float().square().mean(dim=1, keepdim=True)  # (n, in), (n, 1)
        if module.bias is not None:
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        power = power + _FLOOR * power.median()
        scaled = (
            x / torch.where(power == 0, 1.0, power).sqrt()
        )  # all outputs zero: nothing is large
        if self._gram is None:
            self._gram = x.new_zeros(x.shape[1], x.shape[1])
        self._gram.addmm_(scaled.T, scaled)
        self._count += len(x)

    def moment(self, name: str) -> Moment:
        """Return what was counted; a `ModelError` names the layer if it is not finite."""
        if self._gram is None:
            return Moment(torch.zeros(0, 0), 0)
        if not bool(self._gram.diagonal().isfinite().all()):
            raise ModelError(
                f"what {name} is given is not finite on the calibration data; "
                "check the weights and the data"
            )
        return Moment(self._gram.cpu(), self._count)


def _bytes(checkpoint: Checkpoint, name: str) -> int:
    module: Any = checkpoint.backbone.get_submodule(name)
    width = features(module)[0] + (module.bias is not None)
    return 4 * width**2


def _split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Return the keys in runs whose sizes add up to `limit` at most, a larger one alone."""
    runs: list[list[str]] = []
    held = 0
    for key, size in sizes.items():
        if not runs or held + size > limit:
            runs.append([])
            held = 0
        runs[-1].append(key)
        held += size
    return runs
