"""Recognise a rotary embedding that is written out, and write it as the one operator."""

import onnx_ir as ir

from export.passes.nodes import dims, insert, known, producer, remove_unused_, replace

_OPSET = 23


def rotary_(model: ir.Model) -> int:
    """Replace x·cos + rotate_half(x)·sin by `RotaryEmbedding`; return how often.

    PyTorch's exporter finds it in float32; in half precision a Cast of the tables stands between.
    Cosine and sine are of the same angles twice over, of which the operator takes one half. From
    opset 23, which has the operator.
    """
    if model.opset_imports.get("", 0) < _OPSET:
        return 0
    count = 0
    for node in list(model.graph):
        if node.op_type != "Add" or node.domain:
            continue
        for plain, turned in (node.inputs, reversed(node.inputs)):
            if _fuse_(node, producer(plain, "Mul"), producer(turned, "Mul")):
                count += 1
                break
    remove_unused_(model)
    return count


def _fuse_(add: ir.Node, plain: ir.Node | None, turned: ir.Node | None) -> bool:
    """Put the operator in the place of `add`; return whether its sides are a rotation."""
    if plain is None or turned is None:
        return False
    for value, table in (plain.inputs, reversed(plain.inputs)):
        for half, other in (turned.inputs, reversed(turned.inputs)):
            if value is None or not _rotates(value, producer(half, "Concat")):
                continue
            cos, sin = _angles(table, "Cos"), _angles(other, "Sin")
            if cos is None or sin is None or cos is not sin:
                continue
            tables = [_table(add, kind, cos, value) for kind in ("Cos", "Sin")]
            made = insert(add, "RotaryEmbedding", [value, *tables], like=add.outputs[0])
            replace(add.outputs[0], made)
            return True
    return False


def _rotates(value: ir.Value, concat: ir.Node | None) -> bool:
    """Whether `concat` is (−the second half, the first half) of the last axis of `value`."""
    sizes = dims(value)
    if concat is None or sizes is None or len(sizes) != 4 or len(concat.inputs) != 2:
        return False
    negated, first = producer(concat.inputs[0], "Neg"), producer(concat.inputs[1], "Slice")
    second = producer(negated.inputs[0], "Slice") if negated is not None else None
    if first is None or second is None or not isinstance(sizes[3], int):
        return False
    half = sizes[3] // 2
    return (
        first.inputs[0] is value
        and second.inputs[0] is value
        and _bounds(first, sizes[3]) == (0, half)
        and _bounds(second, sizes[3]) == (half, sizes[3])
    )


def _bounds(cut: ir.Node, width: int) -> tuple[int, int] | None:
    """Return (start, end) of a Slice of the last of four axes by single steps."""
    numbers = [known(value) for value in cut.inputs[1:]]
    if len(numbers) < 3 or any(array is None or array.size != 1 for array in numbers):
        return None
    start, end, axis, *step = (int(array.item()) for array in numbers if array is not None)
    return (start, min(end, width)) if axis in (-1, 3) and step in ([], [1]) else None


def _angles(table: ir.Value | None, kind: str) -> ir.Value | None:
    """Return the angles whose cosine or sine, twice over, is the `table` (batch, 1, sequence, width)."""
    spread = producer(table, "Unsqueeze")
    axes = known(spread.inputs[1]) if spread is not None and len(spread.inputs) > 1 else None
    if spread is None or axes is None or axes.tolist() != [1]:
        return None
    value = spread.inputs[0]
    cast = producer(value, "Cast")
    trigonometric = producer(cast.inputs[0] if cast is not None else value, kind)
    both = producer(trigonometric.inputs[0], "Concat") if trigonometric is not None else None
    if both is None or len(both.inputs) != 2 or both.inputs[0] is not both.inputs[1]:
        return None
    return both.inputs[0] if both.attributes.get_int("axis", 0) in (-1, 2) else None


def _table(before: ir.Node, kind: str, angles: ir.Value, value: ir.Value) -> ir.Value:
    """Return the cosine or sine of the angles in the type of `value`."""
    made = insert(before, kind, [angles], like=angles)
    if value.dtype is None or value.dtype == angles.dtype:
        return made
    rounded = insert(before, "Cast", [made], {"to": int(value.dtype)}, shape=dims(angles))
    rounded.dtype = value.dtype
    return rounded
