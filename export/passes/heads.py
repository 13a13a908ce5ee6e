"""Attention heads as a graph writes them: split by Reshape and Transpose, rotated, repeated, merged.

ONNX attention operators take (batch, sequence, heads × width) directly. `flat` finds that value
behind one of shape (batch, heads, sequence, width), and `merged` the one that such a result becomes.
"""

import onnx_ir as ir


def flat(model: ir.Model, value: ir.Value, before: ir.Node) -> ir.Value | None:
    """Return the 3-D value whose heads are split in `value`, new nodes inserted before `before`.

    None where the heads do not come from a Transpose, with or without a rotary embedding after it.
    """
    node = value.producer()
    if node is None:
        return None
    if swaps_heads(node) and node.inputs[0] is not None:
        return _flat_before(model, node.inputs[0], before)
    rotary = _rotary(node)
    if rotary is None:
        return None
    source, embedding, width = rotary
    heads = source.shape[1] if source.shape is not None else None
    inner = flat(model, source, before)
    if inner is None or not isinstance(heads, int):
        return None
    attributes = dict(embedding.attributes) | {"num_heads": ir.AttrInt64("num_heads", heads)}
    if width:
        attributes["rotary_embedding_dim"] = ir.AttrInt64("rotary_embedding_dim", width)
    made = ir.node("RotaryEmbedding", [inner, *embedding.inputs[1:]], dict(attributes))
    made.metadata_props.update(embedding.metadata_props)
    made.outputs[0].dtype, made.outputs[0].shape = inner.dtype, inner.shape
    model.graph.insert_before(before, made)
    return made.outputs[0]


def merged(node: ir.Node) -> ir.Value | None:
    """Return the 3-D value that the 4-D result of `node` becomes, if that is its only use."""
    users = [use.node for use in node.outputs[0].uses()]
    if len(users) != 1 or not swaps_heads(users[0]):
        return None
    users = [use.node for use in users[0].outputs[0].uses()]
    if len(users) != 1 or users[0].op_type != "Reshape":
        return None
    value = users[0].outputs[0]
    if value.is_graph_output():  # which keeps its name
        return None
    return value if value.shape is not None and len(value.shape) == 3 else None


def remove_merge_(model: ir.Model, value: ir.Value) -> None:
    """Remove the Reshape that gave `value` and the Transpose before it: nothing needs them now."""
    reshape = value.producer()
    source = reshape.inputs[0] if reshape is not None else None
    transpose = source.producer() if source is not None else None
    if reshape is not None and transpose is not None:
        model.graph.remove([reshape, transpose], safe=True)


def ungrouped(value: ir.Value | None) -> ir.Value | None:
    """Return what grouped queries share, before it is repeated for each: Unsqueeze → Expand → Reshape."""
    found = value
    for kind in ("Reshape", "Expand", "Unsqueeze"):
        node = found.producer() if found is not None else None
        if node is None or node.op_type != kind:
            return value
        found = node.inputs[0]
    four = found is not None and found.shape is not None and len(found.shape) == 4
    return found if four else value


def swaps_heads(node: ir.Node) -> bool:
    """Whether `node` exchanges the second and third of four axes."""
    order = node.attributes.get("perm")
    return node.op_type == "Transpose" and order is not None and list(order.value) == [0, 2, 1, 3]


def _flat_before(model: ir.Model, split: ir.Value, before: ir.Node) -> ir.Value | None:
    """Return the 3-D value behind `split` (batch, sequence, heads, width), reshaped anew if need be."""
    if split.shape is None or len(split.shape) != 4:
        return None
    heads, width = split.shape[2], split.shape[3]
    if not isinstance(heads, int) or not isinstance(width, int):
        return None
    reshape = split.producer()
    source = reshape.inputs[0] if reshape is not None and reshape.op_type == "Reshape" else None
    if source is not None and source.shape is not None and len(source.shape) == 3:
        if source.shape[2] == heads * width:
            return source
    size = ir.tensor([0, 0, heads * width], dtype=ir.DataType.INT64)
    shape = ir.node("Constant", [], {"value": size})
    again = ir.node("Reshape", [split, shape.outputs[0]])
    again.outputs[0].dtype = split.dtype
    again.outputs[0].shape = ir.Shape([split.shape[0], split.shape[1], heads * width])
    model.graph.insert_before(before, [shape, again])
    return again.outputs[0]


def _rotary(node: ir.Node) -> tuple[ir.Value, ir.Node, int] | None:
    """Return (value, RotaryEmbedding, rotated width or 0 for all) of a possibly partial rotation."""
    if node.op_type == "RotaryEmbedding" and not node.domain and node.inputs[0] is not None:
        return node.inputs[0], node, 0
    if node.op_type != "Concat" or len(node.inputs) != 2:
        return None
    turned, rest = (v.producer() if v is not None else None for v in node.inputs)
    if turned is None or rest is None or turned.op_type != "RotaryEmbedding":
        return None
    first = turned.inputs[0].producer() if turned.inputs[0] is not None else None
    if first is None or first.op_type != "Slice" or rest.op_type != "Slice":
        return None
    source, size = first.inputs[0], turned.inputs[0].shape if turned.inputs[0] is not None else None
    if source is None or source is not rest.inputs[0] or size is None:
        return None
    width = size[3]
    return (source, turned, width) if isinstance(width, int) else None
