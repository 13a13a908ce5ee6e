"""Reshape to a constant target instead of one that is put together at run time."""

import numpy as np
import onnx_ir as ir

from export.passes.nodes import constant, dims, known, remove_unused_


def constant_reshape_(model: ir.Model) -> int:
    """Replace computed targets of `Reshape` by constants; return how many.

    PyTorch's exporter asks each dynamic size with Shape and joins the target with Concat. A size that
    stays where it is can be written as 0, and one other as −1. Only where that says all of it.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type != "Reshape" or node.domain or known(node.inputs[1]) is not None:
            continue
        before, after = dims(node.inputs[0]), dims(node.outputs[0])
        target = _target(before, after) if before is not None and after is not None else None
        if target is None:
            continue
        node.replace_input_with(1, constant(node, target))
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
        count += 1
    remove_unused_(model)
    return count


def _target(before: tuple, after: tuple) -> np.ndarray | None:
    """Return the sizes of `after`, 0 for one copied from `before` and −1 for at most one other."""
    made = []
    for index, size in enumerate(after):
        if isinstance(size, int):
            if size <= 0:
                return None
            made.append(size)
        else:
            made.append(0 if index < len(before) and before[index] == size else -1)
    return np.array(made) if made.count(-1) <= 1 else None
