"""Fixed activation steps through the exporter: int8 kernels, one rounding a tensor, and the gate."""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from compress.int8 import DynamicInt8Linear
from compress.quantize import dequantized, quantize
from compress.quantize_config import QuantizeConfig
from compress.static_int8 import StaticInt8Linear
from compress.tokens import row_alone
from export.cases import padded_row, parity_cases
from export.graph import MODULE, ExportConfig, build_graph
from export.linearize import linearize_
from export.parity import check_parity
from export.parts import parts
from export.trial import PADDING
from tests.export.graphs import (
    operators,
    optimized_operators,
    run_graph,
    save,
    static_checkpoint_of,
    static_graph_of,
)
from tests.tiny import SampledBatches, tiny_checkpoint

GRAPHS: list[tuple[str, str, dict[str, Any]]] = [
    ("bert", "cpu", {}),
    ("bert", "portable", {}),
    ("bert", "cpu", {"activations": "int8"}),
    ("bert", "portable", {"activations": "int8", "per_channel": False, "weight_range": "reduced"}),
    ("bert", "portable", {"opset": 18}),
    ("gpt2", "portable", {}),
    ("vit", "cpu", {"per_channel": False}),
]
CHANGED = "encoder.layer.0.intermediate.dense"
FLOAT_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "MatMulNBits")
INT8_PRODUCTS = ("MatMulIntegerToFloat", "QGemm", "QLinearMatMul")


def products(found: Counter[str], kinds: tuple[str, ...]) -> int:
    return sum(found[kind] for kind in kinds)


@pytest.mark.parametrize(("name", "target", "settings"), GRAPHS)
def test_every_product_runs_on_integers(
    name: str, target: str, settings: dict, tmp_path: Path
) -> None:
    model, part = static_graph_of(name, target, **settings), static_checkpoint_of(name, **settings)
    layers = [m for m in part.module.modules() if isinstance(m, StaticInt8Linear)]
    found = optimized_operators(save(model, tmp_path), tmp_path)
    assert products(found, INT8_PRODUCTS) == len(layers)
    attention = 4 if settings.get("opset", 23) < 23 else 0  # in parts, there are products in it
    assert products(found, FLOAT_PRODUCTS) == attention
    assert found["DequantizeLinear"] == 0
    kinds = {n.inputs[2].dtype for n in model.graph if n.op_type == "QuantizeLinear"}  # type: ignore[union-attr]
    signed = settings.get("activations") == "int8" and target != "cpu"
    assert kinds == {ir.DataType.INT8 if signed else ir.DataType.UINT8}
    assert ("MatMulIntegerToFloat" in operators(model)) == (target == "cpu")
    assert target != "portable" or {node.domain for node in model.graph} == {""}


@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_tensors_are_rounded_once(target: str) -> None:
    found = operators(static_graph_of(target=target))
    assert found["QuantizeLinear"] == 2 * 4 + 1  # layers × inputs of products, and the pooler
    if target == "cpu":
        assert found["MatMulIntegerToFloat"] == 2 * 6 + 1
        # around no product, only what keeps a residual apart: two a norm
        assert found["Reshape"] == 2 * found["LayerNormalization"]


@pytest.mark.parametrize(("name", "target", "settings"), GRAPHS)
def test_graph_equals_the_simulation(name: str, target: str, settings: dict) -> None:
    checkpoint, model = (
        static_checkpoint_of(name, **settings),
        static_graph_of(name, target, **settings),
    )
    sample = checkpoint.signature.sample(3, 9)
    expected, exact = checkpoint.predict(sample), dequantized(checkpoint).predict(sample)
    for optimize in (False, True):
        found = run_graph(model, sample, optimize)
        for output, value in expected.items():
            off = np.abs(found[output] - value)
            # now and then a rounding falls the other way, and what depends on it moves a little
            assert np.mean(off < 1e-5) > 0.5
            assert off.max() < np.abs(exact[output] - value).max()


