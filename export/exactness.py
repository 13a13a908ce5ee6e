"""On which processors the sums of a graph's int8 products are exact, and whether this one is such.

`compress.int8_range` says what processors without the instruction for it cut off.
"""

import functools

import numpy as np
import onnx_ir as ir

from compress.int8_range import PAIR

ALL = "all"
SOME = "vnni, amx, arm dot product"
# operator → which of its inputs is the second operand, (in, out) or a stack of those
_PRODUCTS = {
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "DynamicQuantizeMatMul": 1,
    "QLinearMatMul": 3,
}


def exact_on(model: ir.Model) -> str | None:
    """Return `ALL` or `SOME`, by the weights of the graph as it is; None without products of int8.

    Weights of 8 bits that the graph itself computes count as what is right on `SOME` only.
    """
    found: set[bool] = set()
    for node in model.graph.all_nodes():
        if node.op_type in _PRODUCTS:
            found.add(_always_fits(node.inputs[_PRODUCTS[node.op_type]]))
        elif node.op_type in ("MatMul", "Gemm") and (weight := _dequantized(node)) is not None:
            turned = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
            found.add(_always_fits(weight, turned))
    if not found:
        return None
    return ALL if all(found) else SOME


@functools.cache
def this_processor_is_exact() -> bool:
    """Return whether ONNX Runtime adds up products of int8 exactly here, as a small product shows."""
    import onnxruntime

    x = ir.Value(name="x", shape=ir.Shape([1, 64]), type=ir.TensorType(ir.DataType.UINT8))
    weight = ir.val("weight", const_value=ir.tensor(np.full((64, 16), 127, np.int8), name="weight"))
    node = ir.node("MatMulInteger", [x, weight])
    (total,) = node.outputs
    total.name, total.type = "total", ir.TensorType(ir.DataType.INT32)
    total.shape = ir.Shape([1, 16])
    graph = ir.Graph(
        [x], [total], nodes=[node], initializers=[weight], opset_imports={"": 21}, name="probe"
    )
    made = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = onnxruntime.InferenceSession(made, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.full((1, 64), 255, np.uint8)})
    return bool((found == 64 * 255 * 127).all())


def _dequantized(node: ir.Node) -> ir.Value | None:
    """Return the int8 weight behind a `DequantizeLinear` that runtimes fold into the product."""
    made = [value.producer() for value in node.inputs[:2] if value is not None]
    behind = [m.inputs[0] for m in made if m is not None and m.op_type == "DequantizeLinear"]
    return behind[1] if len(behind) == 2 else None


def _always_fits(weight: ir.Value | None, turned: bool = False) -> bool:
    stored = None if weight is None else weight.const_value
    if stored is None:
        return False
    values = stored.numpy()
    if values.dtype == np.uint8:
        return True  # these kernels multiply in 16 bits and add in 32
    values = values.T if turned else values
    values = values.astype(np.int32).reshape(-1, *values.shape[-2:])
    values = np.pad(values, ((0, 0), (0, values.shape[1] % 2), (0, 0)))
    pairs = values.reshape(len(values), -1, 2, values.shape[-1])
    return all((side.clip(min=0).sum(2) <= PAIR).all() for side in (pairs, -pairs))
