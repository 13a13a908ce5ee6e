"""Take the run-time rounding out of an int8 graph, so that its weights can be checked exactly."""

import onnx_ir as ir


def linearize_(model: ir.Model) -> int:
    """Replace each dynamically quantized product by a float one on the same weights; return how many.

    DynamicQuantizeLinear → MatMulInteger → Cast → Mul(·, x_scale × scale) becomes
    MatMul(x, Cast(weight) × scale). The weights and scales are the graph's own, so a change in one
    of them shows, where rounding of activations would have covered it.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type != "MatMulInteger":
            continue
        quantize = _producer(node, 0, "DynamicQuantizeLinear")
        cast = _only_user(node, "Cast")
        rescale = _only_user(cast, "Mul")
        if quantize is None or cast is None or rescale is None:
            continue
        scales = next((v for v in rescale.inputs if v is not cast.outputs[0]), None)
        product = scales.producer() if scales is not None else None
        if product is None or product.op_type != "Mul":
            continue
        weight_scale = next((v for v in product.inputs if v is not quantize.outputs[1]), None)
        to_float = ir.node("Cast", [node.inputs[1]], attributes={"to": ir.DataType.FLOAT})
        weight = ir.node("Mul", [to_float.outputs[0], weight_scale])
        plain = ir.node("MatMul", [quantize.inputs[0], weight.outputs[0]])
        model.graph.insert_before(node, [to_float, weight, plain])
        old, new = rescale.outputs[0], plain.outputs[0]
        name = old.name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        old.name, new.name = f"{name}_rounded", name  # an output is asked for by its name
        count += 1
    return count


def _producer(node: ir.Node, index: int, kind: str) -> ir.Node | None:
    value = node.inputs[index]
    source = value.producer() if value is not None else None
    return source if source is not None and source.op_type == kind else None


def _only_user(node: ir.Node | None, kind: str) -> ir.Node | None:
    users = [use.node for use in node.outputs[0].uses()] if node is not None else []
    return users[0] if len(users) == 1 and users[0].op_type == kind else None
