"""How this project's own PyTorch operators are written in ONNX: one translation each, nothing else."""

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset18 as op

# these define the operators that are translated here
import compress.int8  # noqa: F401
import export.cached  # noqa: F401


def _dynamic_quantized_linear(x: Any, weight: Any, scale: Any) -> Any:
    # this shape is what ONNX Runtime fuses into DynamicQuantizeMatMul or MatMulIntegerToFloat
    values, x_scale, zero_point = op.DynamicQuantizeLinear(x)
    product = op.Cast(op.MatMulInteger(values, weight, zero_point), to=1)
    return op.Mul(product, op.Mul(x_scale, scale))


def _append(past: Any, new: Any, mask: Any) -> Any:
    return op.Concat(past, new, axis=2)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the table that `torch.onnx.export` takes: PyTorch operator → ONNX function."""
    return {
        torch.ops.onnxpress.dynamic_quantized_linear.default: _dynamic_quantized_linear,
        torch.ops.onnxpress.append.default: _append,
    }
