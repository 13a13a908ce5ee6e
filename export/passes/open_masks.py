"""Drop attention masks that hide nothing."""

import numpy as np
import onnx_ir as ir

from export.passes.nodes import known, producer, remove_unused_


def open_masks_(model: ir.Model) -> int:
    """Take the mask off each `Attention` where it is true throughout; return of how many.

    Vision models build one from their fixed number of patches; the runtime would add it to the
    scores of every layer.
    """
    count = 0
    for node in model.graph:
        if node.op_type != "Attention" or node.domain or len(node.inputs) != 4:
            continue
        spread = producer(node.inputs[3], "Expand")
        mask = known(spread.inputs[0] if spread is not None else node.inputs[3])
        if mask is not None and mask.dtype == np.bool_ and mask.all():
            node.resize_inputs(3)
            count += 1
    remove_unused_(model)
    return count
