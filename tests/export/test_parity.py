import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from calib_data.errors import ParityError
from compress.checkpoint import Checkpoint
from compress.quantize import QuantizeConfig, quantize
from export.graph import ExportConfig, build_graph
from export.parity import Check, ParityReport, check_parity, parity_cases
from tests.export.graphs import checkpoint_of, edit, graph_of, initializer, save, weight_of
from tests.tiny import tiny_checkpoint

Change = Callable[[ir.Model], Any]


@pytest.mark.parametrize("name", ["bert", "classifier", "gpt2", "llama", "vit"])
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_correct_graphs_pass(name: str, int8: bool, tmp_path: Path) -> None:
    told: list[None] = []
    checkpoint = checkpoint_of(name, int8)
    path = save(graph_of(name, int8), tmp_path)
    report = check_parity(checkpoint, path, progress=lambda: told.append(None))
    assert report.passed, report.worst()
    assert report.diverges is None
    report.raise_if_failed()
    assert told
    checked = {(check.session, check.output, check.rule) for check in report.checks}
    rules = {"float", "int8 noise"} if int8 else {"float"}
    assert checked >= {
        (session, output, rule)
        for session in ("plain", "optimized")
        for output in checkpoint.signature.outputs
        for rule in rules
    }
    assert ("vit" in name) or any(rule == "same bits" for _, _, rule in checked)


def test_cases_hold_the_longest_and_the_shortest_and_padding() -> None:
    cases = dict(parity_cases(checkpoint_of("bert")))
    shapes = {tuple(case["input_ids"].shape) for case in cases.values()}
    assert {(1, 1), (1, 64)} <= shapes
    assert len({batch for batch, _ in shapes}) >= 3
    assert any(not case["attention_mask"].all() for case in cases.values())
    assert "real text" in cases
    assert (
        len({len(c["pixel_values"]) for c in dict(parity_cases(checkpoint_of("vit"))).values()})
        == 3
    )


# --- every check can fail -----------------------------------------------------------------------


def largest(array: np.ndarray) -> tuple[int, ...]:
    return tuple(
        int(i) for i in np.unravel_index(np.abs(array.astype(float)).argmax(), array.shape)
    )


def one_element(value: ir.Value) -> None:
    """Change the largest number of a tensor, and no other, by one percent."""

    def change(array: np.ndarray) -> None:
        array[largest(array)] *= 1.01

    edit(value, change)


def one_step(value: ir.Value) -> None:
    """Change the largest of a tensor's int8 numbers by one step, less than one percent."""

    def change(array: np.ndarray) -> None:
        array[largest(array)] -= np.sign(array[largest(array)])

    edit(value, change)


def attribute(operator: str, name: str, factor: float) -> Change:
    def change(model: ir.Model) -> None:
        node = [n for n in model.graph if n.op_type == operator][-1]
        old = node.attributes.get(name)
        value = float(old.value) if old is not None else 8**-0.5  # the operator's own default
        node.attributes[name] = ir.AttrFloat32(name, value * factor)

    return change


def without_residual(model: ir.Model) -> None:
    node = [n for n in model.graph if n.op_type == "Sum"][-1]
    node.replace_input_with(0, node.inputs[1])


def rows(suffix: str, row: int) -> Change:
    return lambda m: edit(initializer(m, suffix), lambda a: a[row].__imul__(1.01))


