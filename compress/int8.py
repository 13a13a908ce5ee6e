"""Int8 modules that compute in PyTorch what the exported graph computes.

The exporter translates each module one to one and never quantizes again, so what is measured here is
what ships. Activations follow ONNX `DynamicQuantizeLinear` (opset 11): one scale and zero point for
the whole tensor, uint8, with zero always representable. Weights are symmetric int8 in −127…127, one
scale per output channel.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.calibration import InputStats
from compress.quantize_config import QuantizeConfig
from compress.rounding import corrected_bias, gptq, learned_moment


def quantize_per_channel(weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return the int8 weight and its float32 scales along `axis`: weight ≈ int8 × scale.

    `weight` has shape (rows, columns); the scales have shape (weight.shape[axis],). A channel of
    zeros gets scale 1, so that nothing divides by zero. ±127 keeps the range symmetric.
    """
    reduce = 1 - axis
    largest = weight.detach().float().abs().amax(dim=reduce)
    scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    quantized = (weight.detach().float() / scale.unsqueeze(reduce)).round().clamp(-127, 127)
    return quantized.to(torch.int8), scale


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

    x (..., in) float, weight (in, out) int8, scale (out,) float32 → (..., out). The integer product
    is exact: activations are shifted by 128 into int8 range and the shift is taken out through the
    weights' column sums.
    """
    quantized, x_scale, zero_point = dynamic_quantize(x)
    rows = quantized.reshape(-1, x.shape[-1])
    if x.device.type == "cpu":
        product = torch._int_mm((rows - 128).to(torch.int8), weight)
        product = product + (128 - zero_point) * weight.sum(dim=0, dtype=torch.int32)
    else:  # exact as well: every partial sum stays far below 2**53
        product = (rows - zero_point).double() @ weight.double()
    result = product.to(torch.float32) * (x_scale * scale)
    return result.reshape(*x.shape[:-1], weight.shape[1]).to(x.dtype)


@dynamic_quantized_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


class DynamicInt8Linear(nn.Module):
    """A linear layer with int8 weights, activations quantized at run time."""

    weight: Tensor  # (in, out) int8: the layout of MatMulInteger's second operand
    scale: Tensor  # (out,) float32
    bias: Tensor | None  # (out,) float32

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(in_features, out_features, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(out_features))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    def quantize_(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        config: QuantizeConfig | None = None,
        stats: InputStats | None = None,
    ) -> None:
        """Hold the float `weight` (out, in) in int8, and `bias` (out,)."""
        values, self.scale = quantize_per_channel(weight.t(), axis=1)
        moment = learned_moment(config, stats, bias)
        if moment is not None:
            values = gptq(weight.t(), self.scale, -127, 127, moment).to(torch.int8)
        self.weight = values.contiguous()
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
