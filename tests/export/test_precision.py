import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from calib_data.errors import ConfigError
from compress.checkpoint import Checkpoint
from compress.quantize import quantize
from compress.quantize_config import QuantizeConfig
from export.cases import parity_cases
from export.graph import ExportConfig, build_graph
from export.localize import first_divergence
from export.placement import inspect_graphs
from export.precision import in_precision, precision
from export.publish import export_onnx
from export.sessions import open_session
from export.trial import compare, make_trial
from tests.export.graphs import cast, checkpoint_of, edit, save, weight_of
from tests.tiny import tiny_checkpoint

BFLOAT16, FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT


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
    graph = ir.load(bundle.graph.path).graph
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


def in_float_with_casts(checkpoint: Checkpoint) -> ir.Model:
    """Return a bfloat16 model's graph that computes in float32, as the CPU provider can."""
    wide = replace(checkpoint, module=copy.deepcopy(checkpoint.module).float())
    model = build_graph(wide, ExportConfig())
    (pixels,), (logits,) = model.graph.inputs, model.graph.outputs
    given = ir.val(pixels.name, BFLOAT16, pixels.shape)
    made = ir.val(logits.name, BFLOAT16, logits.shape)
    pixels.name, logits.name = "wide_pixels", "wide_logits"
    model.graph.inputs[0] = given
    widening = cast(given, FLOAT)
    pixels.replace_all_uses_with(widening.outputs[0])
    model.graph.insert_before(model.graph[0], widening)
    model.graph.append(cast(logits, BFLOAT16, made))
    model.graph.outputs[0] = made
    return model


def test_bfloat16_is_compared_where_a_provider_runs_it(tmp_path: Path) -> None:
    checkpoint = in_precision(checkpoint_of("vit"), "bf16")
    model = in_float_with_casts(checkpoint)
    path = save(model, tmp_path)
    trial = make_trial(checkpoint, dict(parity_cases(checkpoint)), lambda: None)

    def worst() -> float:
        compared = compare(trial, open_session(path), lambda: None)
        assert not compared.failures
        found = compared.found["logits"]
        return max(trial.judge("logits", case, found[case]).strain for case in found)

    assert worst() < 1
    (placement,) = inspect_graphs(path).values()
    assert placement.copies == 0
    case = trial.cases["batch 3"]
    assert first_divergence(checkpoint, path, case) is None

    weight = weight_of(model, "vit.layers.1.mlp.fc2")
    save(model, tmp_path, lambda _: edit(weight, lambda a: np.multiply(a, 1.5, out=a)))
    assert worst() > 1
    found = first_divergence(checkpoint, path, case)
    assert found is not None
    assert found.startswith("vit.layers.1.mlp.fc2"), found
