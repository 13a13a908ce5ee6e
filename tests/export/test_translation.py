import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from compress.checkpoint import Checkpoint
from compress.int8 import DynamicInt8Linear, Int8Embedding, quantize_per_channel
from compress.packed_embedding import PackedEmbedding, block_size
from compress.signature import factory_signature
from compress.weight_only import WeightOnlyLinear
from export.graph import ExportConfig, build_graph
from tests.export.graphs import operators, run_graph


def graph_of_module(
    module: nn.Module, target: str = "cpu", opset: int = 23, **examples: torch.Tensor
) -> ir.Model:
    axes = {name: dict(enumerate(("batch", "sequence"))) for name in examples}
    signature = factory_signature(module, examples, axes)
    return build_graph(Checkpoint(module, "custom", signature), ExportConfig(target, opset))


@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_the_module(bias: bool) -> None:
    torch.manual_seed(0)
    module = DynamicInt8Linear(24, 17, bias)
    module.quantize_(torch.randn(17, 24))  # by default in a range that is exact on any processor
    if bias:
        module.bias = torch.randn(17)
    model = graph_of_module(module, x=torch.randn(2, 5, 24))
    found = operators(model)
    assert found["DynamicQuantizeLinear"] == found["MatMulInteger"] == 1
    assert found["MatMul"] == found["Gemm"] == 0
    for shape in ((1, 1, 24), (3, 40, 24)):
        for offset in (0.0, 3.0, -3.0):
            x = torch.randn(shape) + offset
            expected = module(x).numpy()
            actual = run_graph(model, {"x": x})["output"]
            # the integers are the same; only the scales' products may round differently
            np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-5)


def weight_only_linear(inputs: int, outputs: int, bias: bool, bits: int) -> WeightOnlyLinear:
    torch.manual_seed(0)
    module = WeightOnlyLinear(inputs, outputs, bias, bits, 32)
    module.quantize_(torch.randn(outputs, inputs))
    if bias:
        module.bias = torch.randn(outputs)
    return module


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_weight_only_linear_equals_the_module(target: str, bias: bool, bits: int) -> None:
    module = weight_only_linear(100, 17, bias, bits)
    model = graph_of_module(module, target, x=torch.randn(2, 5, 100))
    (node,) = (n for n in model.graph if n.op_type == "MatMulNBits")
    assert node.attributes.get_int("accuracy_level", 0) == (4 if target == "cpu" else 0)
    assert len(model.graph) == (2 if bias and target == "cuda" else 1)
    assert model.opset_imports["com.microsoft"] == 1
    for shape in ((1, 1, 100), (3, 40, 100)):
        x = torch.randn(shape)
        # the kernel for the GPU does not round activations
        exact = nn.functional.linear(x, module.dequantize(), module.bias)
        expected = module(x) if target == "cpu" else exact
        actual = run_graph(model, {"x": x})["output"]
        np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-5, atol=5e-5)


def test_embedding_equals_the_module() -> None:
    torch.manual_seed(0)
    module = Int8Embedding(11, 16)
    module.weight, module.scale = quantize_per_channel(torch.randn(11, 16), axis=0)
    model = graph_of_module(module, ids=torch.arange(6).reshape(2, 3))
    ids = torch.randint(0, 11, (4, 9))
    assert np.array_equal(run_graph(model, {"ids": ids})["output"], module(ids).numpy())
    tables = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.INT8]
    assert [tuple(v.const_value.shape) for v in tables if v.const_value] == [(11, 16)]


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize("width", [48, 256])  # three blocks, whose zero points end within a byte
def test_packed_embedding_equals_the_module(width: int, target: str) -> None:
    torch.manual_seed(0)
    size = block_size(width, 128)
    assert size is not None
    module = PackedEmbedding(11, width, None, size)
    module.quantize_(torch.randn(11, width) + 0.3)
    model = graph_of_module(module, target, ids=torch.arange(6).reshape(2, 3))
    assert (operators(model)["GatherBlockQuantized"] == 1) == (target == "cpu")
    ids = torch.randint(0, 11, (4, 9))
    assert np.array_equal(run_graph(model, {"ids": ids})["output"], module(ids).numpy())
