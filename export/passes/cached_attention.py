"""Write attention over a key/value cache as `GroupQueryAttention`, which appends in place."""

import numpy as np
import onnx_ir as ir

from export.passes.heads import flat, merged, remove_merge_, ungrouped

_MASKED = float(np.finfo(np.float32).min) / 2  # finite: a row of padding stays a number


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
    lengths: tuple[ir.Value, ir.Value] | None = None
    biases: dict[ir.Value, ir.Value] = {}
    count = 0
    for node in list(model.graph):
        if node.op_type != "Attention" or node.domain or len(node.inputs) < 4:
            continue
        sides = [_appended(ungrouped(value)) for value in node.inputs[1:3]]
        query, bias = node.inputs[0], node.inputs[3]
        if any(side is None for side in sides) or query is None or bias is None:
            continue
        (past_key, key, present_key), (past_value, value, present_value) = sides  # type: ignore[misc]
        heads, shared = query.shape[1], past_key.shape[1]  # type: ignore[index]
        width = past_key.shape[3]
        inner = [flat(model, v, node) for v in (query, key, value)]
        if any(v is None for v in inner) or not isinstance(heads, int):
            continue
        if lengths is None:
            lengths = _lengths(model, mask, ids, node)
        if bias not in biases:
            biases[bias] = _additive(model, bias, node)
        attributes = {"num_heads": heads, "kv_num_heads": shared, "causal": 0}
        scale = node.attributes.get("scale")
        if scale is not None:
            attributes["scale"] = scale.as_float()
        softcap = node.attributes.get("softcap")
        if softcap is not None and softcap.as_float():
            attributes["softcap"] = softcap.as_float()
        fused = ir.node(
            "GroupQueryAttention",
            [*inner, past_key, past_value, *lengths, None, None, None, biases[bias]],
            attributes,
            domain="com.microsoft",
            num_outputs=3,
        )
        fused.metadata_props.update(node.metadata_props)
        model.graph.insert_before(node, fused)
        _rename_(fused.outputs[1], present_key)
        _rename_(fused.outputs[2], present_value)
        _take_over_(model, node, fused.outputs[0], heads, int(width))  # type: ignore[arg-type]
        count += 1
    if count:
        model.opset_imports["com.microsoft"] = 1
    return count


def _appended(value: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """Return (past, new, present) where `value` is a cache input followed by new positions."""
    node = value.producer() if value is not None else None
    if node is None or value is None or node.op_type != "Concat" or len(node.inputs) != 2:
        return None
    past, new = node.inputs
    if past is None or new is None or not past.is_graph_input() or not value.is_graph_output():
        return None
    return past, new, value


def _lengths(
    model: ir.Model, mask: ir.Value, ids: ir.Value, before: ir.Node
) -> tuple[ir.Value, ir.Value]:
    """Return the index of the last position per row, (batch,) int32, and the total length, int32."""
    one = ir.node("Constant", [], {"value": ir.tensor(1, dtype=ir.DataType.INT32)})
    axis = ir.node("Constant", [], {"value": ir.tensor([0], dtype=ir.DataType.INT64)})
    size = ir.node("Shape", [mask], {"start": 1, "end": 2})
    size32 = ir.node("Cast", [size.outputs[0]], {"to": int(ir.DataType.INT32)})
    total = ir.node("Squeeze", [size32.outputs[0], axis.outputs[0]])
    last = ir.node("Sub", [size32.outputs[0], one.outputs[0]])
    batch = ir.node("Shape", [ids], {"start": 0, "end": 1})
    rows = ir.node("Expand", [last.outputs[0], batch.outputs[0]])
    model.graph.insert_before(before, [one, axis, size, size32, total, last, batch, rows])
    return rows.outputs[0], total.outputs[0]


def _additive(model: ir.Model, mask: ir.Value, before: ir.Node) -> ir.Value:
    """Return a boolean mask as 0 where it holds and a large negative number elsewhere."""
    if mask.dtype != ir.DataType.BOOL:
        return mask
    zero = ir.node("Constant", [], {"value": ir.tensor(0.0, dtype=ir.DataType.FLOAT)})
    least = ir.node("Constant", [], {"value": ir.tensor(_MASKED, dtype=ir.DataType.FLOAT)})
    where = ir.node("Where", [mask, zero.outputs[0], least.outputs[0]])
    model.graph.insert_before(before, [zero, least, where])
    return where.outputs[0]


def _rename_(new: ir.Value, old: ir.Value) -> None:
    """Let `new` be what `old` was: its uses, its place among the graph's outputs and its name."""
    name = old.name
    new.shape, new.dtype = old.shape, old.dtype
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    old.name, new.name = f"{name}_unused", name


def _take_over_(model: ir.Model, node: ir.Node, result: ir.Value, heads: int, width: int) -> None:
    """Let the 3-D `result` stand for the 4-D output of `node`."""
    flat_result = merged(node)
    if flat_result is not None:
        result.shape, result.dtype = flat_result.shape, flat_result.dtype
        ir.convenience.replace_all_uses_with(flat_result, result)
        remove_merge_(model, flat_result)
        return
    size = ir.node(
        "Constant", [], {"value": ir.tensor([0, 0, heads, width], dtype=ir.DataType.INT64)}
    )
    split = ir.node("Reshape", [result, size.outputs[0]])
    swapped = ir.node("Transpose", [split.outputs[0]], {"perm": [0, 2, 1, 3]})
    model.graph.insert_before(node, [size, split, swapped])
    swapped.outputs[0].shape, swapped.outputs[0].dtype = (
        node.outputs[0].shape,
        node.outputs[0].dtype,
    )
    ir.convenience.replace_all_uses_with(node.outputs[0], swapped.outputs[0])
