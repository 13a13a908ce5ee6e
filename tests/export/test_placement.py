import json
import re
import tempfile
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from calib_data.errors import ModelError, ProviderError
from export import placement
from export.bundle import write_bundle
from export.placement import (
    PlacedNode,
    Placement,
    inspect_graphs,
    require_products,
    stray_products,
)
from onnxpress.cli import onnxpress_group
from tests.export.graphs import checkpoint_of, graph_of, save

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def inspect(name: str, folder: Path, **settings: bool) -> Placement:
    return inspect_graphs(save(graph_of(name, **settings), folder), shape=(2, 8))["model"]


def test_every_node_has_provider_kernel_and_time(tmp_path: Path) -> None:
    found = inspect("bert", tmp_path)
    assert found.samples["sample"]["input_ids"] == [2, 8]
    assert {node.provider for node in found.nodes} == {CPU}
    assert all(node.seconds["sample"] >= 0 for node in found.nodes)
    product = next(node for node in found.nodes if node.operator == "MatMul")
    assert product.kernel == "MatMul(float)"  # its weight is packed, and no input any more
    assert sum(use.share["sample"] for use in found.operators) == pytest.approx(1)
    assert sum(use.nodes for use in found.operators) == len(found.nodes)
    assert (found.fused["Attention"], found.copies) == (2, 0)


def test_what_the_runtime_fused_is_counted(tmp_path: Path) -> None:
    """An int8 product is four nodes in the file, and one when it runs."""
    found = inspect("bert", tmp_path, int8=True)
    kinds = ("DynamicQuantizeMatMul", "MatMulIntegerToFloat")
    assert sum(found.fused.get(f"com.microsoft.{kind}", 0) for kind in kinds) >= 12
    assert "MatMulInteger" not in [node.operator for node in found.nodes]


FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def write(folder: Path, nodes: list[onnx.NodeProto], **inputs: tuple[int, list[Any]]) -> Path:
    """Write a graph whose one output is `y`; inputs are given as (type, shape)."""
    values = [helper.make_tensor_value_info(name, *item) for name, item in inputs.items()]
    graph = helper.make_graph(nodes, "g", values, [helper.make_tensor_value_info("y", FLOAT, None)])
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), folder / "by_hand.onnx")
    return folder / "by_hand.onnx"


def test_a_decoder_is_timed_at_its_prompt_and_at_a_step(tmp_path: Path) -> None:
    """By the usual names of its inputs; its nodes have none."""
    past = "past_key_values.0.key"
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["x"], to=FLOAT),
        helper.make_node("ReduceSum", [past], ["s"], keepdims=0),
        helper.make_node("Add", ["x", "s"], ["y"]),
    ]
    inputs = {"input_ids": (INT64, ["b", "s"]), past: (FLOAT, ["b", 2, "p", 4])}
    found = inspect_graphs(write(tmp_path, nodes, **inputs), shape=(3, 8))["by_hand"]
    assert found.samples["prompt"] == {"input_ids": [3, 8], past: [3, 2, 0, 4]}
    assert found.samples["step"] == {"input_ids": [3, 1], past: [3, 2, 7, 4]}
    assert sorted(node.operator for node in found.nodes) == ["Add", "Cast", "ReduceSum"]
    assert all(set(node.seconds) == {"prompt", "step"} for node in found.nodes)


def test_a_branch_that_no_sample_reaches_is_told(tmp_path: Path) -> None:
    """A graph that multiplies in one branch and adds in the other."""
    made = helper.make_tensor_value_info("z", FLOAT, None)
    then, other = (
        helper.make_graph([helper.make_node(op, ["x", "x"], ["z"], op)], "inner", [], [made])
        for op in ("MatMul", "Add")
    )
    node = helper.make_node("If", ["flag"], ["y"], then_branch=then, else_branch=other)
    path = write(tmp_path, [node], flag=(BOOL, [1]), x=(FLOAT, ["batch", 4]))
    found = inspect_graphs(path, shape=(4, 1))["by_hand"]
    nodes = {node.operator: node for node in found.nodes}
    assert nodes["MatMul"].provider == CPU
    assert nodes["Add"] == PlacedNode("Add", "Add")
    assert nodes["If"].seconds == {}  # what is inside counts already


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(graph_of("bert"), tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    inspect_graphs(path, shape=(1, 4))
    assert [item.name for item in tmp_path.iterdir()] == ["model.onnx"]


def test_a_sample_that_the_graph_cannot_take_is_an_error(tmp_path: Path) -> None:
    path = save(graph_of("bert"), tmp_path)
    with pytest.raises(ModelError, match=r"2 × 100.*--length"):
        inspect_graphs(path, shape=(2, 100))  # a bare file does not tell its 64 positions


# --- products that stray from the provider -------------------------------------------------------


def _nodes() -> list[PlacedNode]:
    products = [
        "MatMul",
        "Gemm",
        "Attention",
        "com.microsoft.MatMulNBits",
        "com.microsoft.FusedConv",
    ]
    return [
        *(PlacedNode(f"good {name}", name, CUDA) for name in products),
        PlacedNode("copy", "MemcpyToHost", CUDA),
        PlacedNode("size", "Shape", CPU),
        PlacedNode("elsewhere", "MatMul"),
    ]


def test_shape_arithmetic_on_the_cpu_is_no_stray_product() -> None:
    assert stray_products(_nodes(), "cuda") == []
    require_products({"model": Placement({}, tuple(_nodes()))}, "cuda")


@pytest.mark.parametrize(
    "operator",
    [
        *("MatMul", "Gemm", "Conv", "Einsum", "Attention", "MatMulInteger"),
        *("com.microsoft.MatMulNBits", "com.microsoft.GroupQueryAttention"),
    ],
)
def test_a_product_on_the_cpu_is_named(operator: str) -> None:
    stray = PlacedNode("layer 3", operator, CPU)
    assert stray_products([*_nodes(), stray], "cuda") == [stray]
    with pytest.raises(ProviderError, match=rf"model: layer 3 \({operator}\).*--target") as caught:
        require_products({"model": Placement({}, (*_nodes(), stray))}, "cuda")
    assert caught.value.exit_code == 5


def test_copies_between_devices_are_counted() -> None:
    assert Placement({}, tuple(_nodes())).copies == 1


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = checkpoint_of("bert")
    write_bundle([("model", checkpoint, graph_of("bert"))], checkpoint, {}, tmp_path)
    words = ["export", "inspect", str(tmp_path), "--batch", "2", "--length", "99"]
    done = CliRunner().invoke(onnxpress_group, [*words, "--json"])
    assert done.exit_code == 0, done.output
    graph = json.loads(done.stdout)["graphs"]["model"]
    assert graph["samples"]["sample"]["input_ids"] == [2, 64]  # the model has no more positions
    assert {node["provider"] for node in graph["nodes"]} == {CPU}
    text = CliRunner().invoke(onnxpress_group, words).stdout
    assert "2 Attention" in text
    assert re.search(rf"^MatMul +12 +{CPU} +\d+\.\d%$", text, re.MULTILINE)
    # a stray product: the table is printed, then the error
    stray = Placement({"sample": {}}, (PlacedNode("p", "MatMul", CPU, "MatMul(float)", {}),))
    monkeypatch.setattr(placement, "inspect_graphs", lambda *_: {"model": stray})
    done = CliRunner().invoke(onnxpress_group, [*words, "--provider", "cuda"])
    assert done.exit_code == 5
    assert "MatMul" in done.stdout
    assert "model: p (MatMul)" in done.stderr
