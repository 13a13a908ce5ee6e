"""Feed `Attention` its projections as they come, without splitting heads outside."""

import onnx_ir as ir

from export.passes.heads import flat, merged, remove_merge_


def flat_attention_(model: ir.Model) -> int:
    """Replace Reshape → Transpose → Attention → Transpose → Reshape by Attention on 3-D values.

    The operator (opset 23) takes (batch, sequence, heads × width) with the head counts as
    attributes; the shape arithmetic around it goes away. Only where all four sides have the pattern.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type != "Attention" or node.domain or len(node.outputs) != 1:
            continue
        result = merged(node)
        heads = [
            v.shape[1] if v is not None and v.shape is not None else None for v in node.inputs[:3]
        ]
        if result is None or not all(isinstance(h, int) for h in heads):
            continue
        sides = [flat(model, value, node) for value in node.inputs[:3] if value is not None]
        if len(sides) != 3 or any(side is None for side in sides):
            continue
        for index, side in enumerate(sides):
            node.replace_input_with(index, side)
        for name, size in (("q_num_heads", heads[0]), ("kv_num_heads", heads[1])):
            node.attributes[name] = ir.AttrInt64(name, size)  # type: ignore[arg-type]
        output = node.outputs[0]
        output.shape = result.shape
        ir.convenience.replace_all_uses_with(result, output)
        remove_merge_(model, result)
        count += 1
    return count
