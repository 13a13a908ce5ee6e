"""Mask with a number that ONNX Runtime takes as a number."""

import numpy as np
import onnx_ir as ir

from export.passes.nodes import constant, known, producer, remove_unused_

_STEPS = ("Add", "Expand", "Reshape", "Unsqueeze", "Where")


def finite_masks_(model: ir.Model) -> int:
    """Halve the lowest number of masks that are added to attention scores; return how many.

    Models mask with float32's lowest number. Where a whole row is masked, all scores are then equal,
    and PyTorch averages; ONNX Runtime takes that very number for "masked" and gives zeros.
    """
    count = 0
    waiting = [
        node.inputs[3]
        for node in model.graph
        if node.op_type == "Attention" and len(node.inputs) > 3
    ]
    seen: set[ir.Value] = set()
    while waiting:
        value = waiting.pop()
        node = producer(value, *_STEPS)
        if node is None or value is None or value in seen:
            continue
        seen.add(value)
        waiting += node.inputs
        if node.op_type != "Where":
            continue
        for index in (1, 2):
            array = known(node.inputs[index])
            if array is None or array.size != 1 or array.dtype.kind != "f":
                continue
            if (lowest := np.finfo(array.dtype).min) == array.item():
                half = constant(node, np.reshape(lowest / 2, array.shape), array.dtype)
                node.replace_input_with(index, half)
                count += 1
    remove_unused_(model)
    return count
