"""Split queries, keys and values before their heads change places, not after."""

import onnx_ir as ir

from export.passes.heads import swaps_heads


def split_heads_(model: ir.Model) -> int:
    """Replace Transpose → Split on the last axis by Split → a Transpose each; return how many.

    The results are the same, and each now has the form that `heads.flat` sees through.
    """
    count = 0
    for node in list(model.graph):
        source = node.inputs[0].producer() if node.op_type == "Split" and node.inputs[0] else None
        axis = node.attributes.get_int("axis", 0)
        if source is None or not swaps_heads(source) or axis not in (-1, 3):
            continue
        before = source.inputs[0]
        if before is None or before.shape is None:
            continue
        node.replace_input_with(0, before)
        for output in list(node.outputs):
            swapped = ir.node("Transpose", [output], {"perm": [0, 2, 1, 3]})
            swapped.metadata_props.update(node.metadata_props)
            new = swapped.outputs[0]
            new.shape, new.dtype = output.shape, output.dtype
            for use in list(output.uses()):
                if use.node is not swapped:
                    use.node.replace_input_with(use.idx, new)
            if output.shape is not None and len(output.shape) == 4:
                b, h, s, w = output.shape
                output.shape = ir.Shape([b, s, h, w])
            model.graph.insert_after(node, swapped)
        count += 1
    return count
