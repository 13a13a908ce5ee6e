"""Take the padding mask as it is, where the graph looks it up entry by entry."""

import onnx_ir as ir

from export.passes.nodes import (
    constant,
    dims,
    insert,
    known,
    producer,
    rank,
    remove_unused_,
    replace,
    scalar,
)


def plain_padding_mask_(model: ir.Model) -> int:
    """Replace mask[rows, columns] over all rows and columns by Unsqueeze; return how often.

    Transformers builds masks from functions of four indices, and so `attention_mask` is gathered
    with the index of each row and of each column: a dozen operators that give it back unchanged.
    """
    count = 0
    for node in list(model.graph):
        if (
            node.op_type != "GatherND"
            or node.domain
            or node.attributes.get_int("batch_dims", 0) != 0
        ):
            continue
        mask, output = node.inputs[0], node.outputs[0]
        both = producer(node.inputs[1], "Concat")
        if mask is None or both is None or len(both.inputs) != 2 or rank(mask) != 2:
            continue
        indices = [_expanded(value) for value in both.inputs]
        sizes = [dims(value) if _counts(value) else None for value in indices]
        if sizes[0] is None or sizes[1] is None or len(sizes[0]) != len(sizes[1]):
            continue
        axes = list(range(1, len(sizes[0]) - 1))
        whole = (dims(mask) or ())[1:] == sizes[1][-1:]
        # a mask of other rows than the model's would fail further on
        if not whole or any(size != 1 for size in (*sizes[0][1:], *sizes[1][:-1])):
            continue
        replace(output, insert(node, "Unsqueeze", [mask, constant(node, axes)], like=output))
        count += 1
    remove_unused_(model)
    return count


def _expanded(value: ir.Value | None) -> ir.Value | None:
    """Return what is expanded to the shape of all indices and given an axis for their tuple."""
    last = producer(value, "Unsqueeze")
    source = producer(last.inputs[0], "Expand") if last is not None else None
    return source.inputs[0] if source is not None else None


def _counts(value: ir.Value | None) -> bool:
    """Whether `value` is 0, 1, 2, … along its one axis that is longer than 1."""
    node = producer(value, "Unsqueeze", "Range")
    if node is None:
        return False
    if node.op_type == "Unsqueeze":
        return known(node.inputs[1]) is not None and _counts(node.inputs[0])
    return scalar(node.inputs[0]) == 0 and scalar(node.inputs[2]) == 1