FLOAT: dict[str, tuple[Change, str | None]] = {
    "tensor scaled": (
        lambda m: edit(weight_of(m, "encoder.layer.0.intermediate.dense"), lambda a: a.__imul__(1.01)),
        "encoder.layer.0.intermediate",
    ),
    "norm weight": (
        lambda m: one_element(initializer(m, "layer.0.attention.output.LayerNorm.weight")),
        "encoder.layer.0.attention.output",
    ),
    "norm bias": (
        lambda m: one_element(initializer(m, "layer.1.output.LayerNorm.bias")),
        "encoder.layer.1.output",
    ),
    "query": (lambda m: one_element(weight_of(m, "encoder.layer.0.attention.self.query")),
              "encoder.layer.0.attention.self.query"),
    "key": (lambda m: one_element(weight_of(m, "encoder.layer.1.attention.self.key")),
            "encoder.layer.1.attention.self.key"),
    "value": (lambda m: one_element(weight_of(m, "encoder.layer.0.attention.self.value")),
              "encoder.layer.0.attention.self.value"),
    "output": (lambda m: one_element(weight_of(m, "encoder.layer.1.attention.output.dense")),
               "encoder.layer.1.attention.output.dense"),
    "down": (lambda m: one_element(weight_of(m, "encoder.layer.1.output.dense")),
             "encoder.layer.1.output.dense"),
    "bias": (lambda m: one_element(initializer(m, "layer.0.output.dense.bias")),
             "encoder.layer.0.output.dense"),
    "pooler": (lambda m: one_element(weight_of(m, "pooler.dense")), "pooler.dense"),
    "word": (rows("word_embeddings.weight", 5), "embeddings"),
    "position": (rows("position_embeddings.weight", 63), "embeddings"),
    "epsilon": (attribute("LayerNormalization", "epsilon", 1e7), "encoder.layer.1.output"),
    "attention scale": (attribute("Attention", "scale", 1.01), "encoder.layer.1.attention"),
    "residual": (without_residual, "encoder.layer.1.output"),
    "NaN": (lambda m: edit(initializer(m, "layer.1.output.LayerNorm.bias"),
                           lambda a: a.fill(np.nan)), "encoder.layer.1.output"),
}  # fmt: skip


@pytest.mark.parametrize("change", FLOAT)
def test_changed_float_graph_fails(change: str, tmp_path: Path) -> None:
    apply, module = FLOAT[change]
    report = check_parity(checkpoint_of("bert"), save(graph_of("bert"), tmp_path, apply))
    assert not report.passed
    with pytest.raises(ParityError, match="disagrees with its source") as caught:
        report.raise_if_failed()
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert report.diverges is not None
    assert report.diverges.startswith(f"{module}"), report.diverges
    assert report.diverges in str(caught.value)


def scale_of(model: ir.Model, module: str) -> ir.Value:
    return initializer(model, f"{module}.scale")


def without_zero_point(model: ir.Model) -> None:
    node = [n for n in model.graph if n.op_type == "MatMulInteger"][-3]
    node.resize_inputs(2)


def scale_of_rows(model: ir.Model) -> ir.Value:
    """Return the scales of the word embeddings, which the exporter stores as a column."""
    (found,) = (
        v
        for v in model.graph.initializers.values()
        if v.dtype == ir.DataType.FLOAT and v.shape is not None and 107 in v.shape.numpy()
    )
    return found


INT8: dict[str, Change] = {
    "weight": lambda m: one_step(weight_of(m, "encoder.layer.0.intermediate.dense")),
    "weight of the query": lambda m: one_step(weight_of(m, "encoder.layer.1.attention.self.query")),
    "scale": lambda m: one_element(scale_of(m, "encoder.layer.0.output.dense")),
    "bias": lambda m: one_element(initializer(m, "layer.1.output.dense.bias")),
    "norm": lambda m: one_element(initializer(m, "layer.0.output.LayerNorm.weight")),
    "word": lambda m: one_step(initializer(m, "word_embeddings.weight")),
    "scale of a word": lambda m: edit(scale_of_rows(m), lambda a: a[7].__imul__(1.01)),
    "zero point": without_zero_point,
}


