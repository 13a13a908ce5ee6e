from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from compress.checkpoint import Checkpoint
from export.graph import ExportConfig, build_graph
from export.passes.shared_weights import shared_weights_
from tests.export.graphs import operators, save
from tests.export.passes.toys import assert_same, outputs, scopes, toy
from tests.tiny import tiny_checkpoint

TABLE = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)


def numbers(array: np.ndarray) -> str:
    return ", ".join(str(x) for x in array.ravel().tolist())


def tied(second: np.ndarray) -> ir.Model:
    return toy(
        "(float[B,S,6] x) => (float[B,S,8] y, float[2,6] z)",
        f"float[8,6] table = {{{numbers(TABLE)}}}, float[6,8] other = {{{numbers(second)}}},"
        " int64[2] ids = {3, 1}",
        "z = Gather(table, ids) y = MatMul(x, other)",
    )


def test_transposed_copy_of_a_table_goes_away() -> None:
    model = tied(TABLE.T)
    before = outputs(model)
    assert shared_weights_(model) == 1
    assert shared_weights_(model) == 0
    assert operators(model)["Transpose"] == 1
    assert set(model.graph.initializers) == {"table", "ids"}
    assert_same(outputs(model), before)
    assert scopes(model) == {"a.module"}


def test_other_weights_stay() -> None:
    other = TABLE.T.copy()
    other[5, 7] += 1e-6
    assert shared_weights_(tied(other)) == 0


def test_equal_weights_are_stored_once() -> None:
    model = toy(
        "(float[B,S,6] x) => (float[B,S,8] y)",
        f"float[6,8] a = {{{numbers(TABLE)}}}, float[6,8] b = {{{numbers(TABLE)}}},"
        f" float[8,6] shape = {{{numbers(TABLE)}}}, float[6,6] c = {{{numbers(TABLE[:6])}}}",
        "h = MatMul(x, c) i = MatMul(h, a) j = MatMul(i, shape) k = MatMul(j, b) y = Add(i, k)",
    )
    before = outputs(model)
    assert shared_weights_(model) == 1
    assert set(model.graph.initializers) == {"a", "shape", "c"}
    assert_same(outputs(model), before)


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("gpt2", "text-generation"),
        pytest.param("bart", "feature-extraction", marks=pytest.mark.slow),
        pytest.param("t5", "feature-extraction", marks=pytest.mark.slow),
        pytest.param("bert", "fill-mask", marks=pytest.mark.slow),
    ],
)
def test_a_file_holds_each_weight_once(family: str, task: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(family, task, vocab_size=4000)  # the table outweighs the nodes
    size = save(build_graph(checkpoint, ExportConfig()), tmp_path).stat().st_size
    assert size < 1.3 * weight_bytes(checkpoint)


def weight_bytes(checkpoint: Checkpoint) -> int:
    return sum(p.numel() * p.element_size() for p in checkpoint.module.parameters())
