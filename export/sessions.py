"""ONNX Runtime sessions that are what they were asked to be."""

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
from onnx import TensorProto

from calib_data.errors import ConfigError, ModelError, ProviderError

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
BFLOAT16 = "tensor(bfloat16)"
_FLOATS: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    BFLOAT16: ml_dtypes.bfloat16,
}


def provider_options(
    provider: str, tf32: bool = True, settings: Mapping[str, str] | None = None
) -> list[tuple[str, dict[str, str]]]:
    """Return the providers of a session with their options, to which `settings` add.

    CUDA multiplies float32 in TF32, with 10 bits of mantissa for 23, unless it is told not to. What
    TensorRT cannot run goes to CUDA.
    """
    options = {"use_tf32": "0"} if provider != "cpu" and not tf32 else {}
    if provider == "tensorrt":
        return [(PROVIDERS[provider], dict(settings or {})), (PROVIDERS["cuda"], options)]
    return [(PROVIDERS[provider], {**options, **(settings or {})})]


def open_session(
    model: Path | bytes,
    provider: str = "cpu",
    threads: int | None = None,
    optimize: bool = True,
    tf32: bool = True,
    settings: Mapping[str, str] | None = None,
) -> ort.InferenceSession:
    """Return a session on exactly the provider asked for.

    ONNX Runtime opens a session for CUDA on a machine without one and runs it on the CPU without a
    word; here that is a `ProviderError`. `threads` pins the threads inside an operator; without `tf32`
    float32 products are float32's on every provider, which whoever compares wants; `settings` are more
    options of the provider. Raises `ModelError` for a graph that cannot be read.
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
    if provider != "cpu" and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # finds CUDA and cuDNN in torch's packages
    source = model if isinstance(model, bytes) else str(model)
    try:
        session = ort.InferenceSession(source, options, provider_options(provider, tf32, settings))
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


def run(
    session: ort.InferenceSession, inputs: Mapping[str, Any], names: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """Return the session's outputs by name, all or those in `names`, for what it takes of `inputs`.

    A decoder's cache may be left out, which is an empty one, and so may its positions. What is
    bfloat16 goes in as tensors of it or as any floats, and comes out as float32.
    """
    names = names or [item.name for item in session.get_outputs()]
    found = call(session, complete_feed(session, inputs), names)
    return {name: widened(value) for name, value in zip(names, found)}


def widened(array: np.ndarray) -> np.ndarray:
    """Return bfloat16 as float32, which holds it exactly; anything else as it is."""
    return array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array


def call(
    session: ort.InferenceSession,
    feed: Mapping[str, np.ndarray],
    names: Sequence[str] | None = None,
) -> list[np.ndarray]:
    """Return the session's outputs, all or those in `names`, for a complete feed.

    ONNX Runtime neither takes nor gives a NumPy array of bfloat16, so that graphs with such inputs
    or outputs run on its own values; here they are arrays of ml_dtypes' bfloat16.
    """
    if not any(item.type == BFLOAT16 for item in (*session.get_inputs(), *session.get_outputs())):
        found: list[np.ndarray] = session.run(names, feed)
        return found
    values = {name: value_of(array) for name, array in feed.items()}
    return [array_of(value) for value in session.run_with_ort_values(names, values)]


def value_of(array: np.ndarray, device: str = "cpu") -> ort.OrtValue:
    """Return an array as a value in a device's memory; one of bfloat16, in the host's."""
    if array.dtype == ml_dtypes.bfloat16:
        bits = array.view(np.uint16)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array, device, 0)


def array_of(value: ort.OrtValue) -> np.ndarray:
    """Return a copy of a value in the host's memory, bfloat16 too."""
    array: np.ndarray
    if value.data_type() != BFLOAT16:
        array = value.numpy()
        return array
    data = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    array = np.frombuffer(bytearray(data), ml_dtypes.bfloat16).reshape(value.shape())
    return array


def complete_feed(
    session: ort.InferenceSession, inputs: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Return the entries of `inputs` that the session takes, with an empty cache where it has none."""
    feed = {
        item.name: _array(inputs[item.name], item.type)
        for item in session.get_inputs()
        if item.name in inputs
    }
    return feed | _start(session, feed)


def _array(value: Any, kind: str) -> np.ndarray:
    """Return a tensor or an array as an array for an input of this type."""
    if kind != BFLOAT16:
        return np.asarray(value, order="C")
    if hasattr(value, "float"):  # a tensor: only PyTorch converts its own bfloat16
        value = value.float()
    return np.asarray(value, order="C").astype(ml_dtypes.bfloat16)


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
            made[item.name] = zeros((feed["input_ids"].shape[0], heads, 0, width), item)
        else:
            raise ModelError(f"the graph takes {item.name}, and the inputs hold {', '.join(feed)}")
    return made


def zeros(shape: tuple[int, ...], item: ort.NodeArg) -> np.ndarray:
    """Return zeros of the type of `item`, a cache; a `ModelError` where that is no float type."""
    if item.type not in _FLOATS:
        raise ModelError(f"the cache {item.name} is {item.type}; known are {', '.join(_FLOATS)}")
    return np.zeros(shape, _FLOATS[item.type])
