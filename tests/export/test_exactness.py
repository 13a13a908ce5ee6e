"""Where sums of int8 are exact: what the graph says, and what the processor shows."""

from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from compress.int8_range import fits_in_pairs
from compress.quantize import quantize
from compress.quantize_config import QuantizeConfig
from export import exactness
from export.bundle import open_bundle, write_bundle
from export.exactness import ALL, SOME, exact_on
from export.graph import ExportConfig, build_graph
from onnxpress.processor import warn_where_inexact
from tests.export.test_translation import graph_of_module
from tests.tiny import tiny_checkpoint


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize(("kept", "expected"), [("exact", ALL), ("reduced", ALL), ("full", SOME)])
def test_a_bundle_says_where_it_is_exact(
    kept: str,
    expected: str,
    target: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = quantize(tiny_checkpoint("bert"), QuantizeConfig(weight_range=kept)).checkpoint
    config = ExportConfig(target)
    (tmp_path / "out").mkdir()
    write_bundle(
        [("model", made, build_graph(made, config))], made, config.to_json(), tmp_path / "out"
    )
    assert open_bundle(tmp_path / "out").exact_on == expected
    for here in (True, False):
        monkeypatch.setattr(exactness, "this_processor_is_exact", lambda here=here: here)
        for path in (tmp_path / "out", tmp_path / "out" / "model.onnx"):
            warn_where_inexact(path)
            told = capsys.readouterr().err
            assert ("--weight-range exact" in told) == (expected == SOME and not here)
            assert told.count("\n") <= 1


def test_a_float_graph_has_no_such_sums() -> None:
    model = graph_of_module(torch.nn.Linear(8, 4), input=torch.randn(2, 5, 8))
    assert exact_on(model) is None


def test_one_pair_beyond_the_bound_is_seen() -> None:
    from compress.int8 import DynamicInt8Linear

    module = DynamicInt8Linear(24, 17, bias=False)
    module.weight[6:8, 16] = 64
    assert fits_in_pairs(module.weight)
    assert exact_on(graph_of_module(module, x=torch.randn(2, 5, 24))) == ALL
    module.weight[7, 16] = 65
    assert exact_on(graph_of_module(module, x=torch.randn(2, 5, 24))) == SOME


@pytest.mark.parametrize("activations", ["uint8", "int8"])
@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_static_products_are_seen(target: str, activations: str) -> None:
    from compress.static_int8 import StaticInt8Linear

    module = StaticInt8Linear(24, 17, True, activations)
    module.weight[7:9] = 127  # two inputs that are no pair
    assert exact_on(graph_of_module(module, target, x=torch.randn(2, 5, 24))) == ALL
    module.weight[6:8] = 127
    assert exact_on(graph_of_module(module, target, x=torch.randn(2, 5, 24))) == SOME


def test_weights_that_are_computed_are_not_known() -> None:
    x, weight = (
        ir.val(name, dtype=kind, shape=[4, 4])
        for name, kind in (("x", ir.DataType.UINT8), ("w", ir.DataType.INT8))
    )
    node = ir.node("MatMulInteger", [x, weight])
    graph = ir.Graph([x, weight], node.outputs, nodes=[node], opset_imports={"": 21})
    assert exact_on(ir.Model(graph, ir_version=10)) == SOME


def test_the_processor_is_asked_by_a_product() -> None:
    """Where ONNX Runtime adds a full pair wrongly is what the answer must be."""
    from compress.int8 import DynamicInt8Linear
    from tests.export.graphs import run_graph

    module = DynamicInt8Linear(32, 16, bias=False)
    module.weight[:] = 127
    x = torch.ones(1, 1, 32)
    found = run_graph(graph_of_module(module, x=torch.randn(2, 5, 32)), {"x": x})["output"]
    right = bool((abs(found - 32 * 127.0) < 1).all())
    assert exactness.this_processor_is_exact() == right
