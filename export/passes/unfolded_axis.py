"""Keep two axes apart that a model folds into one around operators that do not mind."""

import math
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from export.passes.nodes import (
    Dimension,
    constant,
    dims,
    initializer_like,
    insert,
    integers,
    known,
    last_axis,
    rank,
    remove_unused_,
)

_ELEMENTWISE = (
    *("Abs", "Add", "Cast", "Clip", "Div", "DynamicQuantizeLinear", "Erf", "Exp", "Gelu"),
    *("Identity", "Mul", "Neg", "Not", "Pow", "Relu", "Sigmoid", "Sqrt", "Sub", "Sum", "Tanh"),
    "Where",
)
_ALONG_THE_LAST = ("GatherElements", "LayerNormalization", "RMSNormalization", "Softmax")


@dataclass
class _Region:
    """What computes on the folded axis, from the reshapes that fold it to those that unfold it."""

    axes: tuple[Dimension, Dimension]  # the two
    folded: set[ir.Value] = field(default_factory=set)
    nodes: set[ir.Node] = field(default_factory=set)
    entries: set[ir.Node] = field(default_factory=set)
    exits: set[ir.Node] = field(default_factory=set)
    repeats: set[ir.Node] = field(default_factory=set)  # Tile and Expand


def unfolded_axis_(model: ir.Model) -> int:
    """Remove Reshape (a, b, …) → (a × b, …) and back around matrix products; return how many regions.

    GPT-2 folds batch and sequence for its projections, DeBERTa batch and heads for its scores. Both
    make the target of the reshape back depend on run-time sizes, and the latter hides attention.
    """
    count = 0
    seen: set[ir.Node] = set()
    for node in list(model.graph):
        axes = _entry_axes(node)
        if axes is None or node in seen:
            continue
        region = _grow(node, _Region(axes))
        if region is None or not region.exits or not region.nodes:
            continue
        seen |= region.entries
        _unfold_(region, list(model.graph))
        count += 1
    remove_unused_(model)
    return count


def _entry_axes(node: ir.Node) -> tuple[Dimension, Dimension] | None:
    """Return (a, b) of a Reshape (a, b, …) → (a × b, …), which may join what follows too."""
    if node.op_type != "Reshape" or node.domain:
        return None
    before, after = dims(node.inputs[0]), dims(node.outputs[0])
    if before is None or after is None or len(before) < 3 or len(after) < 2:
        return None
    rest = [sizes for sizes in (before[2:], after[1:]) if all(isinstance(s, int) for s in sizes)]
    alike = len(rest) == 2 and math.prod(rest[0]) == math.prod(rest[1])
    return (before[0], before[1]) if alike or before[2:] == after[1:] else None


def _grow(start: ir.Node, region: _Region) -> _Region | None:
    """Return the whole region that `start` leads into, None where something in it cannot unfold."""
    region.entries.add(start)
    waiting = [start.outputs[0]]
    while waiting:
        value = waiting.pop()
        if value in region.folded:
            continue
        if value.is_graph_output() or value.is_graph_input() or known(value) is not None:
            return None
        region.folded.add(value)
        source = value.producer()
        if source is None:
            return None
        if source not in region.entries | region.nodes | region.repeats:
            if _entry_axes(source) == region.axes:
                region.entries.add(source)
            elif _repeats(source, region.axes):
                region.repeats.add(source)
            else:
                found = _works(source, value)
                if found is None:
                    return None
                region.nodes.add(source)
                waiting += found
        for use in value.uses():
            if use.node in region.exits | region.nodes:
                continue
            if use.idx == 0 and _is_exit(use.node, region.axes):
                region.exits.add(use.node)
                continue
            found = _works(use.node, value)
            if found is None:
                return None
            region.nodes.add(use.node)
            waiting += found
    return region


def _is_exit(node: ir.Node, axes: tuple[Dimension, Dimension]) -> bool:
    after = dims(node.outputs[0])
    return node.op_type == "Reshape" and after is not None and after[:2] == axes


def _repeats(node: ir.Node, axes: tuple[Dimension, Dimension]) -> bool:
    """Whether `node` repeats a constant (b, …) for every a, or (1, …) for every a and b."""
    before, after = dims(node.inputs[0]), dims(node.outputs[0])
    if node.op_type not in ("Tile", "Expand") or before is None or after is None:
        return False
    if len(before) != len(after) or before[1:] != after[1:] or not isinstance(axes[1], int):
        return False
    if node.op_type == "Tile":
        return before[0] == axes[1] and known(node.inputs[0]) is not None
    return before[0] == 1


