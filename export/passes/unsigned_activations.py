"""Round activations to uint8 where the source has int8."""

import numpy as np
import onnx_ir as ir

from export.passes.nodes import initializer_like, known

_SHIFT = 128


def unsigned_activations_(model: ir.Model) -> int:
    """Let integer products take uint8 shifted by 128 for int8; return how many.

    Steps and sums stay the same. On x86 ONNX Runtime has fast kernels for uint8 × int8 only; for
    int8 × int8 it takes 7 times as long. Where it matters, it does this to standard products itself.
    """
    count = 0
    for node in model.graph.all_nodes():
        if node.op_type not in ("QuantizeLinear", "MatMulIntegerToFloat"):
            continue
        index = 2 if node.op_type == "QuantizeLinear" else 4
        value = node.inputs[index] if len(node.inputs) > index else None
        zero = known(value)
        if value is None or zero is None or zero.dtype != np.int8:
            continue
        shifted = (zero.astype(np.int16) + _SHIFT).astype(np.uint8)
        node.replace_input_with(index, initializer_like(value, shifted, "_unsigned"))
        if node.op_type == "QuantizeLinear":
            node.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
        count += 1
    return count
