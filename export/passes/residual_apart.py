"""Keep the residual addition apart from the LayerNormalization that follows."""

import onnx_ir as ir

from export.passes.nodes import constant, dims, insert, last_axis, only_user, producer, replace


def residual_apart_(model: ir.Model) -> int:
    """Write Add → LayerNormalization with an axis of one between the last two; return how many.

    ONNX Runtime fuses `Add → LayerNormalization` into `SkipLayerNormalization` at its default level,
    and on the CPU provider that is several times slower than the two apart. The reshapes around the
    normalisation move no number, and keep the pattern from matching. `Sum` for `Add` does so too,
    and runs on one thread (docs/decisions/0003). A sum that something else needs is not fused.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type != "LayerNormalization" or not last_axis(node) or len(node.outputs) != 1:
            continue
        total = node.inputs[0]
        added, sizes = producer(total, "Add"), dims(total)
        if total is None or added is None or sizes is None or not isinstance(sizes[-1], int):
            continue
        computed = all(v is not None and v.const_value is None for v in added.inputs)
        if not computed or only_user(total, "LayerNormalization") is None:
            continue
        outer, width = [0] * (len(sizes) - 1), sizes[-1]  # 0: as it is
        shape = [*sizes[:-1], 1, width]
        wide = insert(
            node, "Reshape", [total, constant(node, [*outer, 1, width])], like=total, shape=shape
        )
        attributes = {**node.attributes, "axis": -1}
        made = insert(
            node,
            "LayerNormalization",
            [wide, *node.inputs[1:]],
            attributes,
            like=total,
            shape=shape,
        )
        back = insert(node, "Reshape", [made, constant(node, [*outer, width])], like=total)
        replace(node.outputs[0], back)
        model.graph.remove(node, safe=True)
        count += 1
    return count
