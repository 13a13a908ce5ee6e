"""Split queries, keys and values before their heads change places, not after."""

import onnx_ir as ir

from export.passes.heads import swaps_heads
from export.passes.nodes import dims, last_axis, remove_unused_, replace


def split_heads_(model: ir.Model) -> int:
    """Replace Transpose → Split on the last axis by Split → a Transpose each; return how many.

    The results are the same, and each now has the form that `heads.flat` sees through.
    """
    count = 0
    for node in list(model.graph):
        source = node.inputs[0].producer() if node.op_type == "Split" and node.inputs[0] else None
        if source is None or not swaps_heads(source) or not last_axis(node, default=0):
            continue
        sizes = [dims(output) for output in node.outputs]
        if any(size is None for size in sizes):
            continue
        node.replace_input_with(0, source.inputs[0])
        for output, size in zip(list(node.outputs), sizes):
            if size is None:
                continue
            swapped = ir.node("Transpose", [output], {"perm": [0, 2, 1, 3]})
            swapped.metadata_props.update(source.metadata_props)
            new = swapped.outputs[0]
            new.shape, new.type = output.shape, output.type
            replace(output, new)
            swapped.replace_input_with(0, output)
            batch, heads, sequence, width = size
            output.shape = ir.Shape([batch, sequence, heads, width])
            model.graph.insert_after(node, swapped)
        count += 1
    remove_unused_(model)
    return count
