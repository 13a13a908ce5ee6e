"""Feed `Attention` its projections as they come, without splitting heads outside."""

import onnx_ir as ir

from export.passes.heads import flat, merged, replace_merged_
from export.passes.nodes import dims, remove_unused_


def flat_attention_(model: ir.Model) -> int:
    """Replace Reshape → Transpose → Attention → Transpose → Reshape by Attention on 3-D values.

    The operator (opset 23) takes (batch, sequence, heads × width) with the head counts as
    attributes; the shape arithmetic around it goes away. Only where all four sides have the pattern.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type != "Attention" or node.domain or len(node.outputs) != 1:
            continue
        output = node.outputs[0]
        result = merged(output)
        sizes = [dims(value) for value in node.inputs[:3]]
        heads = [size[1] for size in sizes if size is not None and len(size) == 4]
        if result is None or len(heads) != 3 or not all(isinstance(h, int) for h in heads):
            continue
        sides = [flat(value, node) for value in node.inputs[:3]]
        if any(side is None for side in sides):
            continue
        for index, side in enumerate(sides):
            node.replace_input_with(index, side)
        for name, number in zip(("q_num_heads", "kv_num_heads"), heads):
            node.attributes[name] = ir.AttrInt64(name, int(number))  # type: ignore[arg-type]
        replace_merged_(output, result, output)
        count += 1
    remove_unused_(model)
    return count
