"""Remove nodes that give back what they are given."""

import onnx_ir as ir

from export.passes.nodes import dims, known, producer, remove_unused_


def identities_(model: ir.Model) -> int:
    """Bypass nodes that change nothing; return how many.

    PyTorch's exporter writes what the model's code says: a reshape to the same shape, a padding of
    nothing, `mask & True`. Each costs a call, and hides a pattern from the passes that follow.
    """
    count = 0
    for node in list(model.graph):
        same = _unchanged(node)
        if same is None or node.outputs[0].is_graph_output():
            continue
        ir.convenience.replace_all_uses_with(node.outputs[0], same)
        model.graph.remove(node, safe=True)
        count += 1
    remove_unused_(model)
    return count


def _unchanged(node: ir.Node) -> ir.Value | None:
    """Return the input that the one output of `node` always equals."""
    if node.domain or not node.inputs or len(node.outputs) != 1:
        return None
    first, output = node.inputs[0], node.outputs[0]
    kind = node.op_type
    if first is None:
        return None
    if kind == "Identity":
        return first
    if kind in ("Reshape", "Expand"):
        return first if dims(first) is not None and dims(first) == dims(output) else None
    if kind == "Cast":
        return first if first.dtype is not None and first.dtype == output.dtype else None
    if kind == "Pad":
        amounts = known(node.inputs[1])
        return first if amounts is not None and not amounts.any() else None
    if kind == "And":
        for value, other in zip(node.inputs, reversed(node.inputs)):
            array = known(other)
            if array is not None and array.all() and dims(value) == dims(output) is not None:
                return value
    if kind == "Squeeze" and (source := producer(first, "Unsqueeze")) is not None:
        inner = source.inputs[0]
        return inner if dims(inner) is not None and dims(inner) == dims(output) else None
    return None
