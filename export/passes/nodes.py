"""What the passes share: reading a graph's values and writing nodes into it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

Dimension = int | ir.SymbolicDim


def insert(
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    like: ir.Value | None = None,
    shape: Sequence[Dimension] | None = None,
    domain: str = "",
) -> ir.Value:
    """Insert a node before another one, with its provenance; return the new node's output.

    The output has the type and shape of `like`, or the type of `like` and `shape`.
    """
    node = ir.node(op_type, inputs, attributes or {}, domain=domain)
    node.metadata_props.update(before.metadata_props)
    graph_of(before).insert_before(before, node)
    value = node.outputs[0]
    if like is not None:
        value.type = like.type
        value.shape = like.shape
    if shape is not None:
        value.shape = ir.Shape(shape)
    return value


def constant(before: ir.Node, value: Any, dtype: Any = np.int64) -> ir.Value:
    """Insert a constant before `before`; return it."""
    tensor = ir.tensor(np.asarray(value, dtype))
    node = ir.node("Constant", [], {"value": tensor})
    node.metadata_props.update(before.metadata_props)
    graph_of(before).insert_before(before, node)
    made = node.outputs[0]
    made.type, made.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.numpy().shape)
    made.const_value = tensor
    return made


def size(before: ir.Node, value: ir.Value, axis: int) -> ir.Value:
    """Insert what gives the size of one axis, as a vector of one number; return it.

    It asks an input of the graph that has that size, if there is one: all layers then ask the same.
    """
    sizes = dims(value)
    wanted = sizes[axis] if sizes is not None else None
    if isinstance(wanted, int):
        return constant(before, [wanted])
    source, axis = value, axis % (rank(value) or 1)
    for item in graph_of(before).inputs:
        own = dims(item) or ()
        if wanted is not None and wanted in own:
            source, axis = item, own.index(wanted)
            break
    return insert(before, "Shape", [source], {"start": axis, "end": axis + 1})


def graph_of(node: ir.Node) -> ir.Graph:
    """Return the graph that holds `node`."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    return graph


def initializer_like(value: ir.Value, array: np.ndarray, suffix: str) -> ir.Value:
    """Add an initializer named after `value` to its graph; return it."""
    graph = value.graph
    assert isinstance(graph, ir.Graph)
    name = f"{value.name}{suffix}"
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        made = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        graph.register_initializer(made)
    return graph.initializers[name]


def producer(value: ir.Value | None, *kinds: str) -> ir.Node | None:
    """Return the node of ai.onnx that computes `value`, if it is one of `kinds`."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in kinds and not node.domain else None


def only_user(value: ir.Value, *kinds: str) -> ir.Node | None:
    """Return the one node that uses `value`, if it is one of `kinds` and nothing else needs it."""
    users = [use.node for use in value.uses()]
    if len(users) != 1 or value.is_graph_output():
        return None
    return users[0] if users[0].op_type in kinds and not users[0].domain else None


def known(value: ir.Value | None) -> np.ndarray | None:
    """Return the numbers of a constant or an initializer."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return tensor.numpy() if tensor is not None else None


def scalar(value: ir.Value | None) -> float | None:
    """Return the number that a constant holds, where it holds one."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None or tensor.size != 1 or tensor.dtype == ir.DataType.STRING:
        return None
    return float(tensor.numpy().item())


def dims(value: ir.Value | None) -> tuple[Dimension, ...] | None:
    """Return the sizes of a value's axes, None where its rank or one of them is unknown.

    A size that is only known at run time is a symbol; equal symbols are equal sizes.
    """
    if value is None or value.shape is None:
        return None
    sizes = tuple(value.shape)
    unknown = any(isinstance(size, ir.SymbolicDim) and size.value is None for size in sizes)
    return None if unknown else sizes


def rank(value: ir.Value | None) -> int | None:
    """Return how many axes a value has, where that is known."""
    return len(value.shape) if value is not None and value.shape is not None else None


def integers(node: ir.Node, name: str) -> list[int] | None:
    """Return an attribute that is a list of integers."""
    attribute = node.attributes.get(name)
    return list(attribute.as_ints()) if attribute is not None else None


def last_axis(node: ir.Node, default: int = -1) -> bool:
    """Whether `node` works along the last axis of its first input."""
    axis, axes = node.attributes.get_int("axis", default), rank(node.inputs[0])
    return axis == -1 or (axes is not None and axis == axes - 1)


def remove_unused_(model: ir.Model) -> None:
    """Remove the nodes and initializers that nothing needs any more."""
    common.RemoveUnusedNodesPass()(model)


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let `new` stand wherever `old` did, also as an output of the graph, under its name."""
    if old.is_graph_output():
        name = old.name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        old.name, new.name = f"{name}_unused", name
    else:
        ir.convenience.replace_all_uses_with(old, new)
