from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from calib_data.errors import ConfigError
from tests.export.graphs import operators, optimized_operators, run_graph, save
from tests.export.test_translation import graph_of_module, weight_only_linear


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("inputs", "bias"), [(64, True), (100, False)])
def test_block_weights_are_standard_onnx(
    bits: int, inputs: int, bias: bool, tmp_path: Path
) -> None:
    module = weight_only_linear(inputs, 33, bias, bits)
    model = graph_of_module(module, "portable", x=torch.randn(2, 5, inputs))
    assert {node.domain for node in model.graph} == {""}
    assert operators(model)["DequantizeLinear"] == operators(model)["MatMul"] == 1
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    x = torch.randn(3, 7, inputs)
    expected = nn.functional.linear(x, module.dequantize(), module.bias).numpy()
    np.testing.assert_allclose(run_graph(model, {"x": x})["output"], expected, rtol=1e-5, atol=5e-5)
    # ONNX Runtime makes its own operator of the two, with rounding: then as the module computes
    path = save(model, tmp_path)
    assert optimized_operators(path, tmp_path)["MatMulNBits"] == 1
    found = run_graph(model, {"x": x}, optimize=True)["output"]
    np.testing.assert_allclose(found, module(x).numpy(), rtol=1e-5, atol=5e-5)


def test_four_bits_stay_four_bits_in_the_file(tmp_path: Path) -> None:
    sizes = [
        save(
            graph_of_module(
                weight_only_linear(256, 256, False, bits), "portable", x=torch.ones(2, 2, 256)
            ),
            tmp_path,
        )
        .stat()
        .st_size
        for bits in (4, 8)
    ]
    assert sizes[1] - sizes[0] == pytest.approx(256 * 256 / 2, rel=0.05)


def test_older_opsets_are_refused() -> None:
    module = weight_only_linear(64, 8, False, 4)
    with pytest.raises(ConfigError, match="--opset 21 or more, got 20"):
        graph_of_module(module, "portable", 20, x=torch.ones(2, 2, 64))
    cpu = graph_of_module(module, "cpu", 20, x=torch.ones(2, 2, 64))
    assert operators(cpu)["MatMulNBits"] == 1
