import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from calib_data.errors import ParityError
from compress.checkpoint import Checkpoint
from compress.quantize import quantize
from compress.quantize_config import QuantizeConfig
from export.cases import parity_cases
from export.graph import ExportConfig, build_graph
from export.parity import check_graphs, check_parity
from export.parts import parts
from export.sessions import open_session
from export.trial import ALONE, PADDING
from export.verdict import ParityReport
from tests.export.graphs import (
    cached_graph_of,
    checkpoint_of,
    edit,
    graph_of,
    initializer,
    save,
    weight_of,
)
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
        for session in ("cpu plain", "cpu optimized")
        for output in checkpoint.signature.outputs
        for rule in rules
    }
    assert ("vit" in name) or any(rule == "same bits" for _, _, rule in checked)


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
    node = [n for n in model.graph if n.op_type == "Add"][-1]
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
    assert failed >= {"same bits" if "word" in change else "float"}


def failing(report: ParityReport) -> set[str]:
    return {check.rule for check in report.checks if not check.passed}


def test_padding_that_changes_a_row_fails(tmp_path: Path) -> None:
    def unmasked(model: ir.Model) -> None:
        for node in model.graph:
            if node.op_type == "Attention":
                node.replace_input_with(3, None)

    report = check_parity(checkpoint_of("bert"), save(graph_of("bert"), tmp_path, unmasked))
    failed = {check.case for check in report.checks if not check.passed}
    assert PADDING in failed
    assert ALONE not in failed  # without padding there is nothing to mask


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_drift_of_padding_is_told_for_int8_and_not_judged(name: str, tmp_path: Path) -> None:
    for int8 in (False, True):
        (part,) = parts(checkpoint_of(name, int8)).values()
        report = check_parity(part, save(cached_graph_of(name, int8), tmp_path))
        assert report.passed, report.worst()
        judged = {check.rule for check in report.checks if check.case == PADDING}
        assert judged == {"float"}
        drift = report.padding_drift
        assert set(drift) == ({f"model {o}" for o in part.signature.outputs} if int8 else set())
        assert all(0 < share < 0.1 for share in drift.values())


def test_graph_that_does_not_run_fails_with_the_runtimes_reason(tmp_path: Path) -> None:
    def one_row(model: ir.Model) -> None:
        for value in model.graph.inputs:
            value.shape = ir.Shape([1, "sequence"])

    report = check_parity(checkpoint_of("bert"), save(graph_of("bert"), tmp_path, one_row))
    broken = {check.case for check in report.checks if check.rule.startswith("does not run: ")}
    assert broken == {c for c, i in parity_cases(checkpoint_of("bert")) if len(i["input_ids"]) > 1}
    with pytest.raises(ParityError, match=r"does not run: .*INVALID_ARGUMENT") as caught:
        report.raise_if_failed()
    assert "\n" not in str(caught.value)


def test_missing_output_fails(tmp_path: Path) -> None:
    def nameless(model: ir.Model) -> None:
        model.graph.outputs[1].name = "another"

    report = check_parity(checkpoint_of("bert"), save(graph_of("bert"), tmp_path, nameless))
    assert {check.output for check in report.checks if not check.passed} == {"pooler_output"}


def test_optimization_that_is_wrong_is_blamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    right = save(graph_of("bert"), tmp_path)
    wrong = save(graph_of("bert"), tmp_path / "other", FLOAT["down"][0])

    def opened(model: Any, provider: str, *, optimize: bool, tf32: bool) -> Any:
        assert not tf32  # the float rule is not for TF32
        return open_session(wrong if optimize else right, provider, optimize=optimize)

    monkeypatch.setattr("export.parity.open_session", opened)
    report = check_parity(checkpoint_of("bert"), right)
    assert {check.session for check in report.checks if not check.passed} == {"cpu optimized"}
    assert report.diverges == "no module of the graph as written: only the optimized session is off"


def test_other_epsilon_fails(tmp_path: Path) -> None:
    change = attribute("LayerNormalization", "epsilon", 10)
    report = check_parity(checkpoint_of("bert"), save(graph_of("bert"), tmp_path, change))
    assert failing(report) == {"same bits"}  # 1e-11 for 1e-12 is far below float32


def half(checkpoint: Checkpoint) -> Checkpoint:
    return replace(checkpoint, module=copy.deepcopy(checkpoint.module).half())


def test_half_precision(tmp_path: Path) -> None:
    checkpoint = half(checkpoint_of("bert"))
    model = build_graph(checkpoint, ExportConfig(target="portable"))
    report = check_parity(checkpoint, save(model, tmp_path))
    assert report.passed, report.worst()
    assert {check.rule for check in report.checks} == {"half precision", "same bits"}
    change = attribute("Attention", "scale", 1.5)
    report = check_parity(checkpoint, save(model, tmp_path, change))
    assert failing(report) == {"half precision"}
    assert report.diverges is not None
    assert report.diverges.startswith("encoder.layer.1.attention")
    change = attribute("Attention", "scale", 1 / 1.5)
    edited = lambda m: (change(m), one_element(initializer(m, "layer.1.output.LayerNorm.bias")))  # noqa: E731
    assert failing(check_parity(checkpoint, save(model, tmp_path, edited))) == {"same bits"}


def test_graphs_of_one_checkpoint_are_told_apart(tmp_path: Path) -> None:
    checkpoint = checkpoint_of("bert")
    (tmp_path / "wrong").mkdir()
    graphs = {
        "right": (checkpoint, save(graph_of("bert"), tmp_path)),
        "wrong": (checkpoint, save(graph_of("bert"), tmp_path / "wrong", FLOAT["query"][0])),
    }
    told: list[None] = []
    report = check_graphs(checkpoint, graphs, progress=lambda: told.append(None))
    assert {check.graph for check in report.checks if not check.passed} == {"wrong"}
    assert str(report.diverges).startswith("encoder.layer.0.attention.self.query")
    assert told
    with pytest.raises(ParityError, match="wrong disagrees with its source"):
        report.raise_if_failed()


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


def test_source_is_untouched(tmp_path: Path) -> None:
    from compress.checkpoint import weights_sha256

    checkpoint: Checkpoint = checkpoint_of("bert", int8=True)
    before = weights_sha256(checkpoint.module)
    check_parity(checkpoint, save(graph_of("bert", int8=True), tmp_path))
    assert weights_sha256(checkpoint.module) == before