def _works(node: ir.Node, folded: ir.Value) -> list[ir.Value] | None:
    """Return the other folded values of `node`, where it works alike on each row of the folded axis."""
    axes, size = rank(folded), dims(folded)
    kind = node.op_type
    if node.domain or axes is None or size is None:
        return None
    if kind == "Transpose":
        order = integers(node, "perm")
        if order is None or order[0] != 0:
            return None
    elif kind in _ALONG_THE_LAST:
        if axes < 2 or not last_axis(node, 0 if kind == "GatherElements" else -1):
            return None
    elif kind == "Gemm":
        plain = (node.attributes.get_float(name, 1.0) == 1 for name in ("alpha", "beta"))
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if axes != 2 or not all(plain) or node.attributes.get_int("transA", 0) != 0:
            return None
        if folded is not node.inputs[0] and folded is not node.outputs[0]:
            return None
        if known(node.inputs[1]) is None or (bias is not None and rank(bias) != 1):
            return None
    elif kind in ("MatMul", "MatMulInteger"):
        ranks = [rank(value) for value in node.inputs[:2]]
        weight = axes == 2 and ranks[1] == 2 and known(node.inputs[1]) is not None
        if not weight and not (axes == 3 and ranks == [3, 3]):
            return None
    elif kind not in _ELEMENTWISE:
        return None
    others = []
    for value in [*node.inputs, *node.outputs]:
        sizes = dims(value)
        if value is None or value is folded:
            continue
        if sizes is None:
            return None
        if len(sizes) == axes and not (kind == "Gemm" and value is node.inputs[1]):
            if known(value) is not None and axes == 2 and kind in ("MatMul", "MatMulInteger"):
                continue  # a weight
            if sizes[0] != size[0]:
                return None
            others.append(value)
        elif len(sizes) > axes:
            return None
    return others


def _unfold_(region: _Region, order: list[ir.Node]) -> None:
    """Give every folded value of the region its two axes."""
    for node in [*region.entries, *region.repeats]:
        apart: ir.Value | None = node.inputs[
            0
        ]  # operators broadcast over the first axis themselves
        if node.op_type == "Expand":
            apart = _apart(node, region.axes)
        elif node.op_type == "Reshape" and (sizes := dims(node.outputs[0])) is not None:
            shape = (*region.axes, *sizes[1:])
            if shape != dims(apart):
                target = constant(node, [0, 0, *sizes[1:]])
                apart = insert(node, "Reshape", [apart, target], like=node.outputs[0], shape=shape)
        uses = [use for use in node.outputs[0].uses() if use.node in region.nodes | region.exits]
        for use in uses:
            use.node.replace_input_with(use.idx, apart)
    for node in (n for n in order if n in region.nodes):
        axes = next(len(dims(v) or ()) for v in node.outputs if v in region.folded)
        # a constant that is the same for every row of the first axis does without it
        same = not any(rank(value) == axes + 1 for value in node.inputs)
        if node.op_type == "Transpose" and not same:
            moved = [0, *(axis + 1 for axis in integers(node, "perm") or ())]
            node.attributes["perm"] = ir.AttrInt64s("perm", moved)
        elif node.op_type in _ALONG_THE_LAST:
            node.attributes["axis"] = ir.AttrInt64("axis", -1)
        for value in node.outputs:
            if value in region.folded and value.shape is not None:
                front = region.axes[1:] if same else region.axes
                value.shape = ir.Shape([*front, *value.shape[1:]])
        if node.op_type == "Gemm":
            _as_matmul_(node)
        elif node.op_type == "Transpose" and (source := node.inputs[0]) is not None:
            array = known(source)
            if array is None:
                continue
            turned = array.transpose(integers(node, "perm"))
            made = initializer_like(source, turned, ".transposed")
            ir.convenience.replace_all_uses_with(node.outputs[0], made)
    for node in region.exits:
        result, output = node.inputs[0], node.outputs[0]
        if result is not None and dims(result) == dims(output) and not output.is_graph_output():
            ir.convenience.replace_all_uses_with(output, result)


def _apart(node: ir.Node, axes: tuple[Dimension, Dimension]) -> ir.Value:
    """Return what Expand gives with its two axes apart; the same for all layers, and so made once."""
    value = node.outputs[0]
    following = next(use.node for use in value.uses())
    front = constant(following, [-1, axes[1]])
    behind = insert(following, "Shape", [value], {"start": 1})
    target = insert(following, "Concat", [front, behind], {"axis": 0})
    shape = [*axes, *(dims(value) or ())[1:]]
    return insert(following, "Reshape", [value, target], like=value, shape=shape)


def _as_matmul_(node: ir.Node) -> None:
    """Replace Gemm, which takes two axes only, by MatMul and Add."""
    value, weight = node.inputs[:2]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    output = node.outputs[0]
    array = known(weight)
    assert weight is not None
    assert array is not None
    if node.attributes.get_int("transB", 0):
        weight = initializer_like(weight, np.ascontiguousarray(array.T), ".T")
    product = insert(node, "MatMul", [value, weight], like=output)
    if bias is not None:
        product = insert(node, "Add", [product, bias], like=output)
    ir.convenience.replace_all_uses_with(output, product)
