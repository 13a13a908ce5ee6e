"""Linear layers whose activations have a range that calibration chose."""

import torch
from torch import Tensor, nn

from compress.calibration import InputStats
from compress.int8 import quantize_per_channel
from compress.quantize_config import QuantizeConfig
from compress.rounding import corrected_bias, gptq, learned_moment


@torch.library.custom_op("onnxpress::static_quantized_linear", mutates_args=())
def static_quantized_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_scale: Tensor,
    x_zero_point: Tensor,
) -> Tensor:
    """Return (x quantized as ONNX `QuantizeLinear` does) @ (weight × scale) + bias, float32.

    x (..., in) float, weight (in, out) int8, scale (out,) float32, bias (out,) int32 in steps of
    x_scale × scale, x_scale () float32, x_zero_point () uint8 or int8 → (..., out).
    """
    bounds = torch.iinfo(x_zero_point.dtype)
    zero = x_zero_point.to(torch.int32)
    rows = ((x / x_scale).round() + zero).clamp(bounds.min, bounds.max).to(torch.int32)
    rows = (rows - zero).reshape(-1, x.shape[-1])
    product = (rows.double() @ weight.double()).to(torch.int32)
    if bias is not None:
        product = product + bias
    result = product.to(torch.float32) * (x_scale * scale)
    return result.reshape(*x.shape[:-1], weight.shape[1]).to(x.dtype)


@static_quantized_linear.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


class StaticInt8Linear(nn.Module):
    """A linear layer with int8 weights, int32 bias, and activations of a fixed scale."""

    weight: Tensor  # (in, out) int8
    scale: Tensor  # (out,) float32
    bias: Tensor | None  # (out,) int32, in steps of input_scale × scale
    input_scale: Tensor  # () float32
    input_zero_point: Tensor  # () uint8 or int8

    def __init__(self, in_features: int, out_features: int, bias: bool, activations: str) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(in_features, out_features, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(out_features))
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.int32) if bias else None)
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("input_zero_point", torch.zeros((), dtype=getattr(torch, activations)))

    def quantize_(
        self, weight: Tensor, bias: Tensor | None, config: QuantizeConfig, stats: InputStats | None
    ) -> None:
        """Hold the float `weight` (out, in) and `bias` (out,), for inputs as in `stats`."""
        assert stats is not None
        values, self.scale = quantize_per_channel(weight.t(), axis=1)
        moment = learned_moment(config, stats, bias)
        if moment is not None:
            values = gptq(weight.t(), self.scale, -127, 127, moment).to(torch.int8)
        self.weight = values.contiguous()
        bias = corrected_bias(bias, weight, self.dequantize(), config, stats)
        kind = self.input_zero_point.dtype
        symmetric = kind == torch.int8
        low, high = stats.range(str(config.ranges), config.percentile, 256, symmetric)
        self.input_scale = torch.tensor((high - low) / (254 if symmetric else 255) or 1.0)
        zero = 0 if symmetric else round(-low / float(self.input_scale))
        self.input_zero_point = torch.tensor(zero, dtype=kind)
        if bias is not None:
            steps = bias.detach().double() / (self.input_scale.double() * self.scale.double())
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
