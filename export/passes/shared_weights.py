"""Store a weight once, however often and whichever way round it is used."""

import numpy as np
import onnx_ir as ir

from export.passes.nodes import insert, known

_PROBE = 64  # numbers that are compared before all are


def shared_weights_(model: ir.Model) -> int:
    """Merge equal initializers, and replace transposed copies by a `Transpose`; return how many went.

    A language model's last layer is its table of embeddings turned: PyTorch ties the two, the
    exporter writes both. ONNX Runtime turns the one that is kept when it opens the file.
    """
    graph = model.graph
    kept: dict[object, list[ir.Value]] = {}
    count = 0
    tables = {n.inputs[0] for n in graph if n.op_type == "Gather"}
    weights = [v for v in graph.initializers.values() if v.const_value is not None and v.uses()]
    for value in sorted(weights, key=lambda v: v not in tables):  # a table stays as it is
        array = known(value)
        if array is None or array.size < 2 or value.is_graph_output() or value.is_graph_input():
            continue
        same = kept.setdefault((array.shape, array.dtype), [])
        turned = kept.get((array.shape[::-1], array.dtype), []) if array.ndim == 2 else []
        if (found := _equal(array, same)) is not None:
            ir.convenience.replace_all_uses_with(value, found)
        elif (found := _equal(array.T, [v for v in turned if v in tables])) is not None:
            before = next(node for node in graph if value in node.inputs)
            like = insert(before, "Transpose", [found], {"perm": [1, 0]}, like=value)
            ir.convenience.replace_all_uses_with(value, like)
        else:
            same.append(value)
            continue
        del graph.initializers[str(value.name)]
        count += 1
    return count


def _equal(array: np.ndarray, others: list[ir.Value]) -> ir.Value | None:
    """Return the initializer among `others`, all of one shape and type, that holds `array`."""
    for value in others:
        other = known(value)
        assert other is not None
        ends = (array[:1].ravel()[:_PROBE], other[:1].ravel()[:_PROBE])
        if np.array_equal(*ends) and np.array_equal(array, other):
            return value
    return None
