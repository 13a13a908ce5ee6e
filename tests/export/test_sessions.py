from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from calib_data.errors import ConfigError, ModelError, ProviderError
from export.sessions import (
    PROVIDERS,
    call,
    complete_feed,
    open_session,
    provider_options,
    run,
)
from tests.export.graphs import cast, checkpoint_of, graph_of, save

BFLOAT16 = ir.DataType.BFLOAT16


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_an_error_and_no_silent_cpu_run(tmp_path: Path) -> None:
    path = save(graph_of("vit"), tmp_path)
    with pytest.raises(ProviderError, match="--provider cpu") as caught:
        open_session(path, "cuda")
    assert caught.value.exit_code == 5
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(
    torch.cuda.is_available() or "CUDAExecutionProvider" not in ort.get_available_providers(),
    reason="only onnxruntime-gpu without a GPU falls back",
)
def test_the_runtime_itself_would_fall_back(tmp_path: Path) -> None:
    path = save(graph_of("vit"), tmp_path)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CUDAExecutionProvider"])
    assert session.get_providers() == ["CPUExecutionProvider"]


def test_missing_provider(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ProviderError, match="install onnxruntime-gpu"):
        open_session(save(graph_of("vit"), tmp_path), "cuda")


def test_unknown_provider(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are cpu, cuda"):
        open_session(tmp_path / "model.onnx", "tpu")


@pytest.mark.parametrize("content", [b"", b"not a graph", None], ids=["empty", "noise", "cut"])
def test_corrupt_graph_is_one_line(content: bytes | None, tmp_path: Path) -> None:
    path = save(graph_of("vit"), tmp_path)
    path.write_bytes(path.read_bytes()[:-5000] if content is None else content)
    with pytest.raises(ModelError, match="cannot be opened by ONNX Runtime") as caught:
        open_session(path)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4
    with pytest.raises(ModelError, match="the graph cannot be opened"):
        open_session(path.read_bytes())
    with pytest.raises(ModelError, match="absent"):
        open_session(tmp_path / "absent.onnx")


def test_outputs_by_name_from_more_inputs_than_needed(tmp_path: Path) -> None:
    session = open_session(save(graph_of("vit"), tmp_path), threads=1)
    sample = checkpoint_of("vit").signature.sample(2)
    found = run(session, {**sample, "labels": torch.zeros(2)})
    assert set(found) == {"logits"}
    again = run(session, {k: v.numpy() for k, v in sample.items()})
    assert np.array_equal(again["logits"], found["logits"])


def test_who_compares_gets_float32_products() -> None:
    for provider in ("cpu", "cuda"):
        assert provider_options(provider) == [(PROVIDERS[provider], {})]
    assert provider_options("tensorrt", False, {"trt_fp16_enable": "1"}) == [
        (PROVIDERS["tensorrt"], {"trt_fp16_enable": "1"}),
        (PROVIDERS["cuda"], {"use_tf32": "0"}),
    ]
    assert provider_options("cuda", tf32=False) == [(PROVIDERS["cuda"], {"use_tf32": "0"})]
    assert provider_options("cpu", tf32=False) == [(PROVIDERS["cpu"], {})]


def halved(folder: Path) -> Path:
    """Write a graph from bfloat16 to bfloat16 that also takes an offset and gives float32."""
    x = ir.val("pixel_values", BFLOAT16, ["batch", 3])
    offset = ir.val("offset", ir.DataType.FLOAT, [3])
    half, whole = ir.val("half", BFLOAT16, ["batch", 3]), ir.val("whole", ir.DataType.FLOAT)
    wide = cast(x, ir.DataType.FLOAT)
    nodes = [wide, ir.node("Add", [wide.outputs[0], offset], outputs=[whole])]
    nodes.append(cast(whole, BFLOAT16, half))
    graph = ir.Graph([x, offset], [half, whole], nodes=nodes, opset_imports={"": 23})
    return save(ir.Model(graph, ir_version=10), folder)


def test_bfloat16_goes_in_as_any_floats_and_comes_out_as_float32(tmp_path: Path) -> None:
    session = open_session(halved(tmp_path))
    x = torch.tensor([[1.0, -2.5, 3.14159], [0.0, 1e30, 7e-20]])
    rounded = x.bfloat16().float().numpy()
    offset = np.zeros(3, np.float32)
    for given in (x, x.bfloat16(), x.numpy(), x.numpy().astype(ml_dtypes.bfloat16)):
        found = run(session, {"pixel_values": given, "offset": offset})
        assert {name: value.dtype for name, value in found.items()} == {
            "half": np.float32,
            "whole": np.float32,
        }
        np.testing.assert_array_equal(found["half"], rounded)
    assert set(run(session, {"pixel_values": x, "offset": offset}, ["half"])) == {"half"}
    transposed = x.T.bfloat16().T  # not contiguous
    found = run(session, {"pixel_values": transposed, "offset": offset})
    np.testing.assert_array_equal(found["half"], rounded)


def test_a_bfloat16_output_outlives_its_session(tmp_path: Path) -> None:
    session = open_session(halved(tmp_path))
    feed = complete_feed(session, {"pixel_values": torch.ones(2, 3), "offset": np.ones(3, "f")})
    half, _ = call(session, feed)
    del session
    assert half.dtype == ml_dtypes.bfloat16
    assert (half == 2).all()
    assert half.flags.writeable


def test_settings_reach_the_session(tmp_path: Path) -> None:
    session = open_session(save(graph_of("vit"), tmp_path), threads=1, optimize=False)
    options = session.get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL
