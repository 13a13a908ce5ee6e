"""Which range of values a few levels should cover, chosen from a histogram.

Four ways, from what keeps every value to what keeps the usual ones finest:

- `minmax`: all values.
- `percentile`: a share of them, the same number cut off at both ends.
- `mse`: the range whose levels are nearest to the values, by their mean squared distance.
- `entropy`: the range after which the values are distributed most like before (Migacz 2017, "8-bit
  inference with TensorRT", GPU Technology Conference): for each range that is tried, let P be the
  histogram inside it with what is outside added to its outermost bins, and Q the histogram inside it
  with the bins of a level made equal where they are not empty; the least Kullback–Leibler divergence
  Σ P log(P / Q) wins.

A range always contains zero, so that zero, and padding, stay exact. A symmetric one is −bound … bound.
"""

import math

import torch
from torch import Tensor

from calib_data.errors import DataError
from compress.histogram import Histogram

_ZERO = 2.0**-100  # ranges below it are those of zeros: their steps would be no normal float32
_PER_LEVEL = 8  # values that a histogram needs for each level, for its shape to mean something
_TRIED = 256  # ranges for the entropy
_OCTAVES = 10  # the least range tried is a thousandth of the largest


def choose_range(
    histogram: Histogram, ranges: str, percentile: float, levels: int, symmetric: bool
) -> tuple[float, float]:
    """Return the (low, high) for `levels` equal steps to cover, low ≤ 0 ≤ high; (0, 0) for zeros.

    `ranges` is the way to choose it, `percentile` the share in percent of the values that the way of
    that name keeps. Raises `DataError` where there are too few values for the way.
    """
    if not histogram.count:
        raise DataError("there is no value to choose a range from; give more data")
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if max(-low, high) < _ZERO:
        return 0.0, 0.0
    if ranges != "minmax" and histogram.low < histogram.high:
        if ranges == "percentile":
            low, high = _by_percentile(histogram, percentile, symmetric)
        elif ranges == "entropy":
            low, high = _by_entropy(histogram, levels, symmetric)
        else:
            low, high = _by_error(histogram, levels, symmetric)
    bound = max(-low, high)
    return (-bound, bound) if symmetric else (low, high)


def _by_percentile(histogram: Histogram, percentile: float, symmetric: bool) -> tuple[float, float]:
    outside = 1 - percentile / 100
    cut = outside if symmetric else outside / 2  # at one end
    # the tolerance: 1 − 0.9999 is a little more or less than a ten-thousandth
    needed = math.ceil(1 / cut - 1e-6) if cut else 1
    _require(histogram, needed, f"a percentile of {percentile:g}")
    counts, edges = histogram.counts.double(), histogram.edges()
    if symmetric:
        half = len(counts) // 2
        magnitudes = counts[half:] + counts[:half].flip(0)
        bound = min(
            _quantile(magnitudes, edges[half:], 1 - cut), max(-histogram.low, histogram.high)
        )
        return -bound, bound
    low, high = (_quantile(counts, edges, share) for share in (cut, 1 - cut))
    return min(max(low, histogram.low), 0.0), max(min(high, histogram.high), 0.0)


def _quantile(counts: Tensor, edges: Tensor, share: float) -> float:
    """Return the value below which `share` of the values are, taken as even within a bin."""
    reached = counts.cumsum(0)
    wanted = share * float(reached[-1])
    index = min(int(torch.searchsorted(reached, wanted)), len(counts) - 1)
    before = float(reached[index] - counts[index])
    inside = (wanted - before) / float(counts[index]) if counts[index] else 0.0
    return float(edges[index] + inside * (edges[index + 1] - edges[index]))


def _by_entropy(histogram: Histogram, levels: int, symmetric: bool) -> tuple[float, float]:
    _require(histogram, _PER_LEVEL * levels, "the entropy")
    counts = histogram.counts.double()
    half = len(counts) // 2
    used = counts.nonzero()
    down, up = half - int(used[0]), int(used[-1]) + 1 - half  # bins below and above zero
    if symmetric:
        down = up = max(down, up)
    down, up = max(down, 0), max(up, 0)
    # fewer bins than levels tell nothing of what the levels lose
    first = next((n for n in range(1, max(down, up)) if min(n, down) + min(n, up) >= levels), None)
    if first is None:
        return histogram.low, histogram.high
    best, divergence = max(down, up), math.inf
    for n in torch.linspace(first, max(down, up), _TRIED).long().unique().tolist():
        found = _divergence(counts, half - min(n, down), half + min(n, up), levels)
        if found <= divergence:
            best, divergence = n, found
    width = histogram.width
    low, high = -min(best, down) * width, min(best, up) * width
    return min(max(low, histogram.low), 0.0), max(min(high, histogram.high), 0.0)