@pytest.mark.parametrize(("name", "target", "settings"), GRAPHS)
def test_linearized_graph_equals_the_dequantized_model(
    name: str, target: str, settings: dict
) -> None:
    checkpoint, model = (
        static_checkpoint_of(name, **settings),
        static_graph_of(name, target, **settings),
    )
    kind = "MatMulIntegerToFloat" if target == "cpu" else "QuantizeLinear"
    count = operators(model)[kind]
    assert linearize_(model) == count > 0
    sample = checkpoint.signature.sample(3, 9)
    rounded = checkpoint.predict(sample)
    for optimize in (False, True):
        found = run_graph(model, sample, optimize)
        for output, value in dequantized(checkpoint).predict(sample).items():
            np.testing.assert_allclose(found[output], value, rtol=1e-3, atol=1e-5)
            assert not np.allclose(rounded[output], value, rtol=1e-3, atol=1e-5)


# --- the gate -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "target", "settings"), GRAPHS[:4])
def test_correct_graphs_pass(name: str, target: str, settings: dict, tmp_path: Path) -> None:
    path = save(static_graph_of(name, target, **settings), tmp_path)
    report = check_parity(static_checkpoint_of(name, **settings), path)
    assert report.passed, report.worst()
    rules = {check.rule for check in report.checks}
    assert rules == {"float", "int8 noise", "same bits"}
    steps = [check for check in report.checks if check.output.startswith("steps of")]
    assert len(steps) == operators(ir.load(path))["QuantizeLinear"]
    judged = {check.rule for check in report.checks if check.case == PADDING}
    assert judged == {"float", "int8 noise"}
    assert all(drift < 1e-6 for drift in report.padding_drift.values())


def node_of(model: ir.Model, *kinds: str) -> ir.Node:
    """Return the node of one of these operators that belongs to the changed module."""
    (node,) = (
        n for n in model.graph if n.op_type in kinds and n.metadata_props.get(MODULE, "") == CHANGED
    )
    return node


def own_copy(
    model: ir.Model, node: ir.Node, index: int, change: Callable[[np.ndarray], Any]
) -> None:
    """Let one input of a node be a changed copy of what it was."""
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    change(array)
    tensor = ir.tensor(array, name=f"{value.name}.changed")
    copied = ir.Value(
        name=tensor.name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(array.shape),
        const_value=tensor,
    )
    model.graph.register_initializer(copied)
    node.replace_input_with(index, copied)


def everywhere(index: int, change: Callable[[np.ndarray], Any]) -> Callable[[ir.Model], None]:
    """Return what changes the scale (1) or zero point (2) of a rounding and of all that use it."""

    def apply(model: ir.Model) -> None:
        rounding = node_of(model, "QuantizeLinear")
        users = [use.node for use in rounding.outputs[0].uses()]
        places = {"DequantizeLinear": {1: 1, 2: 2}, "MatMulIntegerToFloat": {1: 2, 2: 4}}
        own_copy(model, rounding, index, change)
        for user in users:
            user.replace_input_with(places[user.op_type][index], rounding.inputs[index])

    return apply


def one_place(kind: str, index: int, change: Callable[[np.ndarray], Any]) -> Callable[..., None]:
    return lambda model: own_copy(model, node_of(model, kind), index, change)


def one_percent(array: np.ndarray) -> None:
    array[...] *= 1.01


def one_number(array: np.ndarray) -> None:
    array.flat[np.abs(array).argmax()] *= 1.01


