"""Every way of making an int8 graph that `ort_quantizers` compares: ONNX Runtime's and ours.

Each function imports what it needs and returns the work itself, so that `confined` times only that. All
read their calibration data from one file, so that it is the same down to the batches.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.confined import Work
from calib_data.errors import DataError

# name → settings of ONNX Runtime's functions; those with a `method` are static, in QDQ. The first of
# each kind are the defaults; "products" is what careful users set: products alone, a scale per channel.
_PRODUCTS: dict[str, Any] = {"op_types_to_quantize": ["MatMul", "Gemm"], "per_channel": True}
ORT: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "dynamic-products": {**_PRODUCTS, "op_types_to_quantize": ["MatMul", "Gemm", "Gather"]},
    "minmax": {"method": "MinMax"},
    "percentile": {"method": "Percentile"},
    "entropy": {"method": "Entropy"},
    "minmax-products": {"method": "MinMax", **_PRODUCTS},
}
# name → settings of a QuantizeConfig
OURS: dict[str, dict[str, Any]] = {"dynamic": {}, "static": {"scheme": "static"}}


class StoredBatches:
    """Calibration data in a file that `store` wrote: batches by name of input, one read at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with np.load(path, allow_pickle=False) as file:
            self._names = json.loads(str(file["names"]))
            self._count = int(file["count"])
            self.fingerprint = str(file["fingerprint"])

    def __len__(self) -> int:
        return self._count

    def arrays(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield the batches."""
        with np.load(self._path, allow_pickle=False) as file:
            for i in range(self._count):
                yield {name: file[f"{i}/{name}"] for name in self._names}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the batches as tensors."""
        import torch

        for batch in self.arrays():
            yield {name: torch.from_numpy(array) for name, array in batch.items()}


def store(batches: Any, pads: Mapping[str, int], path: Path, length: int) -> None:
    """Write what `batches` hold of the inputs in `pads`, filled up with these values to `length`.

    ONNX Runtime's percentile and entropy methods stack what they see, so that all must have one shape.
    Raises `DataError` for data that lacks an input.
    """
    every = []
    for batch in batches:
        if missing := sorted(set(pads) - set(batch)):
            raise DataError(
                f"the data gives no {', '.join(missing)}; use data for what the model takes"
            )
        every.append({name: np.asarray(batch[name]) for name in pads})  # each (batch, sequence)
    arrays = {
        f"{i}/{name}": np.pad(
            array, ((0, 0), (0, length - array.shape[1])), constant_values=pads[name]
        )
        for i, batch in enumerate(every)
        for name, array in batch.items()
    }
    told = {"names": json.dumps(list(pads)), "fingerprint": batches.fingerprint}
    told_arrays = {name: np.array(value) for name, value in told.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, allow_pickle=False, count=np.array(len(every)), **told_arrays, **arrays)


def by_onnxruntime(graph: Path, target: Path, data: Path, settings: Mapping[str, Any]) -> Work:
    """Return what makes `target` of a float graph, prepared as ONNX Runtime's own guide says."""
    import logging

    from onnxruntime.quantization import CalibrationMethod, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    logging.disable(logging.WARNING)  # the advice to prepare the graph is followed
    given = dict(settings)
    method = given.pop("method", None)

    def work() -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            prepared = Path(folder) / "model.onnx"
            # symbolic shapes: it knows nothing of the operators that the fused graph has
            quant_pre_process(graph, prepared, skip_symbolic_shape=True)
            if method is None:
                quantize_dynamic(prepared, target, **given)
                return
            choice = getattr(CalibrationMethod, method)
            reader = _reader(graph, data)
            quantize_static(prepared, target, reader, calibrate_method=choice, **given)

    return work


def _reader(graph: Path, data: Path) -> Any:
    """Return the stored batches as ONNX Runtime reads them, one for each call."""
    from onnxruntime.quantization import CalibrationDataReader

    from export.sessions import open_session

    taken = [item.name for item in open_session(graph).get_inputs()]

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = StoredBatches(data).arrays()

        def get_next(self) -> Any:
            batch = next(self._batches, None)
            return batch and {name: batch[name] for name in taken}

    return Reader()


def by_onnxpress(model: str, target: Path, data: Path, settings: Mapping[str, Any]) -> Work:
    """Return what makes the checkpoint `target` of a model, as `compress quantize` does."""
    from compress.checkpoint import save_checkpoint
    from compress.files import staged_directory
    from compress.loading import open_checkpoint
    from compress.quantize import quantize
    from compress.quantize_config import QuantizeConfig

    config = QuantizeConfig(**settings)

    def work() -> None:
        batches = StoredBatches(data) if config.needs_data else None
        with staged_directory(target, overwrite=True) as staging:
            save_checkpoint(quantize(open_checkpoint(model), config, batches).checkpoint, staging)

    return work


def exported(model: str, target: Path) -> Work:
    """Return what exports a checkpoint, gate included, to the bundle `target`."""
    from compress.loading import open_checkpoint
    from export.graph import ExportConfig
    from export.publish import export_onnx

    return lambda: export_onnx(open_checkpoint(model), target, ExportConfig(), overwrite=True)


def exported_plainly(model: str, target: Path) -> Work:
    """Return what writes the graph that PyTorch's own exporter makes."""
    from benchmarks.exporters import export_plainly
    from compress.loading import open_checkpoint

    def work() -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        export_plainly(open_checkpoint(model), target)

    return work
