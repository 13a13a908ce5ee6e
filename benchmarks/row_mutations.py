"""Kinds of damage that show in few rows or cases only; like those of `mutations`."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks.mutations import Mutation, Random

_DROPPABLE = ("attention_mask", "token_type_ids", "position_ids")


def _pick(random: Random, items: Sequence[Any]) -> Any:
    return items[int(random.integers(len(items)))] if items else None


def _constant(array: np.ndarray) -> ir.Node:
    return ir.node("Constant", [], {"value": ir.tensor(np.ascontiguousarray(array))})


def _whole(*numbers: int) -> ir.Node:
    return _constant(np.array(numbers, np.int64))


def _read_instead_(model: ir.Model, value: ir.Value, made: list[ir.Node]) -> None:
    """Let all who read a graph's input read the last of `made` instead."""
    uses = [use for use in value.uses() if use.node not in made]
    model.graph.insert_before(model.graph[0], made)
    for use in uses:
        use.node.replace_input_with(use.idx, made[-1].outputs[0])


def _put_before_output_(
    model: ir.Model, index: int, change: Callable[[ir.Value], list[ir.Node]]
) -> None:
    """Change an output: the last node of what `change` makes of it takes its name and place."""
    value = model.graph.outputs[index]
    made = change(value)
    last, name = made[-1].outputs[0], value.name
    last.type, last.shape = value.type, value.shape
    model.graph.extend(made)
    value.name = f"{name}_unchanged"
    last.name = name
    model.graph.outputs[index] = last


def dropped_input(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """An input that no longer matters: the mask all ones, or another one all zero."""
    found = [v for v in model.graph.inputs if v.name in _DROPPABLE and list(v.uses())]
    value = _pick(random, found)
    if value is None:
        return None
    zero = ir.node("Sub", [value, value])
    made = [zero]
    if value.name == "attention_mask":
        one = _constant(np.array(1, value.dtype.numpy()))
        made += [one, ir.node("Add", [zero.outputs[0], one.outputs[0]])]
    _read_instead_(model, value, made)
    return f"input {value.name}", ""


def _rolled(value: ir.Value, axis: int, step: int) -> list[ir.Node]:
    """Return nodes that move `value` by one place along an axis, the one beyond the end to the other."""
    first = step if step < 0 else 1
    cut, end, start, along = _whole(first), _whole(2**62), _whole(0), _whole(axis)
    tail = ir.node("Slice", [value, *(n.outputs[0] for n in (cut, end, along))])
    head = ir.node("Slice", [value, *(n.outputs[0] for n in (start, cut, along))])
    both = ir.node("Concat", [tail.outputs[0], head.outputs[0]], {"axis": axis})
    return [cut, end, start, along, tail, head, both]


def ragged_cache(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """A decoder's mask, or the keys or values of one layer's cache, off by one place."""
    pasts = [v for v in model.graph.inputs if str(v.name).startswith("past_key_values.")]
    masks = [v for v in model.graph.inputs if v.name == "attention_mask"]
    if not pasts:
        return None
    value = _pick(random, masks if masks and random.integers(2) else pasts)
    if not list(value.uses()):
        return None
    step = _pick(random, [-1, 1])
    _read_instead_(model, value, _rolled(value, 1 if value in masks else 2, step))
    return f"{value.name} by {step}", ""


def nan_row(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """NaN in one row of one output."""
    index, value = _float_output(model, random)
    if value is None:
        return None
    row = int(random.integers(3))  # the largest batch has more rows, the smallest one
    shape, dtype = [1] * len(value.shape), value.dtype.numpy()

    def change(value: ir.Value) -> list[ir.Node]:
        zero, one = _constant(np.array(0, np.int64)), _constant(np.array(1, np.int64))
        size = ir.node("Shape", [value], {"start": 0, "end": 1})
        squeezed = ir.node("Squeeze", [size.outputs[0]])
        rows = ir.node("Range", [zero.outputs[0], squeezed.outputs[0], one.outputs[0]])
        chosen, form = _constant(np.array(row, np.int64)), _whole(-1, *shape[1:])
        equal = ir.node("Equal", [rows.outputs[0], chosen.outputs[0]])
        shaped = ir.node("Reshape", [equal.outputs[0], form.outputs[0]])
        nan = _constant(np.array(np.nan, dtype))
        where = ir.node("Where", [shaped.outputs[0], nan.outputs[0], value])
        return [zero, one, size, squeezed, rows, chosen, form, equal, shaped, nan, where]

    told = f"row {row} of {value.name}"
    _put_before_output_(model, index, change)
    return told, ""


def quiet_row(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """One value × 1.01 in the row of an output that has the smallest norm."""
    index, value = _float_output(model, random)
    if value is None or not isinstance(value.shape[-1], int):
        return None
    column = int(random.integers(value.shape[-1]))
    factors = np.ones(value.shape[-1], value.dtype.numpy())
    factors[column] = 1.01

    def change(value: ir.Value) -> list[ir.Node]:
        last, scale = _whole(-1), _constant(factors)
        norms = ir.node("ReduceL2", [value, last.outputs[0]], {"keepdims": 1})
        least = ir.node("ReduceMin", [norms.outputs[0]], {"keepdims": 1})
        quiet = ir.node("Equal", [norms.outputs[0], least.outputs[0]])
        off = ir.node("Mul", [value, scale.outputs[0]])
        where = ir.node("Where", [quiet.outputs[0], off.outputs[0], value])
        return [last, scale, norms, least, quiet, off, where]

    told = f"column {column} of {value.name}"
    _put_before_output_(model, index, change)
    return told, ""


def _float_output(model: ir.Model, random: Random) -> tuple[int, Any]:
    floats = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
    found = [
        (index, value)
        for index, value in enumerate(model.graph.outputs)
        if value.dtype in floats and value.shape is not None and len(value.shape) > 1
    ]
    return _pick(random, found) or (-1, None)


ROW_KINDS: dict[str, Mutation] = {
    "input dropped": dropped_input,
    "ragged cache off by one": ragged_cache,
    "NaN in one row": nan_row,
    "value in a quiet row × 1.01": quiet_row,
}