def one_step(array: np.ndarray) -> None:
    array.flat[array.size // 2] += 1


PRODUCT, ROUNDING = "MatMulIntegerToFloat", "QuantizeLinear"
CHANGES: dict[str, tuple[str, Callable[[ir.Model], None], str]] = {
    "a weight by a step": ("cpu", one_place(PRODUCT, 1, one_step), "float"),
    "a scale": ("cpu", one_place(PRODUCT, 3, one_number), "float"),
    "a bias": ("cpu", one_place(PRODUCT, 6, one_number), "float"),
    "input scale": ("cpu", everywhere(1, one_percent), "same bits"),
    "input zero point": ("cpu", everywhere(2, one_step), "same bits"),
    "input scale, only rounding": ("cpu", one_place(ROUNDING, 1, one_percent), "float"),
    "input scale, only taking back": ("cpu", one_place(PRODUCT, 2, one_percent), "float"),
    "zero point, only taking back": ("cpu", one_place(PRODUCT, 4, one_step), "float"),
    "standard: input scale": ("portable", everywhere(1, one_percent), "same bits"),
    "standard: input zero point": ("portable", everywhere(2, one_step), "same bits"),
    "standard: only rounding": ("portable", one_place(ROUNDING, 1, one_percent), "float"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_graphs_fail(change: str, tmp_path: Path) -> None:
    target, apply, rule = CHANGES[change]
    report = check_parity(
        static_checkpoint_of("bert"), save(static_graph_of(target=target), tmp_path, apply)
    )
    assert rule in {check.rule for check in report.checks if not check.passed}
    if rule == "float":
        assert str(report.diverges).startswith("encoder.layer.0.intermediate")


@pytest.mark.parametrize(("kind", "index"), [("weight", 0), ("scale", 1), ("bias", 0)])
def test_changed_standard_operands_fail(kind: str, index: int, tmp_path: Path) -> None:
    def apply(model: ir.Model) -> None:
        (product,) = (
            n for n in model.graph
            if n.op_type == "Gemm" and n.metadata_props.get(MODULE, "") == CHANGED
        )  # fmt: skip
        operand = product.inputs[2 if kind == "bias" else 1].producer()  # type: ignore[union-attr]
        assert operand is not None
        change = {"weight": one_step, "scale": one_number}.get(kind, lambda a: a.__iadd__(100))
        own_copy(model, operand, index, change)

    report = check_parity(
        static_checkpoint_of("bert"), save(static_graph_of("bert", "portable"), tmp_path, apply)
    )
    assert {c.rule for c in report.checks if not c.passed} >= {"float"}


def test_steps_found_at_run_time_fail(tmp_path: Path) -> None:
    """The same weights with dynamic rounding: within all bounds, but rows depend on each other."""
    other = replace(
        static_checkpoint_of("bert"), module=copy.deepcopy(static_checkpoint_of("bert").module)
    )
    for name, layer in list(other.module.named_modules()):
        if isinstance(layer, StaticInt8Linear):
            dynamic = DynamicInt8Linear(layer.in_features, layer.out_features, True)
            dynamic.weight, dynamic.scale = layer.weight, layer.scale
            dynamic.bias = layer.dequantized_bias()
            parent, _, last = name.rpartition(".")
            setattr(other.module.get_submodule(parent), last, dynamic)
    report = check_parity(
        static_checkpoint_of("bert"), save(build_graph(other, ExportConfig()), tmp_path)
    )
    failed = {check.rule for check in report.checks if not check.passed}
    assert failed == {"same bits"}
    assert max(report.padding_drift.values()) > 1e-4


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize("optimize", [False, True])
def test_a_row_alone_equals_the_row_in_a_padded_batch(target: str, optimize: bool) -> None:
    part = static_checkpoint_of("bert")
    cases = dict(parity_cases(part))
    found = padded_row(cases, part)
    assert found is not None
    case, row = cases[found[0]], found[1]
    real = int(case["attention_mask"][row].sum())
    assert real < case["attention_mask"].shape[1]
    model = static_graph_of(target=target)
    for run_ in (part.predict, lambda inputs: run_graph(model, inputs, optimize)):
        batch, alone = run_(case), run_(row_alone(case, part, row))
        states = batch["last_hidden_state"][row, :real]
        np.testing.assert_allclose(states, alone["last_hidden_state"][0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(
            batch["pooler_output"][row], alone["pooler_output"][0], rtol=0, atol=1e-5
        )


def test_zero_points_are_no_weights(tmp_path: Path) -> None:
    """A bias that is nearly all zeros looks like the zero points of the weights."""
    checkpoint = tiny_checkpoint("bert")
    bias = checkpoint.module.get_submodule(CHANGED).bias
    bias.data[1:] = 0
    batches = SampledBatches(checkpoint)
    small = quantize(checkpoint, QuantizeConfig("static"), batches).checkpoint
    model = build_graph(small, ExportConfig("portable"))
    report = check_parity(small, save(model, tmp_path))
    assert report.passed, report.worst()


def test_many_outputs_are_folded() -> None:
    checkpoint = tiny_checkpoint("gpt2", "text-generation", vocab_size=9000)
    batches = SampledBatches(checkpoint)
    (part,) = parts(quantize(checkpoint, QuantizeConfig("static"), batches).checkpoint).values()
    model = build_graph(part, ExportConfig("portable"))
    stored = [
        n for n in model.graph
        if n.op_type in ("Mul", "Cast") and all(v is None or v.const_value for v in n.inputs)
    ]  # fmt: skip
    assert stored == []
