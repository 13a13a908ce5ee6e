"""Take queries, keys and values out of their common projection with one `Split`."""

import math

import numpy as np
import onnx_ir as ir

from export.passes.nodes import constant, dims, insert, known, only_user, remove_unused_, replace


def packed_projections_(model: ir.Model) -> int:
    """Replace Reshape(…, n, heads, width) → n × (Slice → Squeeze) by Split → n × Reshape.

    Returns how many projections were split. The pieces are then (batch, sequence, heads × width),
    as attention operators take them.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type != "Reshape" or node.domain:
            continue
        value, packed = node.inputs[0], node.outputs[0]
        before, after = dims(value), dims(packed)
        if value is None or before is None or after is None or packed.is_graph_output():
            continue
        axis = len(before) - 1  # the one that is split in (n, heads, width)
        if len(after) < len(before) + 1 or after[:axis] != before[:axis]:
            continue
        pieces = [_piece(use.node, axis, len(after)) for use in packed.uses()]
        inner = after[axis + 1 :]
        if sorted(i for i, _ in pieces) != list(range(len(pieces))) or after[axis] != len(pieces):
            continue
        known_sizes = [size for size in inner if isinstance(size, int)]
        if len(known_sizes) != len(inner):
            continue
        width = math.prod(known_sizes)
        split = ir.node(
            "Split", [value], {"axis": axis, "num_outputs": len(pieces)}, num_outputs=len(pieces)
        )
        split.metadata_props.update(node.metadata_props)
        model.graph.insert_before(node, split)
        for index, squeezed in pieces:
            assert squeezed is not None
            part = split.outputs[index]
            part.type, part.shape = value.type, ir.Shape([*before[:axis], width])
            target = constant(node, [*[0] * axis, *inner])
            replace(squeezed, insert(node, "Reshape", [part, target], like=squeezed))
        count += 1
    remove_unused_(model)
    return count


def _piece(node: ir.Node, axis: int, rank: int) -> tuple[int, ir.Value | None]:
    """Return (index, value) where `node` and a Squeeze after it pick one index of `axis`, else (−1,)."""
    if node.op_type != "Slice" or len(node.inputs) < 4:
        return -1, None
    starts, ends, axes = (known(value) for value in node.inputs[1:4])
    steps = known(node.inputs[4]) if len(node.inputs) > 4 else np.array([1])
    if any(a is None or a.size != 1 for a in (starts, ends, axes, steps)):
        return -1, None
    start, end, sliced, step = (int(a.item()) for a in (starts, ends, axes, steps))  # type: ignore[union-attr]
    squeeze = only_user(node.outputs[0], "Squeeze")
    squeezed = known(squeeze.inputs[1]) if squeeze is not None and len(squeeze.inputs) > 1 else None
    if squeeze is None or squeezed is None or squeezed.size != 1:
        return -1, None
    if any(a % rank != axis for a in (sliced, int(squeezed.item()))) or step != 1:
        return -1, None
    return (start, squeeze.outputs[0]) if end == start + 1 else (-1, None)
