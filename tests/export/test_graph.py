import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from calib_data.errors import ExportError
from compress.checkpoint import Checkpoint
from compress.loading import open_checkpoint
from compress.signature import factory_signature
from export.graph import MODULE, OPSETS, ExportConfig, build_graph
from export.parity import check_parity
from tests.export.graphs import checkpoint_of, graph_of, operators, run_graph, save


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_axes_are_dynamic(name: str) -> None:
    checkpoint, model = checkpoint_of(name), graph_of(name)
    for batch, sequence in ((1, 1), (5, 3), (2, 40)):
        sample = checkpoint.signature.sample(batch, sequence, ragged=True)
        found, expected = run_graph(model, sample), checkpoint.predict(sample)
        for output, value in expected.items():
            np.testing.assert_allclose(found[output], value, rtol=1e-3, atol=1e-5)


def test_batch_of_images_is_dynamic() -> None:
    checkpoint, model = checkpoint_of("vit"), graph_of("vit")
    for batch in (1, 5):
        found = run_graph(model, checkpoint.signature.sample(batch))["logits"]
        assert found.shape == (batch, 2)


def test_names_and_axes_are_the_signatures() -> None:
    graph = graph_of("bert").graph
    assert [value.name for value in graph.inputs] == [
        "input_ids",
        "attention_mask",
        "token_type_ids",
    ]
    assert [value.name for value in graph.outputs] == ["last_hidden_state", "pooler_output"]
    for value in graph.inputs:
        assert value.dtype == ir.DataType.INT64
        assert str(value.shape) == "[batch,sequence]"
    assert str(graph.outputs[0].shape) == "[batch,sequence,32]"
    assert str(graph_of("vit").graph.inputs[0].shape) == "[batch,3,12,12]"
    assert str(graph_of("vit").graph.outputs[0].shape) == "[batch,2]"


def test_file_tells_nothing_of_the_machine(tmp_path: Path) -> None:
    for name in ("bert", "gpt2"):
        content = save(graph_of(name), tmp_path).read_bytes()
        for secret in (str(Path.cwd()), sys.prefix, "site-packages", ".py", str(Path.home())):
            assert secret == "/" or secret.encode() not in content, secret
    assert b"encoder.layer.1" in save(graph_of("bert"), tmp_path).read_bytes()  # modules are told


def test_nodes_name_their_module() -> None:
    modules = {name for name, _ in checkpoint_of("bert").module.named_modules()}
    named = {node.metadata_props.get(MODULE, "") for node in graph_of("bert").graph}
    assert named <= modules
    assert {"embeddings.LayerNorm", "encoder.layer.1.output.dense"} <= named


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
@pytest.mark.parametrize("int8", [False, True])
def test_one_attention_a_layer(name: str, int8: bool) -> None:
    assert operators(graph_of(name, int8))["Attention"] == 2
    assert operators(graph_of(name, int8))["Softmax"] == 0


def adds_before_norms(model: ir.Model) -> int:
    """Return how many sums only a norm reads: those that ONNX Runtime fuses with it."""
    sources = [n.inputs[0] for n in model.graph if n.op_type == "LayerNormalization"]
    producers = [v.producer() for v in sources if v is not None and len(v.uses()) == 1]
    return sum(
        node is not None
        and node.op_type == "Add"
        and all(v is not None and v.const_value is None for v in node.inputs)
        for node in producers
    )


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_target_cpu_has_no_add_before_a_norm(name: str) -> None:
    assert adds_before_norms(graph_of(name)) == 0
    assert adds_before_norms(graph_of(name, target="portable")) > 0
    assert adds_before_norms(graph_of(name, target="cuda")) > 0


@pytest.mark.parametrize(
    ("target", "int8"),
    [("portable", False), ("portable", True), ("cpu", False), ("cpu", True), ("cuda", False)],
)
def test_only_operators_of_onnx(target: str, int8: bool) -> None:
    model = graph_of("bert", int8, target)
    assert {node.domain for node in model.graph} == {""}
    assert set(model.opset_imports) == {""}
    assert not model.functions
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize(
    ("name", "opset"),
    [*(("bert", opset) for opset in OPSETS), ("llama", 22), ("llama", 24)],
)
def test_opsets(name: str, opset: int, tmp_path: Path) -> None:
    model = graph_of(name, opset=opset)
    assert model.opset_imports[""] == opset
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    found = operators(model)
    assert found["Attention"] == (2 if opset >= 23 else 0)  # decomposed before opset 23
    assert (found["Softmax"] > 0) == (opset < 23)
    report = check_parity(checkpoint_of(name), save(model, tmp_path))
    assert report.passed, report.worst()


@pytest.mark.parametrize("opset", [18, 24])
def test_opsets_int8(opset: int, tmp_path: Path) -> None:
    model = graph_of("bert", int8=True, opset=opset)
    report = check_parity(checkpoint_of("bert", int8=True), save(model, tmp_path))
    assert report.passed, report.worst()


def test_source_is_left_as_it_was() -> None:
    checkpoint = checkpoint_of("gpt2")
    before = checkpoint.config.use_cache
    build_graph(checkpoint, ExportConfig())
    assert checkpoint.config.use_cache == before is True


def test_factory_module(tmp_path: Path) -> None:
    checkpoint = open_checkpoint("tests.compress.factories:mixer")
    model = build_graph(checkpoint, ExportConfig())
    assert [value.name for value in model.graph.outputs] == ["scores", "features"]
    report = check_parity(checkpoint, save(model, tmp_path))
    assert report.passed, report.worst()
    assert run_graph(model, checkpoint.signature.sample(5))["scores"].shape == (5, 3)


def test_factory_module_with_a_long_mean(tmp_path: Path) -> None:
    checkpoint = open_checkpoint("tests.compress.factories:mixer_tuple")
    model = build_graph(checkpoint, ExportConfig())
    sample = checkpoint.signature.sample(3, 17)
    assert sample["ids"].shape == (3, 17)
    found, expected = run_graph(model, sample), checkpoint.predict(sample)
    np.testing.assert_allclose(found["scores"], expected["scores"], rtol=1e-4, atol=1e-6)
    report = check_parity(checkpoint, save(model, tmp_path))
    assert report.passed, report.worst()


def test_module_that_cannot_be_traced_says_why() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if float(x.sum()) > 0 else -x

    module = Branching()
    checkpoint = Checkpoint(
        module, "custom", factory_signature(module, {"x": torch.ones(2, 3)}, None)
    )
    with pytest.raises(ExportError, match="Branching cannot be exported") as caught:
        build_graph(checkpoint, ExportConfig())
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 9
