"""What the inputs of a model's layers look like, seen in one pass over calibration data."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from calib_data.errors import DataError
from compress.checkpoint import Checkpoint


class CalibrationData(Protocol):
    """Batches of inputs, and a digest of what they hold."""

    fingerprint: str

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]: ...


@dataclass(frozen=True)
class InputStats:
    """What came into a layer at the positions that are no padding."""

    low: float
    high: float
    channel_max: Tensor  # (in,) the largest magnitude of each channel
    channel_mean: Tensor  # (in,) float64
    moment: Tensor | None  # (in, in) Σ x xᵀ / count, float32, where it was asked for
    count: int  # vectors seen

    def range(
        self, ranges: str, percentile: float, levels: int, symmetric: bool
    ) -> tuple[float, float]:
        """Return the (low, high) that `levels` steps should cover."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        bound = max(-low, high)
        return (-bound, bound) if symmetric else (low, high)


@dataclass(frozen=True)
class Calibration:
    """What calibration saw: statistics by the layer's name, shared where layers share an input."""

    inputs: Mapping[str, InputStats]
    fingerprint: str  # of the data
    samples: int


def calibrate(
    checkpoint: Checkpoint,
    names: Iterable[str],
    batches: CalibrationData,
    *,
    moments: bool = False,
    progress: Callable[[], None] = lambda: None,
    state: Path | None = None,
) -> Calibration:
    """Return what the layers `names` of the checkpoint's backbone are given on `batches`."""
    del state
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        checkpoint.backbone.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].detach().flatten(0, -2).float())
        )
        for name in seen
    ]
    samples = 0
    try:
        for batch in batches:
            checkpoint.predict(batch)
            samples += len(next(iter(batch.values())))
            progress()
    finally:
        for handle in handles:
            handle.remove()
    if not samples:
        raise DataError("there is no calibration batch; give --data at least one row")
    inputs = {}
    for name, parts in seen.items():
        x = torch.cat(parts)
        inputs[name] = InputStats(
            float(x.min()), float(x.max()), x.abs().amax(0), x.double().mean(0),
            (x.T @ x) / len(x) if moments else None, len(x),
        )  # fmt: skip
    return Calibration(inputs, batches.fingerprint, samples)
