"""Caches in every precision, on graphs of casts: the CPU provider computes nothing in bfloat16."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from calib_data.errors import ModelError
from export.decoding import IN_PLACE, CachedDecoding
from tests.export.graphs import cast, save

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
KINDS = [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16]


def decoder(kind: ir.DataType, in_place: bool, folder: Path) -> Path:
    """Write a decoder whose cache and logits are the tokens: both tell what was taken so far.

    In place, the present is the past with its first position counted up: it shows that the buffer
    was kept.
    """
    ids = ir.val("input_ids", INT64, ["batch", "sequence"])
    mask = ir.val("attention_mask", INT64, ["batch", "total_sequence"])
    past = ir.val("past_key_values.0.key", kind, ["batch", 1, "past_sequence", 1])
    present = ir.val("present.0.key", kind, ["batch", 1, "total_sequence", 1])
    logits = ir.val("logits", kind, ["batch", "sequence", "vocabulary"])
    axes = ir.tensor(np.array([1, 3]), name="axes")
    constant = ir.node("Constant", [], {"value": ir.AttrTensor("value", axes)})
    wide_ids, wide_past = cast(ids, FLOAT), cast(past, FLOAT)
    new = ir.node("Unsqueeze", [wide_ids.outputs[0], constant.outputs[0]])
    if in_place:
        one = ir.node("Constant", [], {"value_float": 1.0})
        joined = ir.node("Add", [wide_past.outputs[0], one.outputs[0]])
        nodes = [one, joined]
    else:
        joined = ir.node("Concat", [wide_past.outputs[0], new.outputs[0]], {"axis": 2})
        nodes = [new, joined]
    told = ir.node("Squeeze", [joined.outputs[0], constant.outputs[0]])
    row = ir.node("Unsqueeze", [told.outputs[0], _axis(1, nodes)])
    nodes = [constant, wide_ids, wide_past, *nodes, told, row]
    nodes += [cast(joined.outputs[0], kind, present), cast(row.outputs[0], kind, logits)]
    graph = ir.Graph([ids, mask, past], [logits, present], nodes=nodes, opset_imports={"": 23})
    model = ir.Model(graph, ir_version=10)
    if in_place:
        model.metadata_props[IN_PLACE] = "1"
    return save(model, folder)


def _axis(axis: int, nodes: list[ir.Node]) -> ir.Value:
    nodes.insert(0, ir.node("Constant", [], {"value_ints": [axis]}))
    return nodes[0].outputs[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_growing_cache_is_handed_on(kind: ir.DataType, tmp_path: Path) -> None:
    decoding = CachedDecoding(decoder(kind, False, tmp_path))
    first = decoding.start(np.array([[5, 6], [7, 8]]), np.ones((2, 2), np.int64), room=2)
    assert first.dtype == np.float32
    assert first.tolist() == [[5, 6], [7, 8]]
    assert decoding.step(np.array([1, 2])).tolist() == [[5, 6, 1], [7, 8, 2]]
    assert decoding.step(np.array([3, 4])).tolist() == [[5, 6, 1, 3], [7, 8, 2, 4]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_buffer_starts_with_zeros_and_is_kept(kind: ir.DataType, tmp_path: Path) -> None:
    decoding = CachedDecoding(decoder(kind, True, tmp_path))
    assert decoding.start(np.array([[5]]), np.ones((1, 1), np.int64), room=2).tolist() == [[1] * 3]
    assert decoding.step(np.array([6])).tolist() == [[2] * 3]


def test_a_cache_of_whole_numbers_is_one_line(tmp_path: Path) -> None:
    decoding = CachedDecoding(decoder(INT64, False, tmp_path))
    with pytest.raises(ModelError, match=r"past_key_values.0.key is tensor\(int64\)") as caught:
        decoding.start(np.array([[5]]), np.ones((1, 1), np.int64), room=1)
    assert "\n" not in str(caught.value)
