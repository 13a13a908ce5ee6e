"""Linear layers whose activations have a range that calibration chose.

The whole layer is integers of fixed steps: inputs of 8 bits in steps of `input_scale`, weights in
steps of `scale`, and a bias of 32 bits in steps of their product, which is what integer kernels add
it in (Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", section 2.4). What one row gives does not depend on the others.
"""

import torch
from torch import Tensor, nn

from calib_data.errors import DataError
from compress.calibration import InputStats
from compress.int8 import integer_product
from compress.int8_range import round_to_levels, weight_scale
from compress.quantize_config import QuantizeConfig
from compress.rounding import corrected_bias, learned_moment

_LARGEST_BIAS = 2**30  # steps: leaves as much for the sum of the products


@torch.library.custom_op("onnxpress::static_quantized_linear", mutates_args=())
def static_quantized_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_scale: Tensor,
    x_zero_point: Tensor,
) -> Tensor:
    """Return (x quantized as ONNX `QuantizeLinear` does) @ (weight × scale) + bias, in x's dtype.

    x (..., in) float, weight (in, out) int8, scale (out,) or () float32, bias (out,) int32 in steps of
    x_scale × scale, x_scale () float32, x_zero_point () uint8 or int8 → (..., out). Values beyond the
    range are cut off, and the sum is exact, as long as it fits into 32 bits.
    """
    values = static_quantize(x, x_scale, x_zero_point).reshape(-1, x.shape[-1])
    zero = x_zero_point.to(torch.int32)
    product = integer_product(values, weight, zero, x_zero_point.dtype)
    if bias is not None:
        product += bias
    result = product.to(torch.float32).mul_(x_scale * scale)
    return result.reshape(*x.shape[:-1], weight.shape[1]).to(x.dtype)


@static_quantized_linear.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


def static_quantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return x in steps of `scale` from `zero_point`, whole numbers within its dtype, as float32.

    Halves round to even and what is out of range is cut off, as ONNX `QuantizeLinear` defines it.
    """
    bounds = torch.iinfo(zero_point.dtype)
    steps = (x.float() / scale).round_().add_(zero_point.float())
    return steps.clamp_(bounds.min, bounds.max)


class StaticInt8Linear(nn.Module):
    """A linear layer with int8 weights, int32 bias, and activations of a fixed scale."""

    weight: Tensor  # (in, out) int8
    scale: Tensor  # (out,) float32, or () where all outputs share it
    bias: Tensor | None  # (out,) int32, in steps of input_scale × scale
    input_scale: Tensor  # () float32
    input_zero_point: Tensor  # () uint8 or int8: what stands for 0.0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        activations: str = "uint8",
        per_channel: bool = True,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(in_features, out_features, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(out_features if per_channel else ()))
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.int32) if bias else None)
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("input_zero_point", torch.zeros((), dtype=getattr(torch, activations)))

    def quantize_(
        self, weight: Tensor, bias: Tensor | None, config: QuantizeConfig, stats: InputStats | None
    ) -> None:
        """Hold the float `weight` (out, in) and `bias` (out,), for inputs as in `stats`.

        Raises `DataError` where calibration saw no range, or one without bounds.
        """
        if stats is None:
            raise DataError("calibration saw no input of this layer; leave it out with --skip")
        self.input_scale, self.input_zero_point = input_range(
            stats, config, self.input_zero_point.dtype
        )
        kept, matrix = str(config.weight_range), weight.t()
        scale = weight_scale(matrix, kept, per_channel=self.scale.dim() > 0)
        if bias is not None:
            scale = scale_for_bias(scale, matrix, bias, self.input_scale)
        self.scale = scale
        moment = learned_moment(config, stats, bias)
        self.weight = round_to_levels(matrix, scale, kept, moment).contiguous()
        bias = corrected_bias(bias, weight, self.dequantize(), config, stats)
        if bias is not None:
            steps = bias.detach().double() / (self.input_scale.double() * scale.double())
            self.bias = steps.round().to(torch.int32)

    def dequantize(self) -> Tensor:
        """Return the float32 weight (out, in) that the module stands for."""
        return (self.weight.float() * self.scale).t().contiguous()

    def dequantized_bias(self) -> Tensor | None:
        """Return the float32 bias (out,) that the module stands for."""
        return None if self.bias is None else self.bias * (self.input_scale * self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return static_quantized_linear(
            x, self.weight, self.scale, self.bias, self.input_scale, self.input_zero_point
        )


def input_range(
    stats: InputStats, config: QuantizeConfig, kind: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return (scale () float32, zero point () of dtype `kind`) for inputs as in `stats`.

    uint8 covers low … high, with 0.0 among its steps; int8 covers the same on both sides of zero,
    −127 … 127. Inputs that were all zero get scale 1.
    """
    symmetric = kind == torch.int8
    levels = 255 if symmetric else 256
    low, high = stats.range(str(config.ranges), config.percentile, levels, symmetric)
    low, high = min(low, 0.0), max(high, 0.0)
    span = 2 * max(-low, high) if symmetric else high - low
    if not 0 <= span <= torch.finfo(torch.float32).max:
        raise DataError(
            f"calibration saw inputs of {low:g} … {high:g} here, which no scale covers; "
            "leave out the data that causes it, or the layer with --skip"
        )
    scale = torch.tensor(span / (levels - 1), dtype=torch.float32)
    if scale < torch.finfo(torch.float32).tiny:
        scale = torch.ones(())
    zero = 0 if symmetric else min(max(round(-low / float(scale)), 0), levels - 1)
    return scale, torch.tensor(zero, dtype=kind)


def scale_for_bias(scale: Tensor, weight: Tensor, bias: Tensor, input_scale: Tensor) -> Tensor:
    """Return `scale`, larger where the bias would not fit into 32 bits of its steps.

    Outputs without weights get the scale that holds their bias best. weight (in, out), bias (out,).
    """
    needed = (bias.detach().double().abs() / (input_scale.double() * _LARGEST_BIAS)).float()
    empty = ~weight.detach().any(dim=0)
    if scale.dim() == 0:
        return torch.maximum(scale, needed.amax()) if not empty.all() else _or_one(needed.amax())
    return torch.where(empty, _or_one(needed), torch.maximum(scale, needed))


def _or_one(scale: Tensor) -> Tensor:
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(scale > tiny, scale, torch.ones_like(scale))
