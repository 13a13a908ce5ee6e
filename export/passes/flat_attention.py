"""Feed `Attention` its projections as they come, without splitting heads outside."""

import onnx_ir as ir


def flat_attention_(model: ir.Model) -> int:
    """Replace Reshape → Transpose → Attention → Transpose → Reshape by Attention on 3-D values.

    The operator (opset 23) takes (batch, sequence, heads × width) with the head counts as
    attributes; the shape arithmetic around it goes away. Only where all four sides have the pattern.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type != "Attention" or node.domain or len(node.outputs) != 1:
            continue
        sides = [_split_heads(value) for value in node.inputs[:3]]
        merged = _merged_heads(node)
        if merged is None or any(side is None for side in sides):
            continue
        flat = [side for side in sides if side is not None]
        for index, (value, _) in enumerate(flat):
            node.replace_input_with(index, value)
        node.attributes["q_num_heads"] = ir.AttrInt64("q_num_heads", flat[0][1])
        node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", flat[1][1])
        result = node.outputs[0]
        result.shape = merged.shape
        ir.convenience.replace_all_uses_with(merged, result)
        _remove_with_source_(model, merged)
        count += 1
    return count


def _split_heads(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """Return the 3-D value behind (batch, heads, sequence, width), and its number of heads."""
    transpose = value.producer() if value is not None else None
    if transpose is None or not _swaps_heads(transpose) or transpose.inputs[0] is None:
        return None
    reshape = transpose.inputs[0].producer()
    if reshape is None or reshape.op_type != "Reshape" or reshape.inputs[0] is None:
        return None
    flat, split = reshape.inputs[0], reshape.outputs[0]
    if flat.shape is None or len(flat.shape) != 3 or split.shape is None or len(split.shape) != 4:
        return None
    features, width = flat.shape[2], split.shape[3]
    if not isinstance(features, int) or not isinstance(width, int) or features % width:
        return None
    return flat, features // width


def _merged_heads(node: ir.Node) -> ir.Value | None:
    """Return the 3-D value that the attention's result becomes, if that is its only use."""
    users = [use.node for use in node.outputs[0].uses()]
    if len(users) != 1 or not _swaps_heads(users[0]):
        return None
    users = [use.node for use in users[0].outputs[0].uses()]
    if len(users) != 1 or users[0].op_type != "Reshape":
        return None
    merged = users[0].outputs[0]
    if merged.is_graph_output():  # which keeps its name
        return None
    return merged if merged.shape is not None and len(merged.shape) == 3 else None


def _remove_with_source_(model: ir.Model, merged: ir.Value) -> None:
    """Remove the Reshape that gave `merged` and the Transpose before it: their input is flat now."""
    reshape = merged.producer()
    value = reshape.inputs[0] if reshape is not None else None
    transpose = value.producer() if value is not None else None
    if reshape is not None and transpose is not None:
        model.graph.remove([reshape, transpose], safe=True)


def _swaps_heads(node: ir.Node) -> bool:
    order = node.attributes.get("perm")
    return node.op_type == "Transpose" and order is not None and list(order.value) == [0, 2, 1, 3]
