"""How this project's own PyTorch operators are written in ONNX: one translation each, nothing else."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript import BOOL, FLOAT, script
from onnxscript import opset18 as op
from onnxscript.values import Op, Opset

# these define the operators that are translated here
import compress.int8
import compress.static_int8
import compress.weight_only  # noqa: F401
import export.cached
import export.cached_seq2seq  # noqa: F401
from compress.packed_embedding import BITS

_OPTIONAL = OpSchema.FormalParameterOption.Optional


def _microsoft(
    name: str,
    inputs: Mapping[str, str],
    optional: tuple[str, ...],
    attributes: tuple[str, ...] = (),
) -> Op:
    """Return an operator of ONNX Runtime's own, of which onnx has no schema.

    `inputs` give the type of each; the attributes are whole numbers, the output is float32.
    """
    required = OpSchema.FormalParameterOption.Single
    schema = OpSchema(
        name,
        "com.microsoft",
        1,
        inputs=[
            OpSchema.FormalParameter(
                item, f"tensor({kind})", param_option=_OPTIONAL if item in optional else required
            )
            for item, kind in inputs.items()
        ],
        outputs=[OpSchema.FormalParameter("Y", "tensor(float)")],
        attributes=[
            OpSchema.Attribute(n, OpSchema.AttrType.INT, required=False) for n in attributes
        ],
    )
    return Op(Opset("com.microsoft", 1), name, schema)


def _matmul_nbits() -> Op:
    return _microsoft(
        "MatMulNBits",
        {"A": "float", "B": "uint8", "scales": "float", "zero_points": "uint8", "g_idx": "int32",
         "bias": "float"},
        ("zero_points", "g_idx", "bias"),
        ("K", "N", "bits", "block_size", "accuracy_level"),
    )  # fmt: skip


def _matmul_integer_to_float(values: str) -> Op:
    return _microsoft(
        "MatMulIntegerToFloat",
        {"A": values, "B": "int8", "a_scale": "float", "b_scale": "float", "a_zero_point": values,
         "b_zero_point": "int8", "bias": "float"},
        ("a_zero_point", "b_zero_point", "bias"),
    )  # fmt: skip


def _dynamic_quantized_linear(x: Any, weight: Any, scale: Any) -> Any:
    # this shape is what ONNX Runtime fuses into DynamicQuantizeMatMul or MatMulIntegerToFloat
    values, x_scale, zero_point = op.DynamicQuantizeLinear(x)
    product = op.Cast(op.MatMulInteger(values, weight, zero_point), to=1)
    return op.Mul(product, op.Mul(x_scale, scale))


def _static_quantized_linear(
    x: Any, weight: Any, scale: Any, bias: Any, x_scale: Any, x_zero_point: Any, *, target: str
) -> Any:
    write = _fused_product if target == "cpu" else _standard_product
    return write(x, weight, scale, bias, x_scale, x_zero_point)


def _fused_product(
    x: Any, weight: Any, scale: Any, bias: Any, x_scale: Any, x_zero_point: Any
) -> Any:
    """Write the fastest form of ONNX Runtime's CPU provider: sums are scaled as they are stored."""
    values = op.QuantizeLinear(x, x_scale, x_zero_point)
    if bias is not None:
        bias = op.Mul(op.Cast(bias, to=1), op.Mul(x_scale, scale))
    product = _matmul_integer_to_float(str(x_zero_point.dtype).lower())
    return product(values, weight, x_scale, scale, x_zero_point, None, bias)


def _standard_product(
    x: Any, weight: Any, scale: Any, bias: Any, x_scale: Any, x_zero_point: Any
) -> Any:
    """Write what runtimes look for to use integer kernels: QuantizeLinear, DequantizeLinear, Gemm.

    ONNX Runtime keeps a float product where the bias is float32, or the weights have no zero point.
    """
    inputs, outputs = weight.shape
    rows = op.QuantizeLinear(op.Reshape(x, _shape(-1, inputs)), x_scale, x_zero_point)
    zeros = ir.to_proto(ir.tensor(np.zeros(tuple(scale.shape), np.int8)))
    zero = op.Constant(value=zeros)
    operands = [
        op.DequantizeLinear(rows, x_scale, x_zero_point),
        op.DequantizeLinear(weight, scale, zero, axis=1),
    ]
    if bias is not None:
        operands.append(op.DequantizeLinear(bias, op.Mul(x_scale, scale), axis=0))
    made: Any = op.Gemm(*operands)
    return op.Reshape(made, op.Concat(op.Shape(x, end=-1), _shape(outputs), axis=0))


def _shape(*sizes: int) -> Any:
    return op.Constant(value_ints=sizes)


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


def _gather_blocks(
    ids: Any, packed: Any, scale: Any, zero_point: Any, block_size: int, *, target: str
) -> Any:
    if target != "portable":
        gather = _microsoft(
            "GatherBlockQuantized",
            {"data": "uint8", "indices": "int64", "scales": "float", "zero_points": "uint8"},
            ("zero_points",),
            ("bits", "block_size", "gather_axis", "quantize_axis"),
        )
        return gather(
            packed, ids, scale, zero_point,
            bits=BITS, block_size=block_size, gather_axis=0, quantize_axis=1,
        )  # fmt: skip
    blocks = scale.shape[1]
    values = _unpacked(op.Gather(packed, ids), 0, 0, blocks, block_size)  # (..., blocks, size)
    zeros = _unpacked(op.Gather(zero_point, ids), 0, 0, -1, 1)
    zeros = op.Slice(zeros, _shape(0), _shape(blocks), _shape(-2))  # an odd number fills up a byte
    steps = op.Unsqueeze(op.Gather(scale, ids), _shape(-1))
    made = op.Mul(op.CastLike(op.Sub(values, zeros), steps), steps)
    whole = op.Concat(op.Shape(ids), _shape(blocks * block_size), axis=0)
    return op.Reshape(made, whole)


def _unpacked(packed: Any, *shape: int) -> Any:
    """Return the two numbers of each byte as int32, in `shape`."""
    halves = [op.BitwiseAnd(packed, _byte(15)), op.BitShift(packed, _byte(4), direction="RIGHT")]
    both = op.Concat(*(op.Unsqueeze(half, _shape(-1)) for half in halves), axis=-1)
    return op.Cast(op.Reshape(both, _shape(*shape)), to=6)


def _byte(value: int) -> Any:
    return op.Constant(value=ir.to_proto(ir.tensor(np.array(value, np.uint8))))


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
    static_quantized_linear = functools.partial(_static_quantized_linear, target=target)
    weight_only_linear = functools.partial(_weight_only_linear, target=target)
    return {
        torch.ops.onnxpress.dynamic_quantized_linear.default: _dynamic_quantized_linear,
        torch.ops.onnxpress.static_quantized_linear.default: static_quantized_linear,
        torch.ops.onnxpress.weight_only_linear.default: weight_only_linear,
        torch.ops.onnxpress.gather_blocks.default: functools.partial(_gather_blocks, target=target),
        torch.ops.onnxpress.append.default: _append,
        torch.ops.onnxpress.choose.default: _choose,
    }
