"""Linear layers whose weights are a few bits each, block by block along the inputs.

The layout is that of ONNX Runtime's `MatMulNBits`: each output's row is cut into blocks of
`block_size` inputs, the last one filled up; a block has its own scale and zero point, and
weight ≈ (value − zero point) × scale with values in 0 … 2**bits − 1.

On the CPU the operator also rounds activations at run time (`accuracy_level` 4), to int8 with one
scale per row and block. That is most of its speed, and the modules here do the same.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.calibration import InputStats
from compress.quantize_config import QuantizeConfig
from compress.rounding import corrected_bias, gptq, learned_moment

# what the range over the number of steps is multiplied by, to be tried as a block's scale
_SHARES = [1.1 - 0.025 * i for i in range(17)]
_NUMBERS = 1 << 18  # quantized at a time: they stay in the cache


def quantize_blocks(weight: Tensor, bits: int, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (packed values, scales, packed zero points) that come nearest to `weight` (out, in).

    Shapes (out, blocks, block_size × bits / 8), (out, blocks) and (out, blocks × bits / 8, rounded
    up). For each block several scales are tried, each refitted by least squares; the one with the
    smallest squared error is kept.
    """
    rows = max(1, _NUMBERS // weight.shape[1])
    parts = [_fit(_blocks(part, block_size), bits) for part in weight.detach().float().split(rows)]
    values, scale, zero_point = (torch.cat(made) for made in zip(*parts))
    return pack(values, bits), scale, pack(zero_point, bits)


def dequantize_blocks(
    weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, block_size: int, inputs: int
) -> Tensor:
    """Return the float32 weight (out, in) that what `quantize_blocks` made stands for."""
    zeros = unpack(zero_point, bits, scale.shape[1]).unsqueeze(2)
    centred = unpack(weight, bits, block_size).to(torch.int16) - zeros
    return (centred * scale.unsqueeze(2)).flatten(1)[:, :inputs]


def round_rows(x: Tensor, block_size: int) -> Tensor:
    """Return x (..., in) rounded to int8 steps, one scale per row and block: largest / 127."""
    blocks = _blocks(x.float(), block_size)
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    inverse = torch.where(largest > 0, 127 / largest, torch.zeros_like(largest))
    rounded = (blocks * inverse).round() * (largest / 127)
    return rounded.flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def pack(values: Tensor, bits: int) -> Tensor:
    """Return uint8 `values` below 2**bits packed along the last axis, the first in the low bits."""
    if bits == 8:
        return values
    even, odd = F.pad(values, (0, values.shape[-1] % 2)).unflatten(-1, (-1, 2)).unbind(-1)
    return even | (odd << 4)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the first `count` values along the last axis of what `pack` made."""
    if bits == 8:
        return packed
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., :count]


def _blocks(x: Tensor, size: int) -> Tensor:
    """Return x (..., in) as (..., blocks, size), zeros filling the last block."""
    return F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


def _fit(blocks: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return uint8 values, float32 scales and uint8 zero points of blocks (out, blocks, size).

    With c the values less the zero point, the best scale for them is Σ c·w / Σ c², and what it takes
    from the squared error is (Σ c·w)² / Σ c².
    """
    top = 2**bits - 1
    low = blocks.amin(-1, keepdim=True).clamp(max=0)
    high = blocks.amax(-1, keepdim=True).clamp(min=0)
    step = torch.where(high > low, (high - low) / top, torch.ones_like(low))
    zero_point = (-low / step).round()

    def centred(size: Tensor) -> Tensor:
        return (blocks / size).round_().clamp_(-zero_point, top - zero_point)

    best, gain = step, torch.zeros_like(step)
    for share in _SHARES:
        tried = centred(share * step)
        product, square = (tried * blocks).sum(-1, keepdim=True), _square(tried)
        found = torch.where(square > 0, product.square() / square, torch.zeros_like(square))
        best = torch.where(found > gain, share * step, best)
        gain = torch.maximum(found, gain)
    values = centred(best)
    square = _square(values)
    scale = torch.where(square > 0, (values * blocks).sum(-1, keepdim=True) / square, step)
    kept = (values + zero_point).to(torch.uint8)
    return kept, scale.squeeze(-1), zero_point.squeeze(-1).to(torch.uint8)


def _square(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True)


@torch.library.custom_op("onnxpress::weight_only_linear", mutates_args=())
def weight_only_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    bits: int,
    block_size: int,
) -> Tensor:
    """Return x @ weightᵀ + bias with x rounded by `round_rows`.

    x (..., in) float; weight (out, blocks, block_size × bits / 8) and zero_point, both packed uint8;
    scale (out, blocks) float32; bias (out,) → (..., out).
    """
    matrix = dequantize_blocks(weight, scale, zero_point, bits, block_size, x.shape[-1])
    return F.linear(round_rows(x, block_size), matrix.to(x.dtype), bias)


