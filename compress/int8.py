"""Int8 modules that compute in PyTorch what the exported graph computes.

The exporter translates each module one to one and never quantizes again, so what is measured here is
what ships. Activations follow ONNX `DynamicQuantizeLinear` (opset 11): one scale and zero point for
the whole tensor, uint8, with zero always representable. Weights are symmetric int8 within −127 … 127
(`compress.int8_range`), with one scale per output channel or for all of them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.calibration import InputStats
from compress.int8_range import round_to_levels, weight_scale
from compress.quantize_config import QuantizeConfig
from compress.rounding import corrected_bias, learned_moment


def quantize_per_channel(weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return the int8 weight and its float32 scales along `axis`: weight ≈ int8 × scale.

    `weight` has shape (rows, columns); the scales have shape (weight.shape[axis],). ±127 keeps the
    range symmetric.
    """
    if axis == 0:
        values, scale = quantize_per_channel(weight.t(), 1)
        return values.t().contiguous(), scale
    scale = weight_scale(weight, "full")
    return round_to_levels(weight, scale, "full"), scale


def integer_product(
    values: Tensor, weight: Tensor, zero_point: Tensor, kind: torch.dtype
) -> Tensor:
    """Return (values − zero_point) @ weight, exact, int32 (rows, out).

    values (rows, in) hold whole numbers in the range of `kind`, uint8 or int8; weight (in, out) int8,
    zero_point () int32. On the CPU uint8 is shifted by 128 into int8's range, which PyTorch's integer
    product takes, and the shift is taken out through the weights' column sums.
    """
    if values.device.type != "cpu":  # exact as well: every partial sum stays far below 2**53
        return ((values - zero_point).double() @ weight.double()).to(torch.int32)
    shift = 128 if kind == torch.uint8 else 0
    product: Tensor = torch._int_mm((values - shift).to(torch.int8), weight)
    ones = torch.ones(1, weight.shape[0], dtype=torch.int8)
    # 16 times faster than summing int8 along an axis
    return product.add_((shift - zero_point) * torch._int_mm(ones, weight))


def dynamic_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (uint8 values as int32, scale, zero point) as ONNX `DynamicQuantizeLinear` defines them.

    The range always contains zero; rounding is to even, as in ONNX. A tensor of zeros gets scale 1.
    """
    low = x.amin().clamp(max=0.0)
    high = x.amax().clamp(min=0.0)
    scale = (high - low) / 255
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero_point = (-low / scale).clamp(0, 255).round()
    quantized = ((x / scale).round() + zero_point).clamp(0, 255)
    return quantized.to(torch.int32), scale, zero_point.to(torch.int32)


@torch.library.custom_op("onnxpress::dynamic_quantized_linear", mutates_args=())
def dynamic_quantized_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return x @ (weight × scale) with x quantized to uint8 on the fly, float32.

    x (..., in) float, weight (in, out) int8, scale (out,) or () float32 → (..., out). The integer
    product is exact.
    """
    quantized, x_scale, zero_point = dynamic_quantize(x)
    rows = quantized.reshape(-1, x.shape[-1])
    product = integer_product(rows, weight, zero_point, torch.uint8)
    result = product.to(torch.float32) * (x_scale * scale)
    return result.reshape(*x.shape[:-1], weight.shape[1]).to(x.dtype)


@dynamic_quantized_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


class DynamicInt8Linear(nn.Module):
    """A linear layer with int8 weights, activations quantized at run time."""

    weight: Tensor  # (in, out) int8: the layout of MatMulInteger's second operand
    scale: Tensor  # (out,) float32, or () where all outputs share it
    bias: Tensor | None  # (out,) float32

    def __init__(
        self, in_features: int, out_features: int, bias: bool, per_channel: bool = True
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(in_features, out_features, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(out_features if per_channel else ()))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    def quantize_(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        config: QuantizeConfig | None = None,
        stats: InputStats | None = None,
    ) -> None:
        """Hold the float `weight` (out, in) in int8, and `bias` (out,)."""
        kept, matrix = (config or QuantizeConfig()).weight_range, weight.t()
        self.scale = weight_scale(matrix, str(kept), per_channel=self.scale.dim() > 0)
        moment = learned_moment(config, stats, bias)
        self.weight = round_to_levels(matrix, self.scale, str(kept), moment).contiguous()
        self.bias = corrected_bias(bias, weight, self.dequantize(), config, stats)

    def dequantize(self) -> Tensor:
        """Return the float32 weight (out, in) that the module stands for."""
        return (self.weight.float() * self.scale).t().contiguous()

    def dequantized_bias(self) -> Tensor | None:
        """Return the float32 bias (out,) that the module stands for."""
        return self.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        y = dynamic_quantized_linear(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias


class Int8Embedding(nn.Module):
    """An embedding table with int8 rows, one scale per row."""

    weight: Tensor  # (rows, width) int8
    scale: Tensor  # (rows,) float32

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx  # some models count positions from it
        self.register_buffer("weight", torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(num_embeddings))

    def quantize_(self, weight: Tensor) -> None:
        """Hold the float table `weight` (rows, width) in int8."""
        self.weight, self.scale = quantize_per_channel(weight, axis=0)

    def dequantize(self) -> Tensor:
        """Return the table (rows, width) that the module stands for, in the scales' precision."""
        return self.weight.to(self.scale.dtype) * self.scale.unsqueeze(1)

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (...) to vectors (..., width), float32."""
        rows = F.embedding(ids, self.weight).to(self.scale.dtype)
        return rows * F.embedding(ids, self.scale.unsqueeze(1))