def _divergence(counts: Tensor, start: int, end: int, levels: int) -> float:
    """Return the divergence for the bins `start` … `end` of `counts`, in nats."""
    inside = counts[start:end]
    p = inside.clone()
    p[0] += counts[:start].sum()
    p[-1] += counts[end:].sum()
    level = torch.arange(len(inside)) * levels // len(inside)
    filled = (inside > 0).double()
    sums = torch.zeros(2, levels, dtype=torch.float64)
    sums.index_add_(1, level, torch.stack([inside, filled]))
    q = (sums[0] / sums[1].clamp(min=1))[level] * filled
    # where only values from outside came to lie, Q is half a value rather than nothing
    q = torch.where(p > 0, q.clamp(min=0.5), q)
    p, q = p / p.sum(), q / q.sum()
    return float(torch.xlogy(p, p / q.clamp(min=torch.finfo(q.dtype).tiny)).sum())


def _by_error(histogram: Histogram, levels: int, symmetric: bool) -> tuple[float, float]:
    """Return the range with the least squared error: all pairs of shares, then ever finer around one.

    Shares go by factors, as outliers may lie hundreds of times further out than the rest.
    """
    errors = _Errors(histogram, levels, symmetric)
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if symmetric:
        low, high = 0.0, max(-low, high)
    fineness = 2 if low < 0 < high else 24  # one end alone is soon searched
    steps = torch.arange(-_OCTAVES * fineness, 1, dtype=torch.float64)
    found = errors.best((low, high), 2.0 ** (steps / fineness), (low, high))
    for fineness in (6, 24, 96):
        near = 2.0 ** (torch.arange(-3, 4, dtype=torch.float64) / fineness)
        found = errors.best(found, near, (low, high))
    return found


class _Errors:
    """The squared errors of ranges, from sums over all bins below each: a look-up per level."""

    def __init__(self, histogram: Histogram, levels: int, symmetric: bool) -> None:
        self._levels, self._symmetric = levels, symmetric
        self._width = histogram.width
        counts, centres = histogram.counts.double(), histogram.centres()
        self._half = len(counts) // 2
        powers = torch.stack([counts, counts * centres, counts * centres.square()])
        self._below = torch.nn.functional.pad(powers.cumsum(1), (1, 0))  # (3, BINS + 1)

    def best(
        self, ends: tuple[float, float], shares: Tensor, limits: tuple[float, float]
    ) -> tuple[float, float]:
        """Return the best of the ranges whose low and high are any `shares` of those in `ends`."""
        low, high = (
            (end * shares).clamp(min=limits[0], max=limits[1]) if end else torch.zeros(1).double()
            for end in ends
        )
        pairs = torch.cartesian_prod(low, high)
        lows, highs = pairs.unbind(1)
        errors = self.of(-highs if self._symmetric else lows, highs)
        return tuple(pairs[int(errors.argmin())].tolist())

    def of(self, lows: Tensor, highs: Tensor) -> Tensor:
        """Return the summed squared error of each range, (ranges,), each bin's values at its middle."""
        steps = ((highs - lows) / (self._levels - 1)).unsqueeze(1)
        places = (
            torch.arange(self._levels, dtype=torch.float64) - (-lows.unsqueeze(1) / steps).round()
        )
        values = places * steps  # (ranges, levels)
        between = (values[:, 1:] - steps / 2) / self._width + self._half - 0.5
        inner = between.ceil().clamp(0, 2 * self._half).long()
        ends = torch.nn.functional.pad(inner, (1, 0))
        ends = torch.nn.functional.pad(ends, (0, 1), value=2 * self._half)
        count, first, second = (part[ends].diff(dim=1) for part in self._below)
        return (second - 2 * values * first + values.square() * count).sum(1)


def _require(histogram: Histogram, needed: int, what: str) -> None:
    if histogram.count < needed:
        raise DataError(
            f"{what} needs {needed} values to choose a range by, and there are {histogram.count}; "
            "give more data, or choose --ranges minmax"
        )
