"""Whole numbers for int8 weights whose sums of products no processor cuts off.

Instructions made for it (VNNI and AMX on x86, the dot product on ARM) add products of uint8 and int8
in 32 bits. Older x86 processors multiply with `vpmaddubsw`, which adds two neighbours in 16 bits and
cuts off what does not fit. ONNX Runtime feeds it inputs 2i and 2i + 1 of an output: its kernels for
SSE4.1, AVX2 and AVX-512 lay four inputs side by side and pad the last ones with zeros
(`onnxruntime/core/mlas/lib/x86_64/QgemmU8X8KernelAvx2.S` and `qgemm_kernel_avx2.cpp`).

Two products fit for all inputs 0 … 255 where the positive weights of the pair add up to 128 at most,
and so do the negative ones: 255 × 128 = 32,640 < 2**15. Weights of unlike sign do not add up, so this
leaves more steps than 64 for each of them would, which is the usual cure.
"""

import torch
from torch import Tensor

from compress.rounding import gptq

PAIR = 128  # 255 × 128 fits into 16 bits, 255 × 129 does not
LEVELS = {"exact": 127, "full": 127, "reduced": 64}  # largest magnitude of one weight
_TRIED = 9  # scales between the one that clips pairs most and the one that clips none


def weight_scale(weight: Tensor, weight_range: str, *, per_channel: bool = True) -> Tensor:
    """Return the float32 scale of each output, (out,), or of all, (), for a weight (in, out).

    The largest weight becomes the largest level, and in the range `exact` the scale is then enlarged as
    far as lowers the squared error of the weights once their pairs fit. Where all are zero the scale is
    1, so that nothing divides by zero.
    """
    exact = weight.detach().float()
    least = _or_one(_largest(exact.abs(), per_channel) / LEVELS[weight_range])
    if weight_range != "exact":
        return least
    sums = torch.stack([_pairs(exact.clamp(min=0)).sum(1), _pairs(-exact.clamp(max=0)).sum(1)])
    most = torch.maximum(least, _largest(sums.flatten(0, 1), per_channel) / PAIR)
    best, smallest = least, torch.full_like(least, torch.inf)
    for share in torch.linspace(0, 1, _TRIED).tolist():
        scale = torch.lerp(least, most, share)
        errors = (nearest(exact, scale, weight_range) * scale - exact).square()
        error = errors.sum(0) if per_channel else errors.sum()
        best = torch.where(error < smallest, scale, best)
        smallest = torch.minimum(error, smallest)
    return best


def round_to_levels(
    weight: Tensor, scale: Tensor, weight_range: str, moment: Tensor | None = None
) -> Tensor:
    """Return the weight (in, out) in steps of its scale, (out,) or (), within the range, as int8.

    Each is rounded to nearest, or all by the `moment` (in, in) of the inputs (`compress.rounding`).
    """
    if moment is None:
        return nearest(weight.detach().float(), scale, weight_range).to(torch.int8)
    level = LEVELS[weight_range]
    numbers = gptq(
        weight, scale, -level, level, moment, pair=PAIR if weight_range == "exact" else None
    )
    return numbers.to(torch.int8)


def nearest(weight: Tensor, scale: Tensor, weight_range: str) -> Tensor:
    """Return the whole numbers nearest to `weight` (in, out) / `scale` that the range has, float32."""
    level = LEVELS[weight_range]
    wanted = weight / scale
    numbers = wanted.round().clamp_(-level, level)
    if weight_range != "exact":
        return numbers
    return _fit(wanted, numbers)


def fits_in_pairs(weight: Tensor) -> bool:
    """Return whether no processor cuts off sums of uint8 × the int8 `weight` (in, out)."""
    pairs = _pairs(weight.int())
    return all(int(side.clamp(min=0).sum(1).amax()) <= PAIR for side in (pairs, -pairs))


def _fit(wanted: Tensor, numbers: Tensor) -> Tensor:
    """Return `numbers` (in, out), moved towards zero where both of a pair are beyond `PAIR`.

    That is the point of the bound nearest to `wanted`: what is too much is shared evenly, so that one
    weight never pays alone for both.
    """
    kept = _pairs(numbers)  # (pairs, 2, out)
    first, second = kept.unbind(1)
    over = ((first.sign() * second.sign()) > 0) & ((first + second).abs() > PAIR)
    sign, sizes = first.sign(), _pairs(wanted).abs()
    # two of one sign that add up to PAIR: what the first keeps, the second does not
    half = ((PAIR + sizes[:, 0] - sizes[:, 1]) / 2).round().clamp_(PAIR - 127, 127)
    fitted = torch.stack([sign * half, sign * (PAIR - half)], 1)
    kept = torch.where(over.unsqueeze(1), fitted, kept)
    return kept.flatten(0, 1)[: numbers.shape[0]]


def _pairs(values: Tensor) -> Tensor:
    """Return values (in, out) as (pairs, 2, out), with a zero beside the last where it is alone."""
    if values.shape[0] % 2:
        values = torch.cat([values, values.new_zeros(1, values.shape[1])])
    return values.unflatten(0, (-1, 2))


def _largest(values: Tensor, per_channel: bool) -> Tensor:
    return values.amax(dim=0) if per_channel else values.amax()


def _or_one(scale: Tensor) -> Tensor:
    return torch.where(scale > torch.finfo(scale.dtype).tiny, scale, torch.ones_like(scale))
