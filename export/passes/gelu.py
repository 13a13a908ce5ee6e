"""Write GELU, however a model spells it, as the operator it is."""

import math

import onnx_ir as ir

from export.passes.nodes import insert, known, producer, remove_unused_, replace, scalar

_OPSET = 20
_Product = tuple[float, int, list[ir.Value]]  # number × xⁿ × other values


def gelu_(model: ir.Model) -> int:
    """Replace what computes GELU's exact or tanh form by `Gelu`; return how many.

    GPT-2 and Phi write the tanh form out, as eight operators on the widest values of the model. From
    opset 20, which has the operator.
    """
    if model.opset_imports.get("", 0) < _OPSET:
        return 0
    count = 0
    for node in list(model.graph):
        for x in _candidates(node):
            if (form := _form(node, x)) is not None:
                output = node.outputs[0]
                replace(output, insert(node, "Gelu", [x], {"approximate": form}, like=output))
                count += 1
                break
    remove_unused_(model)
    return count


def quick_gelu_(model: ir.Model) -> int:
    """Replace x × sigmoid(1.702 x), CLIP's activation, by `QuickGelu`; return how many."""
    count = 0
    for node in list(model.graph):
        x = next((x for x in _candidates(node) if _is_quick(node, x)), None)
        if x is None:
            continue
        made = insert(
            node, "QuickGelu", [x], {"alpha": 1.702}, like=node.outputs[0], domain="com.microsoft"
        )
        replace(node.outputs[0], made)
        count += 1
    remove_unused_(model)
    if count:
        model.opset_imports["com.microsoft"] = 1
    return count


def _candidates(node: ir.Node) -> list[ir.Value]:
    """Return the values that `node` multiplies, through up to three products."""
    found: list[ir.Value] = []
    level = [node]
    for _ in range(3):
        level = [n for n in level if n.op_type in ("Mul", "Div") and not n.domain]
        inputs = [v for n in level for v in n.inputs if v is not None and known(v) is None]
        found += inputs
        level = [source for v in inputs if (source := v.producer()) is not None]
    return list(dict.fromkeys(found))


def _form(node: ir.Node, x: ir.Value) -> str | None:
    """Return which form of GELU of x `node` gives: x/2 × (1 + erf(x/√2)) or its tanh approximation."""
    if node.op_type != "Mul":
        return None
    number, power, others = _product(node.outputs[0], x)
    if power != 1 or len(others) != 1 or not math.isclose(number, 0.5, rel_tol=1e-5):
        return None
    inner = _plus(others[0], 1.0)
    curve = producer(inner, "Erf", "Tanh")
    if curve is None or curve.inputs[0] is None:
        return None
    number, power, others = _product(curve.inputs[0], x)
    if curve.op_type == "Erf":
        return "none" if _is((number, power), math.sqrt(0.5), 1) and not others else None
    if len(others) != 1 or not math.isclose(number, math.sqrt(2 / math.pi), rel_tol=1e-5):
        return None
    # x + 0.044715 x³, or x times 1 + 0.044715 x²
    rest = _plus(others[0], 1.0) if power == 1 else _plus(others[0], x)
    if rest is None or power not in (0, 1):
        return None
    number, inner_power, others = _product(rest, x)
    return "tanh" if _is((number, inner_power), 0.044715, 3 - power) and not others else None


def _is_quick(node: ir.Node, x: ir.Value) -> bool:
    if node.op_type != "Mul" or node.domain:
        return False
    number, power, others = _product(node.outputs[0], x)
    if (number, power) != (1.0, 1) or len(others) != 1:
        return False
    curve = producer(others[0], "Sigmoid")
    if curve is None or curve.inputs[0] is None:
        return False
    number, power, rest = _product(curve.inputs[0], x)
    return _is((number, power), 1.702, 1) and not rest


def _is(found: tuple[float, int], number: float, power: int) -> bool:
    return math.isclose(found[0], number, rel_tol=1e-5) and found[1] == power


def _plus(value: ir.Value, term: ir.Value | float) -> ir.Value | None:
    """Return y where `value` is y + `term`."""
    node = producer(value, "Add")
    if node is None:
        return None
    left, right = node.inputs
    for one, other in ((left, right), (right, left)):
        if one is term or (isinstance(term, float) and scalar(one) == term):
            return other
    return None


def _product(value: ir.Value | None, x: ir.Value, depth: int = 5) -> _Product:
    """Return `value` as number × x to a power × what else it is a product of."""
    if value is x:
        return 1.0, 1, []
    if (number := scalar(value)) is not None:
        return number, 0, []
    node = producer(value, "Mul", "Div", "Pow")
    if value is None or node is None or depth == 0:
        return 1.0, 0, [value] if value is not None else []
    left = _product(node.inputs[0], x, depth - 1)
    right = _product(node.inputs[1], x, depth - 1)
    if node.op_type == "Mul":
        return left[0] * right[0], left[1] + right[1], left[2] + right[2]
    number, constant = right[0], right[1:] == (0, [])
    if node.op_type == "Div" and constant and number:
        return left[0] / number, left[1], left[2]
    if node.op_type == "Pow" and constant and number in (2.0, 3.0):
        return left[0] ** number, left[1] * int(number), left[2] * int(number)
    return 1.0, 0, [value]
