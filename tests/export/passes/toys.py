"""Small graphs in ONNX's own notation, to try one pass on."""

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import parser, shape_inference

from export.passes.nodes import dims
from tests.export.graphs import run_graph

SIZES = {"B": 3, "S": 5, "T": 7}  # of the axes with a name


def toy(signature: str, constants: str, body: str, opset: int = 23) -> ir.Model:
    """Return a graph from its inputs => outputs, its initializers and its nodes."""
    domains = f'"" : {opset}, "com.microsoft" : 1'
    text = f"<ir_version: 10, opset_import: [{domains}]> g {signature} <{constants}> {{ {body} }}"
    model = shape_inference.infer_shapes(parser.parse_model(text), data_prop=True)
    onnx.checker.check_model(model)
    made = ir.from_proto(model)
    for node in made.graph:
        node.metadata_props["scope"] = "a.module"
    return made


def feed(model: ir.Model, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random inputs for `model`."""
    random = torch.Generator().manual_seed(seed)
    made = {}
    for value in model.graph.inputs:
        sizes = dims(value) or ()
        shape = [size if isinstance(size, int) else SIZES[str(size.value)] for size in sizes]
        if value.dtype == ir.DataType.BOOL:
            made[str(value.name)] = torch.rand(shape, generator=random) < 0.7
        else:
            made[str(value.name)] = torch.randn(shape, generator=random)
    return made


def outputs(model: ir.Model) -> dict[str, np.ndarray]:
    """Return what `model` makes of random inputs."""
    return run_graph(model, feed(model))


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Compare outputs up to rounding."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=2e-6)


def scopes(model: ir.Model) -> set[str]:
    """Return the provenance of all nodes: one, where a pass has kept it."""
    return {node.metadata_props.get("scope", "") for node in model.graph}
