"""Whether the numbers stored in a graph are the source's, bit by bit, as far as that can be told.

No set of cases visits every row of a table, and half precision and int8 hide a small change in their
own noise. Graphs may store a weight transposed, or several side by side, or fold a factor into one;
so rows and columns are looked up among the source's, wherever they stand. A weight of which nearly
all is the source's must be the source's as a whole; one of which little is was computed anew, and
the outputs have to speak for it. A normalisation's epsilon is compared as well: between the customary
ones lies less than the rounding of float32, until an input comes that is nearly constant. So are the
steps that calibration fixed: a little more or less of them is lost in the noise that they make.
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from compress.checkpoint import weights_of
from compress.static_int8 import StaticInt8Linear
from export.graph import MODULE
from export.passes.nodes import known

_MOST = 0.9
_EPSILONS = ("eps", "variance_epsilon", "epsilon")


def changed_weights(module: nn.Module, model: ir.Model) -> Iterator[tuple[str, float]]:
    """Yield the name of each weight that is the source's, and the share of it that is not."""
    known: set[int] = set()
    vectors: dict[int, list[np.ndarray]] = {}
    for tensor in weights_of(module).values():
        array = _bits(tensor)
        if _is_vector(array):
            vectors.setdefault(array.size, []).append(array.ravel())
        elif array.ndim > 1:
            for matrix in _orientations(array):
                known.update(_digests(matrix))
    for value in model.graph.initializers.values():
        if value.const_value is None or value.dtype in (ir.DataType.INT64, ir.DataType.BOOL):
            continue  # shape arithmetic
        if value.dtype == ir.DataType.INT8 and not value.const_value.numpy().any():
            continue  # zero points
        array = _bits_of(value.const_value.numpy())
        if _is_vector(array):
            shares = [_vector_share(array.ravel(), vectors)]
        elif array.ndim > 1:
            shares = [_share(_digests(matrix), known) for matrix in _orientations(array)]
        else:
            continue
        if max(shares) >= _MOST:
            yield str(value.name), 0.0 if 1.0 in shares else 1 - max(shares)


def changed_epsilons(module: nn.Module, model: ir.Model) -> Iterator[tuple[str, bool]]:
    """Yield the name of each normalisation that stands for a module, and whether its epsilon differs."""
    modules = dict(module.named_modules())
    for node in model.graph.all_nodes():
        source = modules.get(node.metadata_props.get(MODULE, ""))
        own = next((getattr(source, n) for n in _EPSILONS if hasattr(source, n)), None)
        if "epsilon" in node.attributes and isinstance(own, float):
            found = node.attributes["epsilon"].as_float()
            yield f"epsilon of {node.name}", np.float32(found) != np.float32(own)


def changed_ranges(module: nn.Module, model: ir.Model) -> Iterator[tuple[str, bool]]:
    """Yield the name of each rounding of a static model's inputs, and whether its steps differ.

    Steps that are found at run time do, since they depend on what else is in the batch.
    """
    modules = dict(module.named_modules())
    if not any(isinstance(source, StaticInt8Linear) for source in modules.values()):
        return
    for node in model.graph.all_nodes():
        if node.op_type not in ("QuantizeLinear", "DynamicQuantizeLinear"):
            continue
        source = modules.get(node.metadata_props.get(MODULE, ""))
        scale, zero = (known(value) for value in (*node.inputs, None, None)[1:3])
        same = (
            isinstance(source, StaticInt8Linear)
            and scale is not None
            and zero is not None
            and scale.tobytes() == source.input_scale.numpy().tobytes()
            and _signed(zero) == _signed(source.input_zero_point.numpy())
        )
        yield f"steps of {node.name}", not same


def _signed(zero_point: np.ndarray) -> list[int]:
    """Return a zero point as one of int8: graphs may shift both its type and its value."""
    shift = 128 * (zero_point.dtype == np.uint8)
    return [int(number) - shift for number in zero_point.ravel()]


def _bits(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)  # NumPy has no bfloat16
    return _bits_of(tensor.numpy())


def _bits_of(array: np.ndarray) -> np.ndarray:
    """Return the array as whole numbers, so that NaN equals NaN and 0 does not equal −0."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def _is_vector(array: np.ndarray) -> bool:
    return array.ndim > 0 and array.size > 1 and array.size == max(array.shape)


def _orientations(array: np.ndarray) -> list[np.ndarray]:
    """Return the rows and, of a matrix, the columns."""
    rows = array.reshape(array.shape[0], -1)
    return [rows, rows.T] if array.ndim == 2 else [rows]


def _digests(matrix: np.ndarray) -> list[int]:
    """Return a hash for each row that is not one number repeated, as empty rows are anywhere."""
    return [hash(row.tobytes()) for row in matrix if (row != row[0]).any()]


def _share(digests: list[int], known: set[int]) -> float:
    return sum(digest in known for digest in digests) / len(digests) if digests else 0.0


def _vector_share(array: np.ndarray, vectors: dict[int, list[np.ndarray]]) -> float:
    """Return how much of `array` some source vector has, or several of one size in a row."""
    best = 0.0
    for size, sources in vectors.items():
        if array.size % size:
            continue
        pieces = array.reshape(-1, size)
        same = [max(float(np.mean(piece == source)) for source in sources) for piece in pieces]
        best = max(best, float(np.mean(same)))
    return best
