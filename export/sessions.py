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
    """Return the session's outputs by name for the entries of `inputs` that it takes.

    A decoder's cache may be left out, which is an empty one, and so may its positions.
    """
    names = [item.name for item in session.get_outputs()]
    return dict(zip(names, session.run(names, complete_feed(session, inputs))))


def complete_feed(
    session: ort.InferenceSession, inputs: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Return the entries of `inputs` that the session takes, with an empty cache where it has none."""
    feed = {
        item.name: np.asarray(inputs[item.name], order="C")
        for item in session.get_inputs()
        if item.name in inputs
    }
    return feed | _start(session, feed)


def positions_from(mask: np.ndarray, sequence: int) -> np.ndarray:
    """Return the positions (batch, sequence) of the last tokens under `mask` (batch, total).

    Padding does not count; where it stands itself, the position is 0.
    """
    positions: np.ndarray = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, mask.shape[1] - sequence :]
    return positions


def _start(session: ort.InferenceSession, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return an empty cache and the positions, as far as the session takes them and `feed` has none."""
    made: dict[str, np.ndarray] = {}
    for item in session.get_inputs():
        if item.name in feed:
            continue
        if item.name == "position_ids":
            ids, mask = feed["input_ids"], feed["attention_mask"]
            made[item.name] = positions_from(mask, ids.shape[1])
        elif item.name == "use_cache_branch":
            made[item.name] = np.array([False])
        elif item.name.startswith("past_key_values."):
            _, heads, _, width = item.shape
            kind = np.float16 if item.type == "tensor(float16)" else np.float32
            made[item.name] = np.zeros((feed["input_ids"].shape[0], heads, 0, width), kind)
        else:
            raise ModelError(f"the graph takes {item.name}, and the inputs hold {', '.join(feed)}")
    return made


def session_predict(session: ort.InferenceSession) -> "Predict":
    """Return `run` on `session` as what metrics take."""
    return lambda batch: run(session, batch)
