"""Write products on block-wise weights with ai.onnx's own operators."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from calib_data.errors import ConfigError
from compress.weight_only import unpack
from export.passes.nodes import initializer_like, insert, replace

_OPSET = 21  # the first whose DequantizeLinear knows blocks, and with four-bit tensors
_STORED = {4: ml_dtypes.uint4, 8: np.uint8}


def standard_blocks_(model: ir.Model) -> int:
    """Replace `MatMulNBits` by DequantizeLinear → MatMul on the same values; return how many.

    Weights become (inputs, outputs), with scales and zero points per block of inputs. Raises
    `ConfigError` below opset 21.
    """
    nodes = [node for node in model.graph if node.op_type == "MatMulNBits"]
    opset = model.opset_imports[""]
    if nodes and opset < _OPSET:
        raise ConfigError(
            f"--target portable writes block-wise weights at --opset {_OPSET} or more, got {opset}"
        )
    for node in nodes:
        bits, block_size, inputs = (
            node.attributes[n].as_int() for n in ("bits", "block_size", "K")
        )
        weight, scale, zero_point = (value for value in node.inputs[1:4] if value is not None)
        scales = _tensor(scale)
        values = unpack(_tensor(weight), bits, block_size).flatten(1)[:, :inputs]
        zeros = unpack(_tensor(zero_point), bits, scales.shape[1])
        stored = [
            initializer_like(weight, values.t().numpy().astype(_STORED[bits]), ".values"),
            initializer_like(scale, scales.t().contiguous().numpy(), ".blocks"),
            initializer_like(zero_point, zeros.t().numpy().astype(_STORED[bits]), ".blocks"),
        ]
        matrix = insert(
            node,
            "DequantizeLinear",
            stored,
            {"axis": 0, "block_size": block_size},
            like=scale,
            shape=[inputs, values.shape[0]],
        )
        product = insert(node, "MatMul", [node.inputs[0], matrix], like=scale)
        product.shape = node.outputs[0].shape
        replace(node.outputs[0], product)
    return len(nodes)


def _tensor(value: ir.Value) -> torch.Tensor:
    assert value.const_value is not None
    return torch.from_numpy(value.const_value.numpy().copy())
