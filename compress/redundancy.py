"""What removing a unit costs once those that stay are fitted to make up for it.

A unit that others can stand in for costs little, and more once they are gone. So units are taken out one
after another, the cheapest first: what a unit hands on is explained by those still there up to a rest,
and its cost is what its criterion says times the share that the rest has. That is the order of optimal
brain surgery (Hassibi and Stork 1993) with a criterion that looks at the whole model: for G the moments
of all that are left, the rest of those in J has the moments ((G⁻¹)_JJ)⁻¹.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compress.blocks import Group
from compress.checkpoint import Checkpoint
from compress.moments import Moment
from compress.reconstruct import RIDGE, affine, down_part

_STEPS = 96  # in which the units of a group are taken out; one by one takes much longer
_RISE = 1e-9  # by which a cost is above the one before, so that sorting finds the order again


def stand_in_costs(
    checkpoint: Checkpoint,
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    seen: Mapping[str, Moment],
    ridge: float = RIDGE,
) -> dict[str, Tensor]:
    """Return `scores` (units,) by group as they are where `reconstruct_` follows, float64.

    Costs rise in the order in which units go, so that the least ones sum up to what removing them
    together costs. `seen` are the `moments` of the groups, `ridge` is that of the fit. Groups that were
    not seen keep their scores.
    """
    found = {}
    for group in groups:
        own = scores[group.key].double()
        moment = seen.get(group.key)
        if moment is not None and moment.count:
            weight = affine(checkpoint.backbone.get_submodule(group.down))
            found[group.key] = _costs(own, weight, moment.gram, down_part(group).width, ridge)
        else:
            found[group.key] = own
    return found


def _costs(scores: Tensor, weight: Tensor, gram: Tensor, width: int, ridge: float) -> Tensor:
    """Return the cost of each unit, (units,); weight (in [+ 1], out), gram (in [+ 1], …)."""
    units, features = len(scores), len(scores) * width
    gram = gram.double().cpu().clone()
    gram.diagonal()[gram.diagonal() == 0] = 1.0  # never anything but zero
    gram.diagonal().mul_(1 + ridge)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    blocks = weight[:features].reshape(units, width, -1)
    carried = blocks @ blocks.transpose(1, 2)  # (units, width, width)
    whole = (_blocks(gram, units, width) * carried).sum(dim=(1, 2)).clamp(min=1e-30)
    left = torch.arange(units)
    costs, highest = torch.zeros(units, dtype=torch.float64), 0.0
    step = max(1, units // _STEPS)
    while len(left):
        rest = torch.linalg.inv(_blocks(inverse, len(left), width))
        share = (rest * carried[left]).sum(dim=(1, 2)) / whole[left]
        wanted = scores[left] * share.clamp(0, 1)
        order = wanted.argsort(stable=True)
        for place in order[:step].tolist():
            highest = max(highest * (1 + _RISE), float(wanted[place]))
            costs[left[place]] = highest
        stay = order[step:].sort().values
        inverse = _without(inverse, order[:step], stay, len(left), width)
        left = left[stay]
    return costs


def _blocks(matrix: Tensor, units: int, width: int) -> Tensor:
    """Return the blocks of the units along the diagonal, (units, width, width)."""
    features = units * width
    split = matrix[:features, :features].reshape(units, width, units, width)
    return split.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _without(inverse: Tensor, gone: Tensor, stay: Tensor, units: int, width: int) -> Tensor:
    """Return the inverse of the moments without the units `gone`, from the one with them."""
    inside = torch.arange(width)
    constant = torch.arange(units * width, len(inverse))  # that of the bias stays
    out = (gone.unsqueeze(1) * width + inside).flatten()
    kept = torch.cat([(stay.unsqueeze(1) * width + inside).flatten(), constant])
    across = inverse[kept][:, out]
    return inverse[kept][:, kept] - across @ torch.linalg.solve(inverse[out][:, out], across.T)
