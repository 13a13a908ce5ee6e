"""Let `Attention` share keys and values between grouped queries itself."""

import onnx_ir as ir

from export.passes.heads import ungrouped
from export.passes.nodes import remove_unused_


def grouped_heads_(model: ir.Model) -> int:
    """Drop the Unsqueeze → Expand → Reshape that repeats keys and values; return how many nodes gain.

    `Attention` (opset 23) takes fewer key and value heads than query heads, as long as they divide.
    """
    count = 0
    for node in model.graph:
        if node.op_type != "Attention" or node.domain:
            continue
        shared = [ungrouped(value) for value in node.inputs[1:3]]
        if any(new is None or new is old for new, old in zip(shared, node.inputs[1:3])):
            continue
        for index, value in enumerate(shared, start=1):
            node.replace_input_with(index, value)
        count += 1
    remove_unused_(model)
    return count
