from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from calib_data.errors import ConfigError
from compress.quantize import QuantizeConfig, quantize
from export.graph import ExportConfig
from export.precision import in_precision, precision
from export.publish import export_onnx
from tests.tiny import tiny_checkpoint


@pytest.mark.parametrize(
    ("family", "task", "attention"),
    [
        ("llama", "text-generation", "GroupQueryAttention"),
        ("vit", "image-classification", "Attention"),
    ],
)
def test_half_precision_passes_the_gate_and_stays_fused(
    family: str, task: str, attention: str, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint(family, task)
    bundle, report = export_onnx(
        checkpoint, tmp_path / "out", ExportConfig(target="cuda", dtype="fp16")
    )
    assert report.passed
    graph = ir.load(bundle.model_path).graph
    weights = [v.const_value for v in graph.initializers.values() if v.const_value is not None]
    assert not any(w.dtype == ir.DataType.FLOAT and w.size > 100 for w in weights)
    kinds = [node.op_type for node in graph]
    assert kinds.count(attention) == 2
    assert kinds.count("RotaryEmbedding") == (4 if family == "llama" else 0)
    floats = {v.dtype for v in graph.inputs if v.dtype != ir.DataType.INT64}
    assert floats == {ir.DataType.FLOAT16}
    assert precision(checkpoint.module) == torch.float32  # the source is untouched


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--target cpu"):
        ExportConfig(target="cpu", dtype="fp16")
    with pytest.raises(ConfigError, match="--dtype"):
        ExportConfig(dtype="fp8")
    checkpoint = tiny_checkpoint("vit", "image-classification")
    with pytest.raises(ConfigError, match="--provider cuda"):
        export_onnx(checkpoint, tmp_path / "out", ExportConfig(target="cuda", dtype="bf16"))
    assert not (tmp_path / "out").exists()
    quantized = quantize(checkpoint, QuantizeConfig()).checkpoint
    with pytest.raises(ConfigError, match="quantized"):
        in_precision(quantized, "fp16")
