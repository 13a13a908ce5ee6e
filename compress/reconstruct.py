"""Making up for what was removed: the weights that remain are fitted to what the block gave before.

A block's last projection adds up what its units hand on. Once some are gone, the others stand in for
them as well as what they hand on goes together: with x the units' results, 1 for the bias, and k those
that stay, the weights W = (G_kk + ρ D)⁻¹ (G_k W₀ + ρ D W₀_k) change the outputs least over the
calibration data, G = Σ x xᵀ being moments of the unpruned model. The ridge ρ D, D the diagonal of G_kk,
draws them to what they were: x is that of the unpruned model, and the pruned one's differs.

Each vector counts by one over its output's mean square. In a transformer a few tokens' vectors are a
hundred times the others', which a plain least-squares fit would be about; layer norms make of each what
counts relative to its size. Without these weights fitting makes MiniLM a good deal worse than not
(docs/results/pruning.md).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calib_data.errors import ConfigError, DataError, ModelError
from compress.blocks import Group, Part, features, find_groups, input_columns
from compress.checkpoint import Checkpoint
from compress.padding import input_layouts, masks_of, real_vectors
from compress.plan import PrunePlan
from compress.processes import on_device
from compress.resize import original_name
from compress.surgery import feature_indices

RIDGE = 0.1  # ρ: on MiniLM 0.01 and 1.0 are worse, 0.001 by far (docs/results/pruning.md)
_FLOOR = 0.1  # of a batch's median mean square is added, or an output of almost zero would decide
_LIMIT = 4 * 2**30  # bytes of moments that are held at once


@dataclass(frozen=True)
class Moment:
    """What came into a block's last projection: Σ weight × x xᵀ, float32, (in + 1, in + 1).

    The last row and column belong to the constant that its bias goes with; without a bias there are
    none, (in, in).
    """

    gram: Tensor
    count: int  # vectors seen


class Moments(Mapping[str, Moment]):
    """The moment of each group by key, gathered in as many passes over the data as memory asks for.

    Where all fit into `limit` bytes that is one pass. Otherwise each holds as many as do, and a group
    of another one is gathered when it is asked for: ask in the groups' order.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        groups: Sequence[Group],
        batches: Iterable[Mapping[str, Tensor]],
        progress: Callable[[], None],
        limit: int,
    ) -> None:
        self._checkpoint, self._batches, self._progress = checkpoint, batches, progress
        self._passes = _split([(group, _bytes(checkpoint, group)) for group in groups], limit)
        self._held: dict[str, Moment] = {}
        if len(self._passes) == 1:
            self._held = _gather(checkpoint, self._passes[0], batches, progress)

    def __getitem__(self, key: str) -> Moment:
        if key not in self._held:
            chosen = next((p for p in self._passes if any(g.key == key for g in p)), None)
            if chosen is None:
                raise KeyError(key)
            self._held = {}  # before the next ones need the memory
            self._held = _gather(self._checkpoint, chosen, self._batches, self._progress)
        return self._held[key]

    def __iter__(self) -> Iterator[str]:
        return (group.key for groups in self._passes for group in groups)

    def __len__(self) -> int:
        return sum(map(len, self._passes))

    @property
    def passes(self) -> int:
        """How often the data are gone through for all groups."""
        return len(self._passes)


def moments(
    checkpoint: Checkpoint,
    groups: Sequence[Group],
    batches: Iterable[Mapping[str, Tensor]],
    progress: Callable[[], None] = lambda: None,
    limit: int = _LIMIT,
) -> Moments:
    """Return what the last projections of `groups` are given by the unpruned `checkpoint`.

    `progress` is told of each batch of each pass. Padding does not count. Raises `DataError` for no
    batches, `ModelError` for numbers that are not finite.
    """
    return Moments(checkpoint, groups, batches, progress, limit)


@dataclass(frozen=True)
class Fit:
    """How far a block's outputs are from what they were, as a share of their mean square."""

    before: float  # with the weights that pruning left
    after: float


def reconstruct_(
    pruned: Checkpoint,
    source: Checkpoint,
    plan: PrunePlan,
    seen: Mapping[str, Moment],
    ridge: float = RIDGE,
) -> dict[str, Fit]:
    """Fit the last projections of `pruned` to the outputs that `source` had; return what that gave.

    `plan` made `pruned` of `source`, of which `moments` saw the groups. Only groups that lost units,
    and that calibration reached, are changed. Raises `ConfigError` for a plan that did not make it.
    """
    layers: Mapping[str, Sequence[int]] = getattr(plan, "layers", {})
    mine = {
        f"{original_name(group.name, layers)}.{group.kind}": group
        for group in find_groups(pruned.backbone)
    }
    fits = {}
    for group in find_groups(source.backbone):
        key = group.key
        kept = plan.keep.get(key)
        if key not in mine or kept is None or len(kept) == group.units or key not in seen:
            continue
        moment = seen[key]
        if moment.count:
            fits[key] = _fit_(
                pruned.backbone.get_submodule(mine[key].down),
                source.backbone.get_submodule(group.down),
                feature_indices(_down(group), group.units, kept),
                getattr(plan, "hidden", None),
                moment.gram,
                ridge,
            )
    return fits


# --- one projection -----------------------------------------------------------------------------


def _fit_(
    mine: Any, theirs: Any, kept: Tensor, outputs: Sequence[int] | None, gram: Tensor, ridge: float
) -> Fit:
    """Fit the projection `mine`, which keeps the features `kept` of `theirs`, and these outputs."""
    whole = _affine(theirs)  # (in + 1, out)
    if outputs is not None:
        whole = whole[:, list(outputs)]
    before = _affine(mine)
    if theirs.bias is not None:
        kept = torch.cat([kept, kept.new_tensor([len(whole) - 1])])
    if before.shape != (len(kept), whole.shape[1]):
        raise ConfigError(
            f"the plan keeps {len(kept)} inputs, the pruned projection has {len(before)}; "
            "reconstruct with the plan that pruned it"
        )
    gram = gram.double().cpu()
    own = gram[kept][:, kept]
    drawn = own.diagonal().clone()
    drawn[drawn == 0] = 1.0  # a feature that was never anything but zero stays as it is
    start = whole[kept]
    right = gram[kept] @ whole + ridge * drawn.unsqueeze(1) * start
    own.diagonal().add_(ridge * drawn)
    fitted = torch.cholesky_solve(right, torch.linalg.cholesky(own))
    with torch.no_grad():
        weight = fitted[: mine.weight.shape[1] if isinstance(mine, nn.Linear) else len(mine.weight)]
        mine.weight.copy_(input_columns(mine, weight.t()))
        if mine.bias is not None:
            mine.bias.copy_(fitted[-1])
    total = _energy(whole, gram)
    return Fit(
        before=_error(whole, before, kept, gram) / total,
        after=_error(whole, fitted, kept, gram) / total,
    )


def _affine(module: Any) -> Tensor:
    """Return a projection's weight and, as the last row, its bias: (in + 1, out), float64."""
    weight = input_columns(module, module.weight.detach()).t().double().cpu()  # (in, out)
    if module.bias is None:
        return weight
    return torch.cat([weight, module.bias.detach().double().cpu().unsqueeze(0)])


def _error(whole: Tensor, part: Tensor, kept: Tensor, gram: Tensor) -> float:
    """Return the weighted squared distance of the outputs of `part` to those of `whole`."""
    rest = whole.clone()
    rest[kept] -= part
    return _energy(rest, gram)


def _energy(weight: Tensor, gram: Tensor) -> float:
    return float((weight * (gram @ weight)).sum())


# --- gathering ----------------------------------------------------------------------------------


def _gather(
    checkpoint: Checkpoint,
    groups: Sequence[Group],
    batches: Iterable[Mapping[str, Tensor]],
    progress: Callable[[], None],
) -> dict[str, Moment]:
    """Return the moments of `groups`, in one pass."""
    model = checkpoint.backbone
    with on_device(checkpoint.module) as device, torch.no_grad():
        layouts = input_layouts(checkpoint, [group.down for group in groups])
        sums = {group.key: _Sum(layouts.get(group.down, ())) for group in groups}
        handles = [
            model.get_submodule(group.down).register_forward_hook(sums[group.key].see)
            for group in groups
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
    return {group.key: sums[group.key].moment(group.down) for group in groups}


class _Sum:
    """Adds up what one projection is given and gives."""

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
        """Return what was counted; a `ModelError` names the projection if it is not finite."""
        if self._gram is None:
            return Moment(torch.zeros(0, 0), 0)
        if not bool(self._gram.diagonal().isfinite().all()):
            raise ModelError(
                f"what {name} is given is not finite on the calibration data; "
                "check the weights and the data"
            )
        return Moment(self._gram.cpu(), self._count)


def _down(group: Group) -> Part:
    return next(part for part in group.parts if part.module == group.down)


def _bytes(checkpoint: Checkpoint, group: Group) -> int:
    module: Any = checkpoint.backbone.get_submodule(group.down)
    width = features(module)[0] + (module.bias is not None)
    return 4 * width**2


def _split(groups: Sequence[tuple[Group, int]], limit: int) -> list[list[Group]]:
    """Return the groups in runs whose bytes are at most `limit`, a larger one alone."""
    runs: list[list[Group]] = []
    held = 0
    for group, size in groups:
        if not runs or held + size > limit:
            runs.append([])
            held = 0
        runs[-1].append(group)
        held += size
    return runs
