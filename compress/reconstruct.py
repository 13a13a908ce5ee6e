"""Making up for what was removed: the weights that remain are fitted to what the block gave before.

A block's last projection adds up what its units hand on. Once some are gone, the others stand in for
them as well as what they hand on goes together: with x the units' results, 1 for the bias, and k those
that stay, the weights W = (G_kk + ρ D)⁻¹ (G_k W₀ + ρ D W₀_k) change the outputs least over the
calibration data, G = Σ x xᵀ being moments of the unpruned model. The ridge ρ D, D the diagonal of G_kk,
draws them to what they were: x is that of the unpruned model, and the pruned one's differs.

Vectors count as `moments` says. With all counting alike, fitting makes MiniLM a good deal worse than it
was before (docs/results/pruning.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calib_data.errors import ConfigError
from compress.blocks import Group, Part, find_groups, input_columns
from compress.checkpoint import Checkpoint
from compress.moments import Moment
from compress.plan import PrunePlan
from compress.resize import original_name
from compress.surgery import feature_indices

RIDGE = 0.1  # ρ: on MiniLM 0.01 is worse, 0.001 by far (docs/results/pruning.md)


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
    mine = {
        f"{original_name(group.name, plan.layers)}.{group.kind}": group
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
                feature_indices(down_part(group), group.units, kept),
                plan.hidden,
                moment.gram,
                ridge,
            )
    return fits


# --- one projection -----------------------------------------------------------------------------


def _fit_(
    mine: Any, theirs: Any, kept: Tensor, outputs: Sequence[int] | None, gram: Tensor, ridge: float
) -> Fit:
    """Fit the projection `mine`, which keeps the features `kept` of `theirs`, and these outputs."""
    whole = affine(theirs)  # (in + 1, out)
    if outputs is not None:
        whole = whole[:, list(outputs)]
    before = affine(mine)
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


def affine(module: Any) -> Tensor:
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


def down_part(group: Group) -> Part:
    """Return where the group's units lie along the inputs of its last projection."""
    return next(part for part in group.parts if part.module == group.down)
