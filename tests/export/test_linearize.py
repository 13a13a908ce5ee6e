import numpy as np
import onnx_ir as ir
import pytest

from compress.quantize import dequantized, quantize
from compress.quantize_config import QuantizeConfig
from export.graph import MODULE, ExportConfig, build_graph
from export.linearize import linearize_
from tests.export.graphs import checkpoint_of, graph_of, operators, run_graph


@pytest.mark.parametrize(
    ("name", "target"),
    [("bert", "cpu"), ("bert", "portable"), ("gpt2", "cpu"), ("llama", "cpu"), ("vit", "cpu")],
)
def test_linearized_graph_equals_the_dequantized_model(name: str, target: str) -> None:
    checkpoint, model = checkpoint_of(name, int8=True), graph_of(name, True, target)
    products = operators(model)["MatMulInteger"]
    assert linearize_(model) == products > 0
    sample = checkpoint.signature.sample(3, 9, ragged=True)
    found, rounded = run_graph(model, sample), checkpoint.predict(sample)
    for output, value in dequantized(checkpoint).predict(sample).items():
        np.testing.assert_allclose(found[output], value, rtol=1e-3, atol=1e-5)
        assert not np.allclose(rounded[output], value, rtol=1e-3, atol=1e-5)


def test_float_graph_has_nothing_to_linearize() -> None:
    assert linearize_(graph_of("bert")) == 0


@pytest.mark.parametrize(("name", "bits"), [("bert", 8), ("gpt2", 4)])
@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_linearized_block_weights_equal_the_dequantized_model(
    name: str, bits: int, target: str
) -> None:
    config = QuantizeConfig("weight-only", bits=bits)
    checkpoint = quantize(checkpoint_of(name), config).checkpoint
    model = build_graph(checkpoint, ExportConfig(target))
    products = operators(model)["MatMulNBits"] + operators(model)["DequantizeLinear"]
    assert linearize_(model) == products > 0
    sample = checkpoint.signature.sample(3, 9, ragged=True)
    found, rounded = run_graph(model, sample, optimize=True), checkpoint.predict(sample)
    for output, value in dequantized(checkpoint).predict(sample).items():
        np.testing.assert_allclose(found[output], value, rtol=1e-3, atol=1e-5)
        assert not np.allclose(rounded[output], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_blockwise_weights_are_linearized_too(bits: int) -> None:
    config = QuantizeConfig(scheme="weight-only", bits=bits)
    checkpoint = quantize(checkpoint_of("bert"), config).checkpoint
    model = build_graph(checkpoint, ExportConfig())
    products = operators(model)["MatMulNBits"]
    assert linearize_(model) == products > 0
    sample = checkpoint.signature.sample(3, 9, ragged=True)
    found = run_graph(model, sample)
    for output, value in dequantized(checkpoint).predict(sample).items():
        np.testing.assert_allclose(found[output], value, rtol=1e-3, atol=1e-5)


def products(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "MatMulInteger"]


def test_products_keep_their_module() -> None:
    model = graph_of("bert", int8=True)
    modules = {node.metadata_props[MODULE] for node in products(model)}
    linearize_(model)
    assert modules <= {n.metadata_props.get(MODULE) for n in model.graph if n.op_type == "MatMul"}


def test_what_is_not_rounded_as_it_should_be_stays() -> None:
    model = graph_of("bert", int8=True)
    count = len(products(model))
    products(model)[0].resize_inputs(2)  # no zero point
    quantize_ = products(model)[-1].inputs[0].producer()  # type: ignore[union-attr]
    other = products(model)[-3].inputs[0].producer()  # type: ignore[union-attr]
    assert other is not quantize_
    products(model)[-1].replace_input_with(2, other.outputs[2])  # type: ignore[union-attr]
    assert linearize_(model) == count - 2
    assert len(products(model)) > 2


def test_zero_point_of_the_weights_is_kept() -> None:
    model = graph_of("bert", int8=True)
    sample = checkpoint_of("bert", int8=True).signature.sample(2, 5)
    node = products(model)[-2]
    zero = ir.node("Constant", [], {"value": ir.tensor(np.array(90, np.int8))})
    model.graph.insert_before(node, zero)
    node.resize_inputs(4)
    node.replace_input_with(3, zero.outputs[0])
    rounded = run_graph(model, sample)["last_hidden_state"]
    linearize_(model)
    found = run_graph(model, sample)["last_hidden_state"]
    plain = graph_of("bert", int8=True)
    linearize_(plain)
    right = run_graph(plain, sample)["last_hidden_state"]
    assert np.abs(found - rounded).max() < 0.1 * np.abs(found - right).max()
