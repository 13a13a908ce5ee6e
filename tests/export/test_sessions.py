from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from calib_data.errors import ConfigError, ModelError, ProviderError
from export.sessions import open_session, run, session_predict
from tests.export.graphs import checkpoint_of, graph_of, save


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
    again = session_predict(session)({k: v.numpy() for k, v in sample.items()})
    assert np.array_equal(again["logits"], found["logits"])


def test_settings_reach_the_session(tmp_path: Path) -> None:
    session = open_session(save(graph_of("vit"), tmp_path), threads=1, optimize=False)
    options = session.get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL
