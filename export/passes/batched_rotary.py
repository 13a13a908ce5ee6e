"""Give `RotaryEmbedding` cosines and sines of the whole batch."""

import onnx_ir as ir

from export.passes.nodes import Dimension, constant, dims, insert, producer, size


def batched_rotary_(model: ir.Model) -> int:
    """Expand caches of batch 1 to the batch of what they rotate; return for how many operators.

    Without position ids the operator (opset 23) wants caches of shape (batch, sequence, width / 2).
    PyTorch's exporter writes the model's own (1, sequence, width / 2), which broadcasts there and
    which ONNX Runtime refuses for every batch but one.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type != "RotaryEmbedding" or node.domain or len(node.inputs) > 3:
            continue
        value = node.inputs[0]
        rows = dims(value)
        caches = [_cache_dims(cache) for cache in node.inputs[1:3]]
        if value is None or all(rows and sizes and sizes[0] == rows[0] for sizes in caches):
            continue
        batch = size(node, value, 0)
        shape = insert(node, "Concat", [batch, constant(node, [1, 1])], {"axis": 0})
        for index, sizes in enumerate(caches, start=1):
            cache = node.inputs[index]
            whole = (rows[0], *sizes[1:]) if rows and sizes else None
            expanded = insert(node, "Expand", [cache, shape], like=value, shape=whole)
            node.replace_input_with(index, expanded)
        count += 1
    return count


def _cache_dims(cache: ir.Value | None) -> tuple[Dimension, ...] | None:
    """Return the shape of a cosine or sine, which the exporter leaves out, by its angle's."""
    source = producer(cache, "Cos", "Sin")
    return dims(cache) or (dims(source.inputs[0]) if source is not None else None)
