"""Compute products of stored vectors once, while exporting."""

import math

import numpy as np
import onnx_ir as ir

from export.passes.nodes import initializer_like, known, remove_unused_, replace


def folded_vectors_(model: ir.Model) -> int:
    """Replace `Mul` and `Cast` of stored vectors of float32 or int32 by their result; return how many.

    Scales and biases of integer products come in factors. PyTorch's exporter folds such things up to
    8,192 numbers, and a language model has more outputs. The arithmetic is float32's, as it is at
    run time.
    """
    count = 0
    for node in list(model.graph):
        output = node.outputs[0]
        if node.op_type not in ("Mul", "Cast") or node.domain or output.is_graph_output():
            continue
        arrays = [_vector(value) for value in node.inputs]
        if output.dtype != ir.DataType.FLOAT or any(array is None for array in arrays):
            continue
        made = math.prod(a.astype(np.float32) for a in arrays if a is not None)
        replace(output, initializer_like(output, np.asarray(made, np.float32), "_folded"))
        count += 1
    if count:
        remove_unused_(model)
    return count


def _vector(value: ir.Value | None) -> np.ndarray | None:
    """Return a stored vector or number of float32 or int32."""
    if value is None or value.dtype not in (ir.DataType.FLOAT, ir.DataType.INT32):
        return None
    array = known(value)
    return array if array is not None and array.ndim < 2 else None
