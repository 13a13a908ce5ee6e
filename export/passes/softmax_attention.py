"""Recognise attention that a model spells out, and write it as the one operator."""

import math
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from export.passes.nodes import (
    Dimension,
    constant,
    dims,
    insert,
    integers,
    last_axis,
    only_user,
    producer,
    rank,
    remove_unused_,
    replace,
    scalar,
    size,
)

_MASKED = -1e4  # what a model adds to a score, or puts in its place, to mask it: this or less
_OPSET = 23


@dataclass
class _Scores:
    """softmax(scale × query · keyᵀ + the sum of `biases`)."""

    query: ir.Value
    key: ir.Value  # (…, total, width)
    scale: float
    biases: list[ir.Value] = field(default_factory=list)
    finite: bool = True  # as far as the graph tells


def softmax_attention_(model: ir.Model) -> int:
    """Replace MatMul → scale → add biases, mask → Softmax → MatMul by `Attention`; return how often.

    Positional biases and masks become the operator's additive mask. Models with 3-D queries, keys and
    values have one head. From opset 23, which has the operator.
    """
    if model.opset_imports.get("", 0) < _OPSET:
        return 0
    count = 0
    for node in list(model.graph):
        if node.op_type != "Softmax" or node.domain or not last_axis(node):
            continue
        scores = _scores(node.inputs[0])
        product = _product(node, scores) if scores is not None else None
        if product is not None and scores is not None:
            count += _fuse_(product, scores)
    remove_unused_(model)
    return count


def _product(softmax: ir.Node, scores: _Scores) -> ir.Node | None:
    """Return the MatMul of the probabilities and the values, past a guard against NaN.

    Where scores can be infinite, the guard makes zeros of a row that is masked whole; that stays.
    """
    value: ir.Value = softmax.outputs[0]
    users = {use.node for use in value.uses()}
    guard = next((node for node in users if node.op_type == "Where"), None)
    test = next((node for node in users if node.op_type == "IsNaN"), None)
    if guard is not None and test is not None and users == {guard, test}:
        guards = guard.inputs[0] is test.outputs[0] and scalar(guard.inputs[1]) == 0
        if not guards or not scores.finite:
            return None
        value = guard.outputs[0]
    product = only_user(value, "MatMul")
    return product if product is not None and product.inputs[0] is value else None


def _scores(value: ir.Value | None) -> _Scores | None:
    """Return what the scores `value` are made of, None where they are nothing of the kind."""
    node = producer(value, "MatMul", "Mul", "Div", "Add", "Where")
    if node is None or value is None or len(value.uses()) != 1 or value.is_graph_output():
        return None
    if node.op_type == "MatMul":
        return _scaled_product(node)
    if node.op_type in ("Mul", "Div"):
        inner, factor = _unscaled(value)
        found = _scores(inner) if inner is not value else None
        if found is None or found.biases:
            return None
        found.scale *= factor
        return found
    if node.op_type == "Add":
        for inner, bias in (node.inputs, reversed(node.inputs)):
            found = _scores(inner)
            if found is not None and bias is not None and dims(bias) is not None:
                found.biases.append(bias)
                found.finite = False
                return found
        return None
    return _masked(node)


def _masked(where: ir.Node) -> _Scores | None:
    """Return scores that a constant takes the place of, where a condition masks them."""
    for index in (1, 2):
        least = scalar(where.inputs[index])
        found = _scores(where.inputs[3 - index]) if least is not None else None
        if found is None or least is None or least > _MASKED or dims(where.inputs[0]) is None:
            continue
        zero, masked = (constant(where, x, np.float32) for x in (0.0, least))
        sides = (masked, zero) if index == 1 else (zero, masked)
        bias = insert(where, "Where", [where.inputs[0], *sides], shape=dims(where.inputs[0]))
        bias.type = ir.TensorType(ir.DataType.FLOAT)
        found.biases.append(bias)
        found.finite = found.finite and math.isfinite(least)
        return found
    return None


def _scaled_product(node: ir.Node) -> _Scores | None:
    """Return query and key of MatMul(query, keyᵀ), with the factors that either is scaled by."""
    query, first = _unscaled(node.inputs[0])
    turned, second = _unscaled(node.inputs[1])
    axes = rank(query)
    if query is None or turned is None or axes not in (3, 4) or rank(turned) != axes:
        return None
    order = list(range(axes))
    source = producer(turned, "Transpose")
    if source is not None and source.inputs[0] is not None:
        turned, order = source.inputs[0], integers(source, "perm") or order[::-1]
    order[-2:] = order[:-3:-1]
    if order == sorted(order):
        return _Scores(query, turned, first * second)
    sizes = dims(turned)
    shape = [sizes[axis] for axis in order] if sizes is not None else None
    key = insert(node, "Transpose", [turned], {"perm": order}, like=turned, shape=shape)
    return _Scores(query, key, first * second)


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """Return (x, factor) where `value` is x times or divided by a number, else (value, 1)."""
    node = producer(value, "Mul", "Div")
    if node is None:
        return value, 1.0
    left, right = node.inputs
    if (number := scalar(right)) is not None:
        return left, number if node.op_type == "Mul" else 1 / number
    if node.op_type == "Mul" and (number := scalar(left)) is not None:
        return right, number
    return value, 1.0


def _fuse_(product: ir.Node, scores: _Scores) -> bool:
    """Put `Attention` in the place of `product`; return whether the shapes allow it."""
    value, output = product.inputs[1], product.outputs[0]
    query, key, values = (dims(v) for v in (scores.query, scores.key, value))
    if query is None or key is None or values is None or not len(query) == len(key) == len(values):
        return False
    if not query[:-2] == key[:-2] == values[:-2] or key[-2] != values[-2]:
        return False
    attributes = {"scale": scores.scale}
    if len(query) == 3:
        attributes |= {"q_num_heads": 1, "kv_num_heads": 1}
    inputs = [scores.query, scores.key, value]
    if scores.biases:
        inputs.append(_mask(product, scores, (*query[:-1], key[-2])))
    replace(output, insert(product, "Attention", inputs, attributes, like=output))
    return True


def _mask(product: ir.Node, scores: _Scores, shape: tuple[Dimension, ...]) -> ir.Value:
    """Return the sum of what is added to scores of the given shape: (…, sequence, total), 4-D."""
    total = scores.biases[0]
    for bias in scores.biases[1:]:
        total = insert(product, "Add", [total, bias], like=total, shape=_broadcast(total, bias))
    sizes = list(dims(total) or ())
    if tuple(sizes[-2:]) != shape[-2:]:  # the operator broadcasts over batch and heads only
        both = [size(product, value, -2) for value in (scores.query, scores.key)]
        target = insert(product, "Concat", both, {"axis": 0})
        sizes = [*sizes[:-2], *shape[-2:]]
        total = insert(product, "Expand", [total, target], like=total, shape=sizes)
    missing = [1] if len(sizes) == len(shape) == 3 else list(range(4 - len(sizes)))
    if not missing:
        return total
    for axis in missing:
        sizes.insert(axis, 1)
    axes = constant(product, missing)
    return insert(product, "Unsqueeze", [total, axes], like=total, shape=sizes)


def _broadcast(one: ir.Value, other: ir.Value) -> list[Dimension]:
    sizes = [dims(value) or () for value in (one, other)]
    longest = max(map(len, sizes))
    padded = [(1,) * (longest - len(own)) + own for own in sizes]
    return [b if a == 1 else a for a, b in zip(*padded)]
