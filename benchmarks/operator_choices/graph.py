"""Tiny graphs, written node by node."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

# metadata, as JSON: outputs to compare, and inputs with the outputs that live in their buffers
COMPARED, SHARED = "onnxpress.compared", "onnxpress.shared"
_OPSET, _IR = 23, 11
FLOAT = onnx.TensorProto.FLOAT


@dataclass(frozen=True, eq=False)
class Fed:
    """An input of the graph; a letter an axis, of which those in `Graph.DYNAMIC` have any size."""

    axes: str
    array: np.ndarray


Operand = str | Fed | np.ndarray | None  # a node's output, an input, a weight, nothing
Build = Callable[["Graph", Any], Any]  # → the output, or several, that all alternatives share


class Graph:
    """Nodes being added one by one. What is handed to `op` becomes an input or a weight by its type."""

    DYNAMIC = "BSPT"  # batch, sequence, past, total

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: dict[str, Fed] = {}
        self.weights: dict[str, np.ndarray] = {}
        self.outputs: list[str] = []
        self.compared: list[str] = []
        self.shared: dict[str, str] = {}
        self._names: dict[int, str] = {}

    def op(self, kind: str, *operands: Operand, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node, of another domain as in `com.microsoft.Gelu`; return its output or outputs."""
        domain, _, op_type = kind.rpartition(".")
        made = [f"{op_type}_{len(self.nodes)}.{i}" for i in range(outputs)]
        inputs = [self._name(operand) for operand in operands]
        name = f"{op_type}_{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(op_type, inputs, made, name=name, domain=domain, **attributes)
        )
        return made[0] if outputs == 1 else made

    def keep(self, *values: str) -> None:
        """Make the values outputs that are not compared: a cache."""
        self.outputs += values

    def share(self, past: Fed, present: str) -> None:
        """Let an output live in the buffer of an input."""
        self.shared[self._name(past)] = present

    def model(self) -> onnx.ModelProto:
        """Return the finished graph."""
        inputs = []
        for name, fed in self.inputs.items():
            kind = helper.np_dtype_to_tensor_dtype(fed.array.dtype)
            sizes = zip(fed.axes, fed.array.shape, strict=True)
            shape = [axis if axis in self.DYNAMIC else size for axis, size in sizes]
            inputs.append(helper.make_tensor_value_info(name, kind, shape))
        graph = helper.make_graph(
            self.nodes,
            "alternative",
            inputs,
            [helper.make_tensor_value_info(n, FLOAT, None) for n in self.compared + self.outputs],
            [numpy_helper.from_array(array, name) for name, array in self.weights.items()],
        )
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR)
        notes = {COMPARED: self.compared, SHARED: self.shared}
        helper.set_model_props(model, {name: json.dumps(note) for name, note in notes.items()})
        return model

    def _name(self, operand: Operand) -> str:
        if operand is None or isinstance(operand, str):
            return operand or ""
        if id(operand) not in self._names:
            if isinstance(operand, Fed):
                name = f"x{len(self.inputs)}"
                self.inputs[name] = operand
            else:
                name = f"w{len(self.weights)}"
                self.weights[name] = operand
            self._names[id(operand)] = name  # not given to another: what is stored lives on
        return self._names[id(operand)]


def normal(random: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    """Return float32 values with this standard deviation."""
    return (random.standard_normal(shape) * scale).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    """Return an int64 vector: a shape, or axes."""
    return np.array(values, np.int64)


def scalar(value: float) -> np.ndarray:
    """Return a float32 constant."""
    return np.array(value, np.float32)


def split(g: Graph, value: Operand, heads: int, width: int) -> str:
    """Add (batch, sequence, heads × width) → (batch, heads, sequence, width)."""
    apart = g.op("Reshape", value, ints(0, 0, heads, width))
    return str(g.op("Transpose", apart, perm=[0, 2, 1, 3]))


def join(g: Graph, value: Operand) -> str:
    """Add (batch, heads, sequence, width) → (batch, sequence, heads × width)."""
    swapped = g.op("Transpose", value, perm=[0, 2, 1, 3])
    return str(g.op("Reshape", swapped, ints(0, 0, -1)))
