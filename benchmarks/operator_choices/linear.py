"""Ways to write linear layers, float, int8 and in fewer bits."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.operator_choices.choice import TEXTS, Alternative, Choice, both
from benchmarks.operator_choices.graph import FLOAT, Build, Fed, Graph, Operand, ints, normal
from compress.int8_range import round_to_levels, weight_scale


def _linear_data(random: Any, batch: int, rows: int, inputs: int, outputs: int) -> SimpleNamespace:
    return SimpleNamespace(
        weight=normal(random, inputs, outputs, scale=inputs**-0.5),
        bias=normal(random, outputs, scale=0.1),
        x=Fed("BSE", normal(random, batch, rows, inputs)),
    )


def _rows_data(random: Any, rows: int, inputs: int, outputs: int) -> SimpleNamespace:
    return _linear_data(random, 1, rows, inputs, outputs)


def _int8_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return int8 values (in, out), whose sums no processor cuts off, and one scale per output."""
    scale = weight_scale(torch.from_numpy(weight), "exact")
    return round_to_levels(torch.from_numpy(weight), scale, "exact").numpy(), scale.numpy()


def _quantized(g: Graph, x: Operand) -> list[str]:
    return list(g.op("DynamicQuantizeLinear", x, outputs=3))


def _int8_product(g: Graph, rounded: list[str], weight: np.ndarray, bias: np.ndarray) -> str:
    values, scale = _int8_weight(weight)
    number, x_scale, zero_point = rounded
    product = g.op("Cast", g.op("MatMulInteger", number, values, zero_point), to=FLOAT)
    return str(g.op("Add", g.op("Mul", product, g.op("Mul", x_scale, scale)), bias))


def _linear(g: Graph, d: Any) -> Operand:
    return g.op("Add", g.op("MatMul", d.x, d.weight), d.bias)


def _linear_int8(g: Graph, d: Any) -> Operand:
    return _int8_product(g, _quantized(g, d.x), d.weight, d.bias)


_STEP = np.float32(10 / 255)  # of inputs that are normal


def _linear_fixed(kind: type = np.uint8) -> Build:
    def build(g: Graph, d: Any) -> Operand:
        values, scale = _int8_weight(d.weight)
        step = np.array(_STEP)
        zero: np.ndarray = np.array(128 if kind == np.uint8 else 0, kind)
        rounded = g.op("QuantizeLinear", d.x, step, zero)
        kernel = "com.microsoft.MatMulIntegerToFloat"
        return g.op(kernel, rounded, values, step, scale, zero, None, d.bias)

    return build


def _linear_standard(product: str) -> Build:
    def build(g: Graph, d: Any) -> Operand:
        values, scale = _int8_weight(d.weight)
        step, zero = np.array(_STEP), np.array(128, np.uint8)
        x: Operand = d.x
        if product == "Gemm":
            x = g.op("Reshape", d.x, ints(-1, len(values)))
        x = g.op("DequantizeLinear", g.op("QuantizeLinear", x, step, zero), step, zero)
        weight = g.op("DequantizeLinear", values, scale, np.zeros(len(scale), np.int8), axis=1)
        bias_steps = np.round(d.bias / (step * scale)).astype(np.int32)
        bias = g.op("DequantizeLinear", bias_steps, step * scale, axis=0)
        if product == "MatMul":
            return g.op("Add", g.op("MatMul", x, weight), bias)
        target = g.op("Concat", g.op("Shape", d.x, end=-1), ints(len(scale)), axis=0)
        return g.op("Reshape", g.op("Gemm", x, weight, bias), target)

    return build


