"""Write attention over a key/value cache as `GroupQueryAttention`, which appends in place."""

import numpy as np
import onnx_ir as ir
from ml_dtypes import finfo

from export.passes.heads import flat, merged, replace_merged_, ungrouped
from export.passes.nodes import constant, dims, insert, producer, remove_unused_, replace


def cached_attention_(model: ir.Model) -> int:
    """Replace Concat(past, new) → `Attention` by `GroupQueryAttention`; return how often.

    The operator appends to the cache, in place where the runtime binds past and present to one
    buffer. It takes queries, keys and values as (batch, sequence, heads × width) and the model's own
    mask as an additive bias, so windows and padding mean what they meant.
    """
    by_name = {value.name: value for value in model.graph.inputs}
    mask, ids = by_name.get("attention_mask"), by_name.get("input_ids")
    if mask is None or ids is None:
        return 0
    count = 0
    for node in list(model.graph):
        if node.op_type == "Attention" and not node.domain and len(node.inputs) == 4:
            count += _replace_(node, mask, ids)
    remove_unused_(model)
    if count:
        model.opset_imports["com.microsoft"] = 1
    return count


def _replace_(node: ir.Node, mask: ir.Value, ids: ir.Value) -> bool:
    """Put the operator in the place of `node`; return whether it has the pattern."""
    keys, values = (_appended(ungrouped(value)) for value in node.inputs[1:3])
    query, bias = node.inputs[0], node.inputs[3]
    if keys is None or values is None or query is None or bias is None:
        return False
    inner = [flat(value, node) for value in (query, keys[1], values[1])]
    sizes = [dims(value) for value in (query, keys[0], values[0])]
    if any(value is None for value in inner):
        return False
    heads = [size[1] for size in sizes if size is not None and isinstance(size[1], int)]
    widths = [size[3] for size in sizes if size is not None and isinstance(size[3], int)]
    if len(heads) != 3 or len(set(widths)) != 1 or heads[1] != heads[2]:
        return False
    attributes: dict[str, int | float] = {
        "num_heads": heads[0],
        "kv_num_heads": heads[1],
        "causal": 0,
    }
    for name in ("scale", "softcap"):
        if (number := node.attributes.get_float(name, 0.0)) != 0:
            attributes[name] = number
    fused = ir.node(
        "GroupQueryAttention",
        [
            *inner,
            keys[0],
            values[0],
            *_lengths(node, mask, ids),
            *[None] * 3,
            _additive(node, bias, keys[0]),
        ],
        attributes,
        domain="com.microsoft",
        num_outputs=3,
    )
    fused.metadata_props.update(node.metadata_props)
    model_graph = node.graph
    assert model_graph is not None
    model_graph.insert_before(node, fused)
    for new, old in zip(fused.outputs[1:], (keys[2], values[2])):
        new.shape, new.type = old.shape, old.type
        replace(old, new)
    _take_over_(node, fused.outputs[0])
    return True


def _appended(value: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """Return (past, new, present) where `value` is a cache input followed by new positions."""
    node = producer(value, "Concat")
    if node is None or value is None or len(node.inputs) != 2 or not value.is_graph_output():
        return None
    past, new = node.inputs
    if past is None or new is None or not past.is_graph_input():
        return None
    return (past, new, value) if node.attributes.get_int("axis", 0) in (2, -2) else None


def _lengths(before: ir.Node, mask: ir.Value, ids: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return the index of the last position per row, (batch,) int32, and the total length, int32."""
    size = insert(before, "Shape", [mask], {"start": 1, "end": 2})
    size32 = insert(before, "Cast", [size], {"to": int(ir.DataType.INT32)})
    total = insert(before, "Squeeze", [size32, constant(before, [0])])
    last = insert(before, "Sub", [size32, constant(before, 1, np.int32)])
    batch = insert(before, "Shape", [ids], {"start": 0, "end": 1})
    return insert(before, "Expand", [last, batch]), total


def _additive(before: ir.Node, mask: ir.Value, past: ir.Value) -> ir.Value:
    """Return a boolean mask as 0 where it holds and a large negative number elsewhere."""
    if mask.dtype != ir.DataType.BOOL:
        return mask
    kind = past.dtype.numpy() if past.dtype is not None else np.dtype(np.float32)
    # finite, so that a row of padding stays a number
    zero, masked = (constant(before, x, kind) for x in (0, float(finfo(kind).min) / 2))
    return insert(before, "Where", [mask, zero, masked], like=zero, shape=dims(mask))


def _take_over_(node: ir.Node, result: ir.Value) -> None:
    """Let the 3-D `result` stand for the 4-D output of `node`."""
    old = node.outputs[0]
    together = merged(old)
    if together is not None:
        replace_merged_(old, together, result)
        return
    batch, heads, sequence, width = dims(old) or ()
    result.type = old.type
    target = constant(node, [0, 0, heads, width])
    apart = (batch, sequence, heads, width)
    split = insert(node, "Reshape", [result, target], like=old, shape=apart)
    replace(old, insert(node, "Transpose", [split], {"perm": [0, 2, 1, 3]}, like=old))
