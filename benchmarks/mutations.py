"""Kinds of damage to a graph: each changes one thing in place and tells where, or returns None."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from export.graph import MODULE

Random = np.random.Generator
Mutation = Callable[[ir.Model, Random], "tuple[str, str] | None"]  # (site, module)
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def _pick(random: Random, items: list[Any]) -> Any:
    return items[int(random.integers(len(items)))] if items else None


def _at(node: ir.Node, what: str) -> tuple[str, str]:
    return f"{what} of {node.op_type} {node.name}", node.metadata_props.get(MODULE, "")


def _constants(model: ir.Model, kinds: tuple[ir.DataType, ...]) -> list[tuple[ir.Value, ir.Node]]:
    """Return the stored tensors of those dtypes with their first reader."""
    found = []
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value.const_value is not None and value.dtype in kinds:
                found.append((value, node))
            elif value is not None and (made := value.producer()) and made.op_type == "Constant":
                tensor = made.attributes["value"].value if "value" in made.attributes else None
                if tensor is not None and tensor.dtype in kinds:
                    found.append((value, node))
    return list({value: (value, node) for value, node in reversed(found)}.values())


def _array(value: ir.Value) -> np.ndarray:
    made = value.producer()
    tensor: Any = value.const_value if made is None else made.attributes["value"].value
    return np.asarray(tensor.numpy())


def _set(value: ir.Value, array: np.ndarray) -> None:
    tensor = ir.tensor(np.ascontiguousarray(array), name=value.name)
    made = value.producer()
    if made is None:
        value.const_value = tensor
    else:
        made.attributes["value"] = ir.AttrTensor("value", tensor)


def _weights(model: ir.Model, rank: tuple[int, ...] = (1, 2, 3, 4)) -> list[Any]:
    found = _constants(model, _FLOATS)
    return [(v, n) for v, n in found if _array(v).ndim in rank and _array(v).size > 4]


def weight_element(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """One number of a weight × 1.01."""
    chosen = _pick(random, _weights(model))
    if chosen is None:
        return None
    value, node = chosen
    array = _array(value).copy()
    index = _pick(random, [tuple(i) for i in np.argwhere(array != 0)])
    array[index] *= 1.01
    _set(value, array)
    return _at(node, f"{value.name}{[int(i) for i in index]}")


def weight_row(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """One row of a weight × 1.01."""
    chosen = _pick(random, _weights(model, (2,)))
    if chosen is None:
        return None
    value, node = chosen
    array = _array(value).copy()
    row = int(random.integers(len(array)))
    array[row] *= 1.01
    _set(value, array)
    return _at(node, f"{value.name}[{row}]")


def weight_tensor(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """A whole weight × 1.01."""
    chosen = _pick(random, _weights(model))
    if chosen is None:
        return None
    value, node = chosen
    _set(value, _array(value) * np.array(1.01, _array(value).dtype))
    return _at(node, str(value.name))


def bias_dropped(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """A bias set to zero."""
    found = [
        (v, n)
        for v, n in _weights(model, (1,))
        if n.op_type in ("Add", "Sum", "Gemm", "LayerNormalization", "Conv") and n.inputs[-1] is v
    ]
    chosen = _pick(random, found)
    if chosen is None:
        return None
    _set(chosen[0], np.zeros_like(_array(chosen[0])))
    return _at(chosen[1], str(chosen[0].name))


def scalar_constant(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """A float constant that is no weight × 1.01."""
    found = [(v, n) for v, n in _constants(model, _FLOATS) if 0 < _array(v).size <= 4]
    chosen = _pick(
        random, [(v, n) for v, n in found if np.isfinite(_array(v)).all() and _array(v).any()]
    )
    if chosen is None:
        return None
    value, node = chosen
    _set(value, (_array(value) * 1.01).astype(_array(value).dtype))
    return _at(node, f"{value.name} = {_array(value).ravel()[0]:.4g}")


def off_by_one(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """A whole number of a slice, split, range, index or comparison ± 1."""
    kinds = ("Slice", "Split", "Range", "Gather", "Add", "Sub", "Cast", "Mul", "Concat", "Reshape")
    found = [(v, n) for v, n in _constants(model, (ir.DataType.INT64,)) if n.op_type in kinds]
    chosen = _pick(random, found)
    if chosen is None:
        return None
    value, node = chosen
    array = _array(value).copy().reshape(-1)
    index = int(random.integers(len(array)))
    array[index] += _pick(random, [-1, 1])
    _set(value, array.reshape(_array(value).shape))
    return _at(node, f"{value.name}[{index}]")


_ORDERED = (
    "Sub", "Div", "Pow", "MatMul", "Concat", "Where", "Less", "LessOrEqual", "Greater",
    "GreaterOrEqual", "Attention", "GroupQueryAttention", "MultiHeadAttention", "Range", "Gather",
)  # fmt: skip


def swapped_inputs(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """Two inputs of an operator that does not commute, swapped."""
    pairs = []
    for node in model.graph:
        if node.op_type not in _ORDERED:
            continue
        first = 1 if node.op_type == "Where" else 0
        last = 3 if "Attention" in node.op_type or node.op_type == "Where" else 2
        chosen = list(enumerate(node.inputs))[first:last]
        pairs += [
            (node, i, j)
            for i, a in chosen
            for j, b in chosen
            if i < j and a is not None and b is not None and a is not b
        ]
    pair = _pick(random, pairs)
    if pair is None:
        return None
    node, i, j = pair
    a, b = node.inputs[i], node.inputs[j]
    node.replace_input_with(i, b)
    node.replace_input_with(j, a)
    return _at(node, f"inputs {i} and {j}")


def changed_axis(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """Another axis, or two entries of a permutation swapped."""
    found = [
        (node, name)
        for node in model.graph
        for name in ("axis", "perm", "axes")
        if name in node.attributes
    ]
    chosen = _pick(random, found)
    if chosen is None:
        return None
    node, name = chosen
    if name == "axis":
        old = node.attributes[name].as_int()
        node.attributes[name] = ir.AttrInt64(
            name, _pick(random, [a for a in range(-2, 3) if a != old])
        )
    else:
        order = list(node.attributes[name].as_ints())
        i, j = (int(i) for i in random.permutation(max(len(order), 2))[:2])
        if len(order) < 2:
            order[0] += 1
        else:
            order[i], order[j] = order[j], order[i]
        node.attributes[name] = ir.AttrInt64s(name, order)
    return _at(node, name)


_MASK_INPUT = {"Attention": 3, "GroupQueryAttention": 10, "MultiHeadAttention": 5}


def dropped_mask(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """Attention without its mask."""
    found = [
        node
        for node in model.graph
        if len(node.inputs) > _MASK_INPUT.get(node.op_type, 99)
        and node.inputs[_MASK_INPUT[node.op_type]] is not None
    ]
    node = _pick(random, found)
    if node is None:
        return None
    node.replace_input_with(_MASK_INPUT[node.op_type], None)
    return _at(node, "the mask")


def changed_mask(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """A comparison or a logical operator of the mask replaced by its neighbour."""
    others = {"LessOrEqual": "Less", "Less": "LessOrEqual", "GreaterOrEqual": "Greater",
              "Greater": "GreaterOrEqual", "And": "Or", "Or": "And"}  # fmt: skip
    node = _pick(random, [n for n in model.graph if n.op_type in others])
    return None if node is None else _renamed(node, others[node.op_type])


def changed_activation(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """An activation replaced by a similar one."""
    others = {"Erf": "Tanh", "Tanh": "Erf", "Sigmoid": "HardSigmoid", "Relu": "Softplus",
              "Swish": "Mish", "QuickGelu": "Gelu"}  # fmt: skip
    node = _pick(random, [n for n in model.graph if n.op_type in others])
    return None if node is None else _renamed(node, others[node.op_type])


def _renamed(node: ir.Node, kind: str) -> tuple[str, str]:
    told = _at(node, f"{kind} instead")
    node.op_type = kind
    return told


def gelu_approximation(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """The other of the two formulas for Gelu."""
    node = _pick(random, [n for n in model.graph if n.op_type == "Gelu" and not n.domain])
    if node is None:
        return None
    old = node.attributes.get_string("approximate", "none")
    new = "none" if old == "tanh" else "tanh"
    node.attributes["approximate"] = ir.AttrString("approximate", new)
    return _at(node, f"{new} instead")


def altered_epsilon(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """Another usual epsilon in a normalisation."""
    node = _pick(random, [n for n in model.graph if "epsilon" in n.attributes])
    if node is None:
        return None
    old = node.attributes["epsilon"].as_float()
    new = _pick(random, [e for e in (1e-12, 1e-6, 1e-5, 1e-3) if not np.isclose(e, old)])
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", new)
    return _at(node, f"{new} for {old:.0e}")


def attention_scale(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """Attention scores scaled otherwise."""
    node = _pick(random, [n for n in model.graph if n.op_type in _MASK_INPUT])
    if node is None:
        return None
    old = node.attributes.get_float("scale", 0.0) or 8**-0.5  # heads of 8
    factor = _pick(random, [1.01, 2**0.5, 8**-0.5, 0.99])
    node.attributes["scale"] = ir.AttrFloat32("scale", old * factor)
    return _at(node, f"scale × {factor:.3g}")


def dropped_residual(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """One of two summed activations left out."""
    found = [
        n
        for n in model.graph
        if n.op_type in ("Add", "Sum")
        and len(n.inputs) == 2
        and n.inputs[0] is not n.inputs[1]
        and all(v is not None and v.const_value is None and v.dtype in _FLOATS for v in n.inputs)
    ]
    node = _pick(random, found)
    if node is None:
        return None
    kept = int(random.integers(2))
    node.replace_input_with(1 - kept, None)
    node.op_type = "Identity"
    source = node.inputs[kept]
    node.resize_inputs(1)
    node.replace_input_with(0, source)
    return _at(node, f"input {1 - kept}")


def changed_rotation(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """A rotary embedding interleaved, or with sine and cosine swapped."""
    node = _pick(random, [n for n in model.graph if n.op_type in ("RotaryEmbedding", "Cos", "Sin")])
    if node is None:
        return None
    if node.op_type != "RotaryEmbedding":
        return _renamed(node, {"Cos": "Sin", "Sin": "Cos"}[node.op_type])
    if random.integers(2):
        first = 1 if not node.domain else 2
        a, b = node.inputs[first : first + 2]
        node.replace_input_with(first, b)
        node.replace_input_with(first + 1, a)
        return _at(node, "sine and cosine")
    old = node.attributes.get_int("interleaved", 0)
    node.attributes["interleaved"] = ir.AttrInt64("interleaved", 1 - old)
    return _at(node, "interleaved")


def shifted_positions(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """Positions counted from one instead of zero, for one reader."""
    value = next((v for v in model.graph.inputs if v.name == "position_ids"), None)
    use = _pick(random, list(value.uses())) if value is not None else None
    if use is None:
        return None
    one = ir.node("Constant", [], {"value": ir.tensor(np.array(1, np.int64))})
    shifted = ir.node("Add", [value, one.outputs[0]])
    shifted.metadata_props.update(use.node.metadata_props)
    model.graph.insert_before(use.node, [one, shifted])
    use.node.replace_input_with(use.idx, shifted.outputs[0])
    return _at(use.node, "positions + 1")


def half_precision(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """One value rounded to half precision and back."""
    found = [
        n
        for n in model.graph
        if n.outputs[0].dtype == ir.DataType.FLOAT and n.op_type != "Constant"
    ]
    node = _pick(random, found)
    if node is None or node.outputs[0].is_graph_output():
        return None
    value = node.outputs[0]
    uses = list(value.uses())
    low = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT16)})
    back = ir.node("Cast", [low.outputs[0]], {"to": int(ir.DataType.FLOAT)})
    for made in (low, back):
        made.metadata_props.update(node.metadata_props)
    model.graph.insert_after(node, [low, back])
    for use in uses:
        use.node.replace_input_with(use.idx, back.outputs[0])
    return _at(node, "half precision")


def int8_step(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """One int8 weight moved by one step."""
    chosen = _pick(random, _constants(model, (ir.DataType.INT8,)))
    if chosen is None:
        return None
    value, node = chosen
    array = _array(value).copy()
    index = tuple(int(random.integers(size)) for size in array.shape)
    array[index] += 1 if array[index] < 0 else -1
    _set(value, array)
    return _at(node, f"{value.name}{list(index)}")


def zero_point(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """The zero point of an integer product left out, or one of the weights made up."""
    node = _pick(random, [n for n in model.graph if n.op_type == "MatMulInteger"])
    if node is None:
        return None
    if random.integers(2):
        node.resize_inputs(2)
        return _at(node, "no zero point")
    one = ir.node("Constant", [], {"value": ir.tensor(np.array(1, np.int8))})
    model.graph.insert_before(node, one)
    node.resize_inputs(4)
    node.replace_input_with(3, one.outputs[0])
    return _at(node, "a zero point of the weights")


def fixed_scale(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """The scale of a rounding in fixed steps × 1.01, wherever it is used."""
    return _fixed_steps(model, random, 1)


def fixed_zero_point(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """The zero point of a rounding in fixed steps off by one, wherever it is used."""
    return _fixed_steps(model, random, 2)


def _fixed_steps(model: ir.Model, random: Random, index: int) -> tuple[str, str] | None:
    node = _pick(random, [n for n in model.graph if n.op_type == "QuantizeLinear"])
    if node is None:
        return None
    old = node.inputs[index]
    array = _array(old)
    changed = array * np.float32(1.01) if index == 1 else array + array.dtype.type(1)
    made = ir.node("Constant", [], {"value": ir.tensor(np.asarray(changed, array.dtype))})
    model.graph.insert_before(node, made)
    for user in (node, *(use.node for use in node.outputs[0].uses())):
        for place, value in enumerate(user.inputs):
            if value is old:
                user.replace_input_with(place, made.outputs[0])
    return _at(node, "the scale" if index == 1 else "the zero point")


KINDS: dict[str, Mutation] = {
    "weight, one number × 1.01": weight_element,
    "weight, one row × 1.01": weight_row,
    "weight, all of it × 1.01": weight_tensor,
    "bias dropped": bias_dropped,
    "constant × 1.01": scalar_constant,
    "whole number off by one": off_by_one,
    "inputs swapped": swapped_inputs,
    "axis or permutation": changed_axis,
    "mask dropped": dropped_mask,
    "comparison in the mask": changed_mask,
    "activation": changed_activation,
    "Gelu approximation": gelu_approximation,
    "epsilon": altered_epsilon,
    "attention scale": attention_scale,
    "residual dropped": dropped_residual,
    "rotary embedding": changed_rotation,
    "positions + 1": shifted_positions,
    "rounded to half precision": half_precision,
    "int8 weight, one step": int8_step,
    "zero point": zero_point,
    "fixed scale × 1.01": fixed_scale,
    "fixed zero point": fixed_zero_point,
}
