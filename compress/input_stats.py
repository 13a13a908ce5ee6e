"""What came into a layer, in sums that take the same room however much it was."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compress.histogram import Histogram
from compress.ranges import choose_range


@dataclass(frozen=True)
class InputStats:
    """What came into a layer at the positions that are no padding."""

    low: float
    high: float
    channel_max: Tensor  # (in,) the largest magnitude of each channel
    channel_mean: Tensor  # (in,) float64
    moment: Tensor | None  # (in, in) Σ x xᵀ / count, float32, where it was asked for
    count: int  # vectors seen
    histogram: Histogram = field(repr=False, compare=False)
    _chosen: dict[tuple[object, ...], tuple[float, float]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def range(
        self, ranges: str, percentile: float, levels: int, symmetric: bool
    ) -> tuple[float, float]:
        """Return the (low, high) that `levels` steps should cover; see `choose_range`."""
        asked = (ranges, percentile, levels, symmetric)
        if asked not in self._chosen:  # a search for layers to leave in float asks again and again
            self._chosen[asked] = choose_range(self.histogram, *asked)
        return self._chosen[asked]


# what is summed over vectors → how two such sums become one
_COMBINED: Mapping[str, Callable[..., Tensor]] = {
    "lowest": torch.minimum,  # (in,)
    "highest": torch.maximum,  # (in,)
    "sum": torch.add,  # (in,) float64
    "products": torch.add,  # (in, in) Σ x xᵀ, where moments are asked for
}


class Tally:
    """What is kept of the vectors that came into a layer: of a fixed size, on the CPU."""

    def __init__(self, moments: bool = False) -> None:
        self.histogram = Histogram()
        self.count = 0
        self._moments = moments
        self._sums: dict[str, Tensor] = {}

    def add(self, vectors: Tensor) -> None:
        """Count `vectors` (n, in), wherever they are.

        Raises `DataError` where one of their numbers is not finite.
        """
        if not len(vectors):
            return
        vectors = vectors.detach().float().contiguous()
        sums = {
            "lowest": vectors.amin(0).cpu(),
            "highest": vectors.amax(0).cpu(),
            "sum": vectors.sum(0).double().cpu(),
        }
        if self._moments:
            sums["products"] = (vectors.T @ vectors).cpu()
        extremes = float(sums["lowest"].min()), float(sums["highest"].max())
        self.histogram.add(vectors, extremes)
        self._include(sums, len(vectors))

    def merge(self, other: "Tally") -> None:
        """Count all that `other` has counted."""
        self.histogram.merge(other.histogram)
        self._include(other._sums, other.count)

    def _include(self, sums: Mapping[str, Tensor], count: int) -> None:
        for name, value in sums.items():
            if name in self._sums:
                _COMBINED[name](self._sums[name], value, out=self._sums[name])
            else:
                self._sums[name] = value.clone()  # the other's stay its own
        self.count += count

    def stats(self) -> InputStats:
        """Return what there is to tell; at least one vector must have come."""
        sums = self._sums
        return InputStats(
            low=self.histogram.low,
            high=self.histogram.high,
            channel_max=torch.maximum(sums["lowest"].abs(), sums["highest"].abs()),
            channel_mean=sums["sum"] / self.count,
            moment=sums["products"] / self.count if self._moments else None,
            count=self.count,
            histogram=self.histogram,
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all of it as tensors by name, and plain values."""
        made = self.histogram
        plain = {"count": self.count, "exponent": made.exponent, "low": made.low, "high": made.high}
        return {**self._sums, "counts": made.counts}, plain

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> "Tally":
        """Make a tally of what `state` returned."""
        made = cls("products" in tensors)
        made.count = int(plain["count"])
        made._sums = {name: value for name, value in tensors.items() if name in _COMBINED}
        made.histogram.counts = tensors["counts"]
        made.histogram.exponent = int(plain["exponent"])
        made.histogram.low, made.histogram.high = float(plain["low"]), float(plain["high"])
        return made