@pytest.mark.parametrize("change", INT8)
def test_changed_int8_graph_fails(change: str, tmp_path: Path) -> None:
    path = save(graph_of("bert", int8=True), tmp_path, INT8[change])
    report = check_parity(checkpoint_of("bert", int8=True), path)
    assert not report.passed
    failed = {check.rule for check in report.checks if not check.passed}
    # the linearized graph has no zero point: there the noise tells
    assert failed >= ({"int8 noise"} if change == "zero point" else {"float"} if "word" not in change
                      else {"same bits"})  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "vit"])
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_changed_graphs_of_other_families_fail(name: str, int8: bool, tmp_path: Path) -> None:
    module = {"gpt2": "transformer.h.1.mlp.c_proj", "vit": "vit.layers.0.mlp.fc1"}[name]
    change = one_step if int8 else one_element
    path = save(graph_of(name, int8), tmp_path, lambda m: change(weight_of(m, module)))
    report = check_parity(checkpoint_of(name, int8), path)
    assert not report.passed
    assert report.diverges is not None
    assert report.diverges.startswith(module)


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_row_that_no_case_uses_is_compared_too(int8: bool, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("bert", vocab_size=5000)
    if int8:
        checkpoint = quantize(checkpoint, QuantizeConfig()).checkpoint
    used: set[int] = set()
    for case in dict(parity_cases(checkpoint)).values():
        used |= set(case["input_ids"].flatten().tolist())
    row = min(set(range(1, 5000)) - used)
    model = build_graph(checkpoint, ExportConfig())
    tables = [initializer(model, "word_embeddings.weight")]
    if int8:  # the scales, one a row
        tables += [v for v in model.graph.initializers.values()
                   if v.dtype == ir.DataType.FLOAT and v.shape is not None
                   and 5000 in v.shape.numpy()]  # fmt: skip
        assert len(tables) == 2
    assert check_parity(checkpoint, save(model, tmp_path)).passed
    for table in tables:
        original = table.const_value
        edit(table, lambda a: a[row].__iadd__(1))
        report = check_parity(checkpoint, save(model, tmp_path))
        assert {c.rule for c in report.checks if not c.passed} == {"same bits"}
        with pytest.raises(ParityError, match="same bits"):
            report.raise_if_failed()
        table.const_value = original


def test_graph_of_another_checkpoint_fails(tmp_path: Path) -> None:
    report = check_parity(tiny_checkpoint("bert", seed=1), save(graph_of("bert"), tmp_path))
    assert not report.passed


# --- the report ---------------------------------------------------------------------------------


def check(**changes: Any) -> Check:
    values: dict[str, Any] = {
        "case": "a",
        "session": "plain",
        "output": "logits",
        "rule": "float",
        "rms": 1.0,
        "rms_allowed": 2.0,
        "largest": 1.0,
        "largest_allowed": 4.0,
    }
    return Check(**(values | changes))


def test_report_round_trips_through_json() -> None:
    report = ParityReport((check(), check(rms=3.0)), diverges="encoder")
    stored = json.loads(json.dumps(report.to_json()))
    checks = tuple(Check(**{k: v for k, v in c.items() if k != "passed"}) for c in stored["checks"])
    assert ParityReport(checks, stored["diverges"]) == report
    assert stored["passed"] is False
    assert [c["passed"] for c in stored["checks"]] == [True, False]


@pytest.mark.parametrize(
    "changes",
    [{"rms": 2.1}, {"largest": 4.1}, {"rms": float("nan")}, {"largest": float("inf")}],
    ids=str,
)
def test_verdict_of_a_check(changes: Mapping[str, float]) -> None:
    assert check().passed
    assert not check(**changes).passed


def test_worst_is_nearest_to_its_bound() -> None:
    checks = (check(), check(largest=3.9), check(rms=1.5))
    assert ParityReport(checks).worst() == checks[1]
    exact = check(rms=0.0, rms_allowed=0.0, largest=0.0, largest_allowed=0.0)
    assert ParityReport((exact, check())).worst() == check()
    assert exact.passed


def test_no_checks_is_no_pass() -> None:
    assert not ParityReport(()).passed
    assert asdict(check())["case"] == "a"


def test_empty_report_raises_the_familys_error() -> None:
    with pytest.raises(ParityError, match="no case"):
        ParityReport(()).raise_if_failed()


def test_source_is_untouched(tmp_path: Path) -> None:
    from compress.checkpoint import weights_sha256

    checkpoint: Checkpoint = checkpoint_of("bert", int8=True)
    before = weights_sha256(checkpoint.module)
    check_parity(checkpoint, save(graph_of("bert", int8=True), tmp_path))
    assert weights_sha256(checkpoint.module) == before
