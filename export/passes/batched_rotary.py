"""Give `RotaryEmbedding` cosines and sines of the whole batch."""

import onnx_ir as ir


def batched_rotary_(model: ir.Model) -> int:
    """Expand the caches of each `RotaryEmbedding` to its batch; return how many there are.

    Without position ids the operator (opset 23) wants caches of shape (batch, sequence, width / 2).
    PyTorch's exporter writes the model's own (1, sequence, width / 2), which broadcasts there and
    which ONNX Runtime refuses for every batch but one.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type != "RotaryEmbedding" or node.domain or len(node.inputs) > 3:
            continue
        ones = ir.node("Constant", [], {"value": ir.tensor([1, 1], dtype=ir.DataType.INT64)})
        batch = ir.node("Shape", [node.inputs[0]], {"start": 0, "end": 1})
        shape = ir.node("Concat", [batch.outputs[0], ones.outputs[0]], {"axis": 0})
        model.graph.insert_before(node, [ones, batch, shape])
        for index in (1, 2):
            expand = ir.node("Expand", [node.inputs[index], shape.outputs[0]])
            model.graph.insert_before(node, expand)
            node.replace_input_with(index, expand.outputs[0])
        count += 1
    return count
