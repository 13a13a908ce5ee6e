"""How often a tensor's values fall where: a histogram that grows with them and keeps none of them."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor

from calib_data.errors import DataError

BINS = 8192
_HALF = BINS // 2
# of the smallest range: below it, values are as good as zero, and bins a float32 could not index
_SMALLEST = -100
_CHUNK = 1 << 17  # values counted at a time: they stay in the cache
_THREAD_CHUNK = 1 << 15  # by one of several threads: torch starts no threads of its own for so few
_DEVICE_CHUNK = 1 << 24  # elsewhere than on the CPU


class Histogram:
    """Counts of values in `BINS` equal bins over −2**exponent … 2**exponent, with the exact extremes.

    Growing doubles the range: pairs of bins become one, and no edge moves. Where a value falls is
    computed exactly as well (the width of a bin is a power of two), so the counts are always those of
    a histogram with the final range from the start, in whatever order the values came.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self.exponent = _SMALLEST
        self.low, self.high = math.inf, -math.inf

    @property
    def count(self) -> int:
        """How many values were seen."""
        return int(self.counts.sum())

    @property
    def width(self) -> float:
        """The width of a bin."""
        return 2.0**self.exponent / _HALF

    def edges(self) -> Tensor:
        """Return the bins' edges, (BINS + 1,) float64, ascending; a bin holds its lower one."""
        return torch.arange(-_HALF, _HALF + 1, dtype=torch.float64) * self.width

    def centres(self) -> Tensor:
        """Return the middle of each bin, (BINS,) float64."""
        return self.edges()[:-1] + self.width / 2

    def add(self, values: Tensor, extremes: tuple[float, float] | None = None) -> None:
        """Count `values`, float32 of any shape; `extremes` are the smallest and largest, if known.

        Raises `DataError` where a value is infinite or not a number.
        """
        if not values.numel():
            return
        flat = values.detach().reshape(-1)
        if extremes is None:
            low, high = torch.aminmax(flat)
            extremes = float(low), float(high)
        if not all(map(math.isfinite, extremes)):
            raise DataError("a value is infinite or not a number")
        self._include(*extremes)
        self.counts += _counted(flat, 1 / self.width).cpu()

    def merge(self, other: "Histogram") -> None:
        """Count all that `other` has counted."""
        if other.count:
            self._include(other.low, other.high)
            self.counts += other._counts_at(self.exponent)

    def _include(self, low: float, high: float) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)
        # frexp: |value| < 2**exponent, the smallest such
        exponent = max(math.frexp(max(-self.low, self.high))[1], self.exponent)
        self.counts, self.exponent = self._counts_at(exponent), exponent

    def _counts_at(self, exponent: int) -> Tensor:
        """Return the counts in the bins of the larger range 2**exponent."""
        doublings = min(exponent - self.exponent, 62)
        if not doublings:
            return self.counts
        bins = (torch.arange(-_HALF, _HALF) >> doublings) + _HALF
        return torch.zeros_like(self.counts).index_add_(0, bins, self.counts)


def _counted(flat: Tensor, scale: float) -> Tensor:
    """Return the counts (BINS,) int64 of `flat` × `scale`, rounded down, from −BINS / 2 on."""
    if flat.device.type != "cpu":
        return _count_serially(flat, scale, _DEVICE_CHUNK)
    # torch.bincount takes one thread, whatever their number. Two shares at once gain nothing on two
    # cores, where torch's own second thread still spins for a while after each of its operators.
    workers = min(torch.get_num_threads() // 2, -(-len(flat) // _CHUNK))
    if workers <= 1:
        with _one_thread():
            return _count_serially(flat, scale, _CHUNK)
    shares = flat.split(-(-len(flat) // workers))
    count: Callable[[Tensor], Tensor] = partial(_count_serially, scale=scale, chunk=_THREAD_CHUNK)
    return torch.stack(list(_workers(workers).map(count, shares))).sum(0)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch to this thread: to wake others takes longer than their part of a chunk."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _count_serially(flat: Tensor, scale: float, chunk: int) -> Tensor:
    counts = torch.zeros(BINS, dtype=torch.int64, device=flat.device)
    size = min(chunk, len(flat))
    scaled = torch.empty(size, dtype=torch.float32, device=flat.device)
    bins = torch.empty(size, dtype=torch.int16, device=flat.device)
    for part in flat.split(size):
        if len(part) < size:
            scaled, bins = scaled[: len(part)], bins[: len(part)]
        # a power of two times a float32, and its floor, are exact; a shift by a half might not be
        torch.mul(part, scale, out=scaled).floor_()
        counts += torch.bincount(bins.copy_(scaled).add_(_HALF), minlength=BINS)
    return counts


@cache
def _workers(number: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(number, "histogram")
