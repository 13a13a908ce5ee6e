"""Take the rounding of activations out of a quantized graph, so that its weights can be checked exactly.

The weights and scales stay the graph's own, so a change in one of them shows, where the rounding of
activations would have covered it. Steps that calibration fixed go with the rounding, and are looked
up among the source's instead (`export.weights`).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass

from compress.weight_only import dequantize_blocks


def linearized(model: Path, path: Path) -> Path:
    """Write the graph in `model` without its run-time rounding to `path`; return `path`."""
    graph = ir.load(model)
    linearize_(graph)
    RemoveUnusedNodesPass()(graph)
    NameFixPass()(graph)  # new values in a branch are named without regard to those outside
    ir.save(graph, path, external_data=f"{path.name}.data")
    return path


def linearize_(model: ir.Model) -> int:
    """Replace each product on quantized weights by a float one on the same weights; return how many."""
    count = 0
    for node in list(model.graph.all_nodes()):
        if node.op_type == "MatMulInteger":
            count += _integer_product_(node)
        elif node.op_type == "MatMulIntegerToFloat":
            count += _fixed_product_(node)
        elif node.op_type == "DequantizeLinear" and _producer(node, 0, "QuantizeLinear"):
            count += _there_and_back_(node)
        elif node.op_type == "MatMulNBits":
            count += _blockwise_product_(model, node)
        elif node.op_type == "DequantizeLinear" and "block_size" in node.attributes:
            count += _blockwise_weight_(model, node)
        elif node.op_type == "DequantizeLinear":
            _stored_weight_(node)
    return count


def _integer_product_(node: ir.Node) -> bool:
    """Make DynamicQuantizeLinear → MatMulInteger → Cast → Mul(·, x_scale × scale) a MatMul.

    Whatever uses another zero point or scale than the one computed is left as it is, rounding
    included, which the float rule does not let pass.
    """
    quantize = _producer(node, 0, "DynamicQuantizeLinear")
    cast = _only_user(node, "Cast")
    rescale = _only_user(cast, "Mul")
    if quantize is None or cast is None or rescale is None:
        return False
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    scales = next((v for v in rescale.inputs if v is not cast.outputs[0]), None)
    product = scales.producer() if scales is not None else None
    if zero_point is not quantize.outputs[2] or product is None or product.op_type != "Mul":
        return False
    if quantize.outputs[1] not in product.inputs:
        return False
    weight_scale = next((v for v in product.inputs if v is not quantize.outputs[1]), None)
    zero = node.inputs[3] if len(node.inputs) > 3 else None
    made = _float_product(quantize.inputs[0], node.inputs[1], weight_scale, zero)
    _replace_(node, made, rescale.outputs[0])
    return True


def _fixed_product_(node: ir.Node) -> bool:
    """Make QuantizeLinear → MatMulIntegerToFloat a MatMul, and an Add of its bias.

    The product must take its input back with the scale and zero point that it was rounded with.
    """
    _, weight, x_scale, scale, x_zero, zero, bias = (*node.inputs, *[None] * 7)[:7]
    quantize = _producer(node, 0, "QuantizeLinear")
    if quantize is None or not _same(quantize.inputs[1:3], [x_scale, x_zero]):
        return False
    made = _float_product(quantize.inputs[0], weight, scale, zero)
    if bias is not None:
        made.append(ir.node("Add", [made[-1].outputs[0], bias]))
    _replace_(node, made, node.outputs[0])
    return True


def _there_and_back_(node: ir.Node) -> bool:
    """QuantizeLinear → DequantizeLinear of the same scale and zero point: what went in."""
    quantize = _producer(node, 0, "QuantizeLinear")
    source = quantize.inputs[0] if quantize is not None else None
    if quantize is None or source is None or not _same(quantize.inputs[1:], node.inputs[1:]):
        return False
    ir.convenience.replace_all_uses_with(node.outputs[0], source, replace_graph_outputs=True)
    return True


def _stored_weight_(node: ir.Node) -> None:
    """DequantizeLinear of a stored tensor → (· − zero point) × scale, which are the same numbers.

    ONNX Runtime makes a product that rounds its inputs of what follows otherwise.
    """
    stored, scale, zero = (*node.inputs, None)[:3]
    turned = _producer(node, 0, "Transpose")  # a language model's last layer and its table are one
    source = turned.inputs[0] if turned is not None else stored
    tensor = ir.convenience.get_const_tensor(source) if source is not None else None
    axis = node.attributes.get_int("axis", 1)
    if tensor is not None and axis in (-1, len(tensor.shape) - 1):
        _replace_(node, _dequantized(stored, scale, zero), node.outputs[0])


def _same(some: Sequence[ir.Value | None], others: Sequence[ir.Value | None]) -> bool:
    """Whether two lists hold the same values, or stored ones of the same numbers."""
    return len(some) == len(others) and all(
        a is b or (_bytes(a) is not None and _bytes(a) == _bytes(b)) for a, b in zip(some, others)
    )


def _bytes(value: ir.Value | None) -> tuple[ir.DataType, bytes] | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return (tensor.dtype, tensor.tobytes()) if tensor is not None else None


def _float_product(
    x: ir.Value | None, weight: ir.Value | None, scale: ir.Value | None, zero: ir.Value | None
) -> list[ir.Node]:
    """Return the nodes of x @ ((weight − zero) × scale)."""
    made = _dequantized(weight, scale, zero)
    return [*made, ir.node("MatMul", [x, made[-1].outputs[0]])]


def _dequantized(
    stored: ir.Value | None, scale: ir.Value | None, zero: ir.Value | None
) -> list[ir.Node]:
    """Return the nodes of (stored − zero) × scale, along the last axis."""
    made = [_to_float(stored)]
    if zero is not None:
        shift = _to_float(zero)
        made += [shift, ir.node("Sub", [made[0].outputs[0], shift.outputs[0]])]
    return [*made, ir.node("Mul", [made[-1].outputs[0], scale])]


def _to_float(value: ir.Value | None) -> ir.Node:
    return ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT})


def _blockwise_product_(model: ir.Model, node: ir.Node) -> bool:
    """Make MatMulNBits a MatMul on what its blocks stand for, and an Add of its bias."""
    stored = [value.const_value if value is not None else None for value in node.inputs[1:4]]
    sizes = [node.attributes.get_int(name, 0) for name in ("bits", "block_size", "K")]
    if len(node.inputs) < 4 or any(tensor is None for tensor in stored):
        return False
    tensors = [torch.from_numpy(t.numpy().copy()) for t in stored if t is not None]
    outputs, blocks = node.attributes.get_int("N", 0), -(-sizes[2] // sizes[1])
    packed, scale, zeros = tensors[0], tensors[1], tensors[2].reshape(outputs, -1)
    matrix = dequantize_blocks(packed, scale.reshape(outputs, blocks), zeros, *sizes)
    weight = _float_weight(model, node, matrix.t().contiguous().numpy())
    made = [ir.node("MatMul", [node.inputs[0], weight])]
    if len(node.inputs) > 5 and node.inputs[5] is not None:
        made.append(ir.node("Add", [made[0].outputs[0], node.inputs[5]]))
    _replace_(node, made, node.outputs[0])
    return True


def _blockwise_weight_(model: ir.Model, node: ir.Node) -> bool:
    """DequantizeLinear → the weight: ONNX Runtime makes a rounding `MatMulNBits` of it otherwise."""
    stored = [value.const_value if value is not None else None for value in node.inputs]
    if len(stored) < 3 or any(tensor is None for tensor in stored):
        return False
    axis, size = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    values, scale, zeros = (t.numpy().astype(np.float32) for t in stored if t is not None)
    spread = [
        np.repeat(a, size, axis).take(range(values.shape[axis]), axis) for a in (scale, zeros)
    ]
    made = ((values - spread[1]) * spread[0]).astype(stored[1].numpy().dtype)  # type: ignore[union-attr]
    weight = _float_weight(model, node, made)
    ir.convenience.replace_all_uses_with(node.outputs[0], weight)
    return True


def _float_weight(model: ir.Model, node: ir.Node, array: np.ndarray) -> ir.Value:
    """Return a new initializer that holds `array` for `node`."""
    weight = ir.val(f"{node.outputs[0].name}.weight")
    weight.const_value = ir.tensor(array, name=weight.name)
    model.graph.initializers[str(weight.name)] = weight
    return weight


def _replace_(node: ir.Node, made: list[ir.Node], old: ir.Value) -> None:
    """Put `made` before `node`, and the last result in the place of `old`."""
    for item in made:
        item.metadata_props.update(node.metadata_props)
    graph = node.graph
    assert graph is not None
    graph.insert_before(node, made)
    new, name = made[-1].outputs[0], old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    old.name, new.name = f"{name}_rounded", name  # an output is asked for by its name


def _producer(node: ir.Node, index: int, kind: str) -> ir.Node | None:
    value = node.inputs[index]
    source = value.producer() if value is not None else None
    return source if source is not None and source.op_type == kind else None


def _only_user(node: ir.Node | None, kind: str) -> ir.Node | None:
    users = [use.node for use in node.outputs[0].uses()] if node is not None else []
    return users[0] if len(users) == 1 and users[0].op_type == kind else None
