"""ONNX Runtime sessions that are what they were asked to be."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from calib_data.errors import ConfigError, ModelError, ProviderError

if TYPE_CHECKING:  # a worker that only runs a graph should not carry torch in its memory
    from calib_data.batches import Predict

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def open_session(
    model: Path | bytes,
    provider: str = "cpu",
    threads: int | None = None,
    optimize: bool = True,
) -> ort.InferenceSession:
    """Return a session on exactly the provider asked for.

    ONNX Runtime opens a session for CUDA on a machine without one and runs it on the CPU without a
    word; here that is a `ProviderError`. `threads` pins the threads inside an operator. Raises
    `ModelError` for a graph that cannot be read.
    """
    if provider not in PROVIDERS:
        raise ConfigError(f"unknown provider {provider!r}; there are {', '.join(PROVIDERS)}")
    wanted = PROVIDERS[provider]
    if wanted not in ort.get_available_providers():
        raise ProviderError(
            f"this onnxruntime has no {wanted}; install onnxruntime-gpu, or use --provider cpu"
        )
    options = ort.SessionOptions()
    options.log_severity_level = 4  # a failure raises; its log lines would only repeat it
    options.inter_op_num_threads = 1
    if threads is not None:
        options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if provider == "cuda" and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # finds CUDA and cuDNN in torch's packages
    source = model if isinstance(model, bytes) else str(model)
    try:
        session = ort.InferenceSession(source, options, providers=[wanted])
    except Exception as error:  # the pybind exceptions have no common base
        where = "the graph" if isinstance(model, bytes) else str(model)
        line = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise ModelError(f"{where} cannot be opened by ONNX Runtime: {line}") from error
    if session.get_providers()[0] != wanted:
        raise ProviderError(
            f"{wanted} was asked for and {session.get_providers()[0]} obtained; "
            "check the GPU, its driver and the CUDA libraries, or use --provider cpu"
        )
    return session


def run(session: ort.InferenceSession, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the session's outputs by name for the entries of `inputs` that it takes."""
    feed = {item.name: np.asarray(inputs[item.name]) for item in session.get_inputs()}
    names = [item.name for item in session.get_outputs()]
    return dict(zip(names, session.run(names, feed)))


def session_predict(session: ort.InferenceSession) -> "Predict":
    """Return `run` on `session` as what metrics take."""
    return lambda batch: run(session, batch)
