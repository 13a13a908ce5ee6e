"""Attention heads as a graph writes them: split by Reshape and Transpose, rotated, repeated, merged.

ONNX attention operators take (batch, sequence, heads × width) directly. `flat` finds that value
behind one of shape (batch, heads, sequence, width), and `merged` the one that such a result becomes.
"""

import onnx_ir as ir

from export.passes.nodes import constant, dims, insert, integers, known, only_user, producer, rank

_SWAP = [0, 2, 1, 3]


def flat(value: ir.Value | None, before: ir.Node) -> ir.Value | None:
    """Return the 3-D value whose heads are split in `value`, new nodes inserted before `before`.

    None where the heads do not come from a Transpose, with or without a rotary embedding after it.
    """
    node = producer(value, "Transpose", "RotaryEmbedding", "Concat")
    if node is None:
        return None
    if swaps_heads(node):
        return _flat_before(node.inputs[0], before)
    rotary = _rotary(node)
    if rotary is None:
        return None
    source, embedding, width = rotary
    inner = flat(source, before)
    heads = dims(source)
    if inner is None or heads is None or not isinstance(heads[1], int):
        return None
    attributes = {name: attribute.value for name, attribute in embedding.attributes.items()}
    attributes["num_heads"] = heads[1]
    if width:
        attributes["rotary_embedding_dim"] = width
    made = insert(before, "RotaryEmbedding", [inner, *embedding.inputs[1:]], attributes, like=inner)
    source_node = made.producer()
    assert source_node is not None
    source_node.metadata_props.update(embedding.metadata_props)
    return made


def merged(value: ir.Value) -> ir.Value | None:
    """Return the 3-D value that the 4-D `value` becomes, if that is its only use."""
    swap = only_user(value, "Transpose")
    if swap is None or not swaps_heads(swap):
        return None
    reshape = only_user(swap.outputs[0], "Reshape")
    if reshape is None or reshape.outputs[0].is_graph_output():  # which keeps its name
        return None
    return reshape.outputs[0] if rank(reshape.outputs[0]) == 3 else None


def replace_merged_(old: ir.Value, merge: ir.Value, new: ir.Value) -> None:
    """Let the 3-D `new` stand for `merge`, which the 4-D `old` became; drop what merged it."""
    new.shape, new.type = merge.shape, merge.type
    ir.convenience.replace_all_uses_with(merge, new)
    reshape = merge.producer()
    swap = only_user(old)
    if reshape is not None and swap is not None and reshape.graph is not None:
        reshape.graph.remove([reshape, swap], safe=True)


def ungrouped(value: ir.Value | None) -> ir.Value | None:
    """Return what grouped queries share, before Unsqueeze → Expand → Reshape repeats it for each.

    That is `value` itself where nothing is repeated.
    """
    found = value
    for kind in ("Reshape", "Expand", "Unsqueeze"):
        node = producer(found, kind)
        if node is None:
            return value
        if kind == "Unsqueeze":  # each head is repeated in its place, as the operators do it
            axes = known(node.inputs[1])
            if axes is None or axes.tolist() != [2]:
                return value
        found = node.inputs[0]
    return found if rank(found) == 4 else value


def swaps_heads(node: ir.Node) -> bool:
    """Whether `node` exchanges the second and third of four axes."""
    return node.op_type == "Transpose" and integers(node, "perm") == _SWAP


def _flat_before(split: ir.Value | None, before: ir.Node) -> ir.Value | None:
    """Return the 3-D value behind `split` (batch, sequence, heads, width), reshaped anew if need be."""
    sizes = dims(split)
    if split is None or sizes is None or len(sizes) != 4:
        return None
    batch, sequence, heads, width = sizes
    if not isinstance(heads, int) or not isinstance(width, int):
        return None
    whole = (batch, sequence, heads * width)
    reshape = producer(split, "Reshape")
    if reshape is not None and dims(reshape.inputs[0]) == whole:
        return reshape.inputs[0]
    target = constant(before, [0, 0, heads * width])
    return insert(before, "Reshape", [split, target], like=split, shape=whole)


def _rotary(node: ir.Node) -> tuple[ir.Value, ir.Node, int] | None:
    """Return (value, RotaryEmbedding, rotated width or 0 for all) of a possibly partial rotation."""
    if node.op_type == "RotaryEmbedding":
        return (node.inputs[0], node, 0) if node.inputs[0] is not None else None
    if node.op_type != "Concat" or len(node.inputs) != 2:
        return None
    turned, rest = (
        producer(value, kind) for value, kind in zip(node.inputs, ("RotaryEmbedding", "Slice"))
    )
    first = producer(turned.inputs[0], "Slice") if turned is not None else None
    if turned is None or rest is None or first is None:
        return None
    source, sizes = first.inputs[0], dims(turned.inputs[0])
    if source is None or source is not rest.inputs[0] or sizes is None:
        return None
    width = sizes[-1]
    # the first `width` are turned, and what follows is not
    starts = [known(part.inputs[1]) for part in (first, rest)]
    if not isinstance(width, int) or any(start is None for start in starts):
        return None
    found = [start.tolist() for start in starts if start is not None]
    return (source, turned, width) if found == [[0], [width]] else None
