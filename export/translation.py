"""How this project's own PyTorch operators are written in ONNX: one translation each, nothing else."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from onnx.defs import OpSchema
from onnxscript import BOOL, FLOAT, script
from onnxscript import opset18 as op
from onnxscript.values import Op, Opset

# these define the operators that are translated here
import compress.int8
import compress.weight_only  # noqa: F401
import export.cached
import export.cached_seq2seq  # noqa: F401


def _matmul_nbits() -> Op:
    """Return ONNX Runtime's operator for block-wise weights, of which onnx has no schema."""
    optional = OpSchema.FormalParameterOption.Optional
    attributes = ("K", "N", "bits", "block_size", "accuracy_level")
    schema = OpSchema(
        "MatMulNBits",
        "com.microsoft",
        1,
        inputs=[
            OpSchema.FormalParameter("A", "tensor(float)"),
            OpSchema.FormalParameter("B", "tensor(uint8)"),
            OpSchema.FormalParameter("scales", "tensor(float)"),
            OpSchema.FormalParameter("zero_points", "tensor(uint8)", param_option=optional),
            OpSchema.FormalParameter("g_idx", "tensor(int32)", param_option=optional),
            OpSchema.FormalParameter("bias", "tensor(float)", param_option=optional),
        ],
        outputs=[OpSchema.FormalParameter("Y", "tensor(float)")],
        attributes=[
            OpSchema.Attribute(n, OpSchema.AttrType.INT, required=False) for n in attributes
        ],
    )
    return Op(Opset("com.microsoft", 1), "MatMulNBits", schema)


def _dynamic_quantized_linear(x: Any, weight: Any, scale: Any) -> Any:
    # this shape is what ONNX Runtime fuses into DynamicQuantizeMatMul or MatMulIntegerToFloat
    values, x_scale, zero_point = op.DynamicQuantizeLinear(x)
    product = op.Cast(op.MatMulInteger(values, weight, zero_point), to=1)
    return op.Mul(product, op.Mul(x_scale, scale))


def _weight_only_linear(
    x: Any,
    weight: Any,
    scale: Any,
    zero_point: Any,
    bias: Any,
    bits: int,
    block_size: int,
    *,
    target: str,
) -> Any:
    product = functools.partial(
        _matmul_nbits(), K=x.shape[-1], N=weight.shape[0], bits=bits, block_size=block_size
    )
    if target == "cpu":  # only its kernel rounds activations, and takes the bias
        return product(x, weight, scale, zero_point, None, bias, accuracy_level=4)
    made = product(x, weight, scale, zero_point)
    return made if bias is None else op.Add(made, bias)


def _append(past: Any, new: Any, mask: Any) -> Any:
    return op.Concat(past, new, axis=2)


@script(default_opset=op)
def _choose(flag: BOOL, past: FLOAT, new: FLOAT) -> FLOAT:
    if flag:  # noqa: SIM108 - a branch of the graph, where an expression would be none
        chosen = op.Identity(past)
    else:
        chosen = op.Identity(new)
    return chosen


def translations(target: str) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the table that `torch.onnx.export` takes: PyTorch operator → ONNX function."""
    weight_only_linear = functools.partial(_weight_only_linear, target=target)
    return {
        torch.ops.onnxpress.dynamic_quantized_linear.default: _dynamic_quantized_linear,
        torch.ops.onnxpress.weight_only_linear.default: weight_only_linear,
        torch.ops.onnxpress.append.default: _append,
        torch.ops.onnxpress.choose.default: _choose,
    }
