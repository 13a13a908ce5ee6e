"""Rounding a layer's weights so that its outputs change least, not the weights themselves.

GPTQ (Frantar et al. 2022, arXiv:2210.17323): the inputs are gone through one after another, and what
rounding one weight does to an output is made up for by the weights not yet rounded, as well as the
second moment H = E[x xᵀ] of the inputs allows. An output whose weights are off by e is off by
e·H·eᵀ in the mean square. With R upper triangular and R Rᵀ = H that is |e·R|², a sum with a term for
each input, in which it and those before it occur; a weight is rounded from where its term is zero. That
needs no inverse of H.

Scales are chosen before, from the weights as they were; those of blocks do not wait until their
inputs are reached, as in the paper. So the inputs that weigh most come first even where blocks share
a scale, which leaves a smaller error (docs/results/quantization.md).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from calib_data.errors import ConfigError, DataError
from compress.calibration import InputStats
from compress.quantize_config import QuantizeConfig

# added to the diagonal of H, as a share of its mean: keeps inputs that almost depend on each other
# from taking huge weights; the larger ones are for an H that is not positive even so
_DAMPING = (0.01, 0.1, 1.0, 10.0)
_ROUNDING = 1e-6  # of what a moment adds up to along its diagonal
STRIDE = 128  # inputs whose errors are gathered before they reach the inputs after them


def learned_moment(
    config: QuantizeConfig | None, stats: InputStats | None, bias: Tensor | None
) -> Tensor | None:
    """Return the moment (in, in) that `config` wants weights rounded by, or None for nearest rounding.

    Where a bias takes the mean error away (`corrected_bias`) it is that about the mean of the inputs,
    otherwise that about zero.
    """
    if config is None or config.rounding == "nearest":
        return None
    if stats is None or stats.moment is None:
        raise ConfigError(
            "rounding by gptq needs the moments of a layer's inputs; calibrate with them"
        )
    if bias is None or not config.bias_correction:
        return stats.moment
    mean = stats.channel_mean.to(stats.moment)
    centred = stats.moment - torch.outer(mean, mean)
    # what float32 leaves of inputs that hardly vary may be below zero
    centred.diagonal().add_(_ROUNDING * stats.moment.diagonal().sum())
    return centred


def gptq(
    weight: Tensor,
    scale: Tensor,
    low: Tensor | int,
    high: Tensor | int,
    moment: Tensor,
    pair: int | None = None,
) -> Tensor:
    """Return whole numbers, as float32 (in, out), that times `scale` stand for `weight` (in, out).

    `moment` (in, in) is that of the inputs. `scale` and the bounds `low` and `high` of the numbers are
    for each weight, or broadcast to that. With `pair` the positive numbers of inputs 2i and 2i + 1 add
    up to that at most, and so do the negative ones.
    """
    bounds = (scale, low, high)
    rows = [torch.as_tensor(x, device=weight.device).expand(weight.shape) for x in bounds]
    numbers = torch.empty_like(weight, dtype=torch.float32)
    settled: set[int] = set()

    def rounded(place: int, wanted: Tensor) -> Tensor:
        step, least, most = (x[place] for x in rows)
        if pair is not None and place ^ 1 in settled:
            beside = numbers[place ^ 1]
            least = torch.maximum(least, -pair - beside.clamp(max=0))
            most = torch.minimum(most, pair - beside.clamp(min=0))
        numbers[place] = (wanted / step).round_().clamp_(least, most)
        settled.add(place)
        return numbers[place] * step

    order = moment.diagonal().argsort(descending=True)  # the others still make up for the heaviest
    settle(weight, moment, order, lambda places, wanted, sizes: rounded)
    return numbers


# what stands for an input's weights: (its place, those wanted (out,)) → (out,)
Settled = Callable[[int, Tensor], Tensor]
# asked before each run of inputs: (places (n,), weights wanted (n, out), what an error costs (n,))
Begin = Callable[[Tensor, Tensor, Tensor], Settled]


def settle(
    weight: Tensor, moment: Tensor, order: Tensor, begin: Begin, stride: int = STRIDE
) -> Tensor:
    """Return what stands for `weight` (in, out), input by input in `order`, float32.

    What one input's weights are off by is made up for by those of the inputs after it, as `moment`
    (in, in) allows: they are then not the weights given but others that are `wanted`. `begin` is asked
    before each `stride` inputs, and gives the function that says what is to stand for an input's
    weights. There an error e costs (e × size)², were all inputs after it free to make up for it.
    """
    factor = _factor(moment[order][:, order])
    sizes = factor.diagonal()
    upper = factor / sizes  # column i: what the errors before it move input i by
    exact = weight.detach().float()[order]
    wanted, found = exact.clone(), torch.empty_like(exact)
    for start in range(0, len(order), stride):
        end = min(start + stride, len(order))
        errors = torch.empty_like(exact[start:end])
        settled = begin(order[start:end], wanted[start:end], sizes[start:end])
        for i, place in enumerate(order[start:end].tolist(), start):
            found[i] = settled(place, wanted[i])
            errors[i - start] = exact[i] - found[i]
            wanted[i + 1 : end] += torch.outer(upper[i, i + 1 : end], errors[i - start])
        wanted[end:] += upper[start:end, end:].T @ errors
    return torch.empty_like(found).index_copy_(0, order, found)


def _factor(moment: Tensor) -> Tensor:
    """Return the upper triangular R (in, in), float32, with R Rᵀ the damped moment.

    It is the Cholesky factor of the moment with its axes reversed. An input that was never anything
    but zero makes up for none and is rounded to nearest.
    """
    damped = moment.double().flip(0, 1)
    diagonal = damped.diagonal()
    alive = diagonal != 0
    mean = diagonal[alive].mean() if bool(alive.any()) else diagonal.new_ones(())
    diagonal[~alive] = mean
    added = 0.0
    for share in _DAMPING:
        diagonal += (share - added) * mean
        added = share
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed and factor.isfinite().all():
            return factor.flip(0, 1).float()
    raise DataError(
        "what this layer was given during calibration has no finite second moment; "
        "check the data, or round to nearest"
    )


def corrected_bias(
    bias: Tensor | None,
    weight: Tensor,
    rounded: Tensor,
    config: QuantizeConfig | None,
    stats: InputStats | None,
) -> Tensor | None:
    """Return the bias (out,) plus the mean error that `rounded` makes in the place of `weight`.

    Both are (out, in). The mean error is (W − Ŵ) E[x] (Nagel et al. 2019, arXiv:1906.04721). A layer
    without a bias stays without: one more addition at run time would buy little.
    """
    if bias is None or config is None or not config.bias_correction:
        return bias
    if stats is None:
        raise ConfigError("correcting a bias needs the mean of a layer's inputs; calibrate first")
    error = (weight - rounded).double() @ stats.channel_mean.double()
    return (bias.double() + error).to(bias.dtype)