def _linear_blocks(bits: int, accuracy: int, size: int = 32) -> Build:
    def build(g: Graph, d: Any) -> Operand:
        inputs, outputs = d.weight.shape
        blocks = d.weight.T.reshape(outputs, -1, size)
        zero = 1 << (bits - 1)
        scale = np.abs(blocks).max(axis=-1, keepdims=True) / (zero - 1)
        values = (np.round(blocks / scale) + zero).astype(np.uint8)
        zeros = np.full((outputs, inputs // size), zero, np.uint8)
        if bits == 4:  # two in a byte, the first in the low bits
            values, zeros = (v[..., ::2] | (v[..., 1::2] << 4) for v in (values, zeros))
        return g.op(
            "com.microsoft.MatMulNBits",
            *(d.x, values, scale[..., 0].astype(np.float32), zeros, None, d.bias),
            K=inputs,
            N=outputs,
            bits=bits,
            block_size=size,
            accuracy_level=accuracy,
        )

    return build


def _thirds(array: np.ndarray) -> list[np.ndarray]:
    return [part.copy() for part in np.split(array, 3, axis=-1)]


def _three(g: Graph, d: Any) -> tuple[Operand, ...]:
    pairs = zip(_thirds(d.weight), _thirds(d.bias))
    return tuple(g.op("Add", g.op("MatMul", d.x, weight), bias) for weight, bias in pairs)


def _merged(g: Graph, d: Any) -> tuple[Operand, ...]:
    return tuple(g.op("Split", _linear(g, d), outputs=3, axis=-1, num_outputs=3))


def _three_int8(g: Graph, d: Any) -> tuple[Operand, ...]:
    rounded = _quantized(g, d.x)
    pairs = zip(_thirds(d.weight), _thirds(d.bias))
    return tuple(_int8_product(g, rounded, weight, bias) for weight, bias in pairs)


def _merged_int8(g: Graph, d: Any) -> tuple[Operand, ...]:
    return tuple(g.op("Split", _linear_int8(g, d), outputs=3, axis=-1, num_outputs=3))


def _head_stored_transpose(g: Graph, d: Any) -> Operand:
    return g.op("MatMul", d.x, d.weight)


def _head_transpose(g: Graph, d: Any) -> Operand:
    return g.op("MatMul", d.x, g.op("Transpose", d.weight.T.copy(), perm=[1, 0]))


def _head_gemm(g: Graph, d: Any) -> Operand:
    inputs, outputs = d.weight.shape
    flat = g.op("Reshape", d.x, ints(-1, inputs))
    product = g.op("Gemm", flat, d.weight.T.copy(), transB=1)
    batch = g.op("Shape", d.x, start=0, end=2)
    return g.op("Reshape", product, g.op("Concat", batch, ints(outputs), axis=0))


def _head_fused(g: Graph, d: Any) -> Operand:
    return g.op("com.microsoft.FusedMatMul", d.x, d.weight.T.copy(), transB=1)


# --- the choices ---------------------------------------------------------------------------------

_QKV = {"inputs": 384, "outputs": 1152}

CHOICES = (
    Choice(
        "queries, keys and values, float",
        _linear_data,
        "batch × length",
        ((1, 1), *TEXTS),
        (2, 5),
        {"three products": Alternative(_three), "one product, Split": Alternative(_merged)},
        both("three products"),
        widths=_QKV,
    ),
    Choice(
        "queries, keys and values, int8",
        _linear_data,
        "batch × length",
        ((1, 1), *TEXTS),
        (2, 5),
        {
            "three products": Alternative(_three_int8),
            "one product, Split": Alternative(_merged_int8),
        },
        both("three products"),
        widths=_QKV,
    ),
    Choice(
        "linear layer, fixed steps",
        _rows_data,
        "rows",
        ((1,), (32,), (1024,)),
        (5,),
        {
            "QuantizeLinear, MatMulIntegerToFloat": Alternative(_linear_fixed()),
            "the same, int8 inputs": Alternative(_linear_fixed(np.int8), 0.02),
            "QuantizeLinear, DequantizeLinear, Gemm": Alternative(_linear_standard("Gemm"), 1e-3),
            "the same, MatMul and Add": Alternative(_linear_standard("MatMul"), 1e-3),
            "DynamicQuantizeLinear, MatMulInteger": Alternative(_linear_int8, 0.05),
        },
        {
            "cpu": "QuantizeLinear, MatMulIntegerToFloat",
            "cuda": "QuantizeLinear, DequantizeLinear, Gemm",
        },
        widths={"inputs": 384, "outputs": 1536},
    ),
    Choice(
        "linear layer, fewer bits",
        _rows_data,
        "rows",
        ((1,), (32,), (1024,)),
        (5,),
        {
            "MatMul": Alternative(_linear),
            "DynamicQuantizeLinear, MatMulInteger": Alternative(_linear_int8, 0.05),
            "MatMulNBits, 8 bit, accuracy 4": Alternative(_linear_blocks(8, 4), 0.03),
            "MatMulNBits, 8 bit, accuracy 0": Alternative(_linear_blocks(8, 0), 0.03),
            "MatMulNBits, 4 bit, accuracy 4": Alternative(_linear_blocks(4, 4), 0.2),
            "MatMulNBits, 4 bit, accuracy 0": Alternative(_linear_blocks(4, 0), 0.2),
        },
        {},  # the user's: each has its own precision
        widths={"inputs": 768, "outputs": 3072},
    ),
    Choice(
        "logits by a tied table",
        _rows_data,
        "rows",
        ((1,), (32,), (1024,)),
        (5,),
        {
            "MatMul by a stored transpose": Alternative(_head_stored_transpose),
            "Transpose, MatMul": Alternative(_head_transpose),
            "Gemm, transB": Alternative(_head_gemm),
            "FusedMatMul, transB": Alternative(_head_fused),
        },
        both("Transpose, MatMul"),
        copies=1,
        widths={"inputs": 384, "outputs": 16384},
    ),
)