@weight_only_linear.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


class WeightOnlyLinear(nn.Module):
    """A linear layer with block-wise weights of 4 or 8 bits."""

    packed: Tensor  # (out, blocks, block_size × bits / 8) uint8
    scale: Tensor  # (out, blocks) float32
    zero_point: Tensor  # (out, blocks × bits / 8, rounded up) uint8, packed
    bias: Tensor | None  # (out,) float32

    def __init__(
        self, in_features: int, out_features: int, bias: bool, bits: int, block_size: int
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.block_size = bits, block_size
        blocks = -(-in_features // block_size)
        values = torch.zeros(out_features, blocks, block_size * bits // 8, dtype=torch.uint8)
        zeros = torch.zeros(out_features, -(-blocks * bits // 8), dtype=torch.uint8)
        self.register_buffer("packed", values)
        self.register_buffer("scale", torch.ones(out_features, blocks))
        self.register_buffer("zero_point", zeros)
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    def quantize_(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        config: QuantizeConfig | None = None,
        stats: InputStats | None = None,
    ) -> None:
        """Hold the float `weight` (out, in) as nearly as the bits allow, and `bias` (out,)."""
        made = quantize_blocks(weight, self.bits, self.block_size)
        self.packed, self.scale, self.zero_point = made
        moment = learned_moment(config, stats, bias)
        if moment is not None:
            self._round_by_(weight, moment)
        self.bias = corrected_bias(bias, weight, self.dequantize(), config, stats)

    def _round_by_(self, weight: Tensor, moment: Tensor) -> None:
        """Round `weight` (out, in) anew to the scales there are, by the `moment` of the inputs."""

        def per_weight(x: Tensor) -> Tensor:  # (out, blocks) → (in, out)
            return x.repeat_interleave(self.block_size, 1)[:, : self.in_features].t()

        zeros = unpack(self.zero_point, self.bits, self.scale.shape[1]).float()
        low, top = -per_weight(zeros), 2**self.bits - 1
        numbers = gptq(weight.t(), per_weight(self.scale), low, top + low, moment)
        values = _blocks(numbers.t(), self.block_size) + zeros.unsqueeze(2)
        self.packed = pack(values.to(torch.uint8), self.bits)

    def dequantize(self) -> Tensor:
        """Return the float32 weight (out, in) that the module stands for."""
        return dequantize_blocks(
            self.packed, self.scale, self.zero_point, self.bits, self.block_size, self.in_features
        )

    def dequantized_bias(self) -> Tensor | None:
        """Return the float32 bias (out,) that the module stands for."""
        return self.bias

    @property
    def weight(self) -> Tensor:
        """What `dequantize` returns: T5 turns its activations into the dtype of a layer's weight."""
        return self.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return weight_only_linear(
            x, self.packed, self.scale, self.zero_point, self.bias, self.bits, self.block_size
        )
