"""The rule of the gate: how far a graph may be from its source, given how rounding moves that.

y is the source in float64. Several runs of the source round at random (`export.rounding`), and the
root mean square of their errors is the scale S: of a case, of each row in it, and of a row's
largest number. A case that is off by less than its S is passed; else it is looked at closely, with
DRAWS runs, and then may be off by q × S:

- For a row or a number, q is a quantile of Student's t: that of the ratio of two errors which hang
  on one rounding each, the worst that can happen, with S known from DRAWS runs.
- The error of a whole case is made of many roundings and varies less. How much less is seen in the
  draws: where their squares vary as those of ν independent errors would (Satterthwaite 1946), q² is
  a quantile of Fisher's F with ν and ν × DRAWS degrees of freedom. ν is taken at the low end of what
  so few draws leave open.

The quantiles are chosen so that of healthy graphs at most the share FALSE_ALARMS is refused, over
all that is compared in one graph. Errors of a careful runtime are below those of the draws, so the
true rate is far below.

An error in every case need not reach q × S in any, so the ratios are also judged together: their
geometric mean may not pass the same quantile of its own distribution, which is narrow.

No figure here belongs to a model, a machine or a runtime. Int8 graphs as they ship are compared by
their noise alone: a difference of one rounding error flips a quantization step, and the flips of
one layer cause more in the next, so that elementwise comparison does not fit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy import special, stats

FALSE_ALARMS = 1e-4
FIRST_DRAWS, DRAWS = 3, 16  # runs that every case gets, and those where the first leave a doubt
_DOUBT = 1e-3  # that the draws' spread shows more independent errors than there are
HOPELESS = 100.0  # times its bound: what is beyond after the first draws is so after all
NOISE = 1.25

Errors = tuple[float, float]  # root mean square, largest


@dataclass(frozen=True)
class Deviation:
    """How far an array is from y: as a whole, and row by row along its last axis."""

    rms: float
    rows: np.ndarray  # (rows,) root mean square of each
    peaks: np.ndarray  # (rows,) largest of each

    @property
    def errors(self) -> Errors:
        """Root mean square and largest of all."""
        return self.rms, float(self.peaks.max(initial=0.0))


def deviation(found: np.ndarray, y: np.ndarray) -> Deviation:
    """Return how far `found` is from `y`; infinitely where shapes differ, or what is not finite.

    Where y itself is infinite the same infinity is no difference, and NaN none where y is NaN.
    """
    if found.shape != y.shape:
        return Deviation(math.inf, np.array([math.inf]), np.array([math.inf]))
    if y.size == 0:
        return Deviation(0.0, np.zeros(0), np.zeros(0))
    rows = y.reshape(-1, y.shape[-1] if y.ndim > 1 else 1)
    difference = found.astype(np.float64).reshape(rows.shape)  # a copy: logits are large
    if not np.isfinite(rows).all():
        same = (difference == rows) | (np.isnan(difference) & np.isnan(rows))
        difference[same & ~np.isfinite(rows)] = 0.0
        rows = np.where(same & ~np.isfinite(rows), 0.0, rows)
    with np.errstate(invalid="ignore"):
        difference -= rows
    np.nan_to_num(difference, copy=False, nan=math.inf, posinf=math.inf, neginf=math.inf)
    squares = np.einsum("ij,ij->i", difference, difference) / rows.shape[1]
    peaks = np.abs(difference, out=difference).max(axis=1)
    return Deviation(float(np.sqrt(squares.mean())), np.sqrt(squares), peaks)


def errors(found: np.ndarray, y: np.ndarray) -> Errors:
    """Return (root mean square, largest) difference; see `deviation`."""
    return deviation(found, y).errors


def pooled_errors(found: Sequence[Errors]) -> Errors:
    """Return the root mean square of the root mean squares, and the largest of the largest."""
    return float(np.sqrt(np.mean([rms**2 for rms, _ in found]))), max(e for _, e in found)


@dataclass
class Scale:
    """How far rounding moves one output of one case: root mean squares over the draws so far."""

    floor: Deviation  # one rounding of y: the draws may happen to be exact
    _squares: list[np.ndarray] = field(default_factory=list)
    _cases: list[float] = field(default_factory=list)  # of each draw, the mean square of all

    def add(self, draw: Deviation) -> None:
        """Take one more run into account."""
        new = [np.array([draw.rms]) ** 2, draw.rows**2, draw.peaks**2]
        self._squares = [a + b for a, b in zip(self._squares, new)] if self.draws else new
        self._cases.append(draw.rms**2)

    @property
    def draws(self) -> int:
        """How many runs are in it."""
        return len(self._cases)

    @property
    def freedom(self) -> float:
        """Of how many independent errors the draws vary as if they were made, seen cautiously."""
        mean = np.mean(self._cases)
        if not mean:
            return 1.0
        left = self.draws - 1
        spread = np.var(self._cases, ddof=1) / mean**2 * left / stats.chi2.ppf(_DOUBT, left)
        return float(max(2 / max(spread, 1e-9) - 2 / self.draws, 1.0))

    @property
    def rms(self) -> float:
        """Of the case as a whole."""
        return float(self._root(0, np.array([self.floor.rms]))[0])

    @property
    def rows(self) -> np.ndarray:
        """Of each row."""
        return self._root(1, self.floor.rows)

    @property
    def peaks(self) -> np.ndarray:
        """Of the largest number of each row."""
        return self._root(2, self.floor.peaks)

    @property
    def finite(self) -> bool:
        """Whether all draws were."""
        return all(np.isfinite(squares).all() for squares in self._squares)

    def _root(self, index: int, floor: np.ndarray) -> np.ndarray:
        root: np.ndarray = np.maximum(np.sqrt(self._squares[index] / self.draws), floor)
        return root


def scale_for(y: np.ndarray, dtype: torch.dtype) -> Scale:
    """Return the scale of an output whose true value is `y`, without a draw yet."""
    unit = torch.finfo(dtype).eps / 2
    finite = np.where(np.isfinite(y), y, 0.0) if y.size and not np.isfinite(y).all() else y
    of_y = deviation(np.zeros_like(finite), finite)
    return Scale(Deviation(unit * of_y.rms, unit * of_y.rows, unit * of_y.peaks))


@dataclass(frozen=True)
class Finding:
    """Three errors of one output of one case with what is allowed: of all, of a number, of a row."""

    rms: float
    rms_allowed: float
    largest: float
    largest_allowed: float
    row: float = 0.0  # the root mean square of the row that is nearest to its bound
    row_allowed: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether all are within bounds (NaN is not)."""
        return all(error <= allowed for error, allowed in self.pairs)

    @property
    def strain(self) -> float:
        """The largest of error / allowed: above 1 where one is out of bounds."""
        return max(float(_strains(np.array(e), np.array(a))) for e, a in self.pairs)

    @property
    def pairs(self) -> tuple[tuple[float, float], ...]:
        """Each error with what is allowed."""
        return (
            (self.rms, self.rms_allowed),
            (self.largest, self.largest_allowed),
            (self.row, self.row_allowed),
        )


def finding(found: Deviation, scale: Scale, comparisons: int) -> Finding:
    """Return the errors found beside those allowed; of rows and numbers, the nearest to its bound.

    `comparisons` is how many numbers are judged in the graph altogether.
    """
    q = quantile(comparisons)
    rms_allowed = scale.rms * (
        case_quantile(comparisons, scale.freedom) if scale.draws >= DRAWS else 1
    )
    if found.rows.shape != scale.rows.shape:
        return Finding(math.inf, rms_allowed, math.inf, 0.0)
    largest = _nearest(found.peaks, q * scale.peaks)
    return Finding(found.rms, rms_allowed, *largest, *_nearest(found.rows, q * scale.rows))


def _nearest(found: np.ndarray, allowed: np.ndarray) -> tuple[float, float]:
    if not found.size:
        return 0.0, 0.0
    index = int(_strains(found, allowed).argmax())
    return float(found[index]), float(allowed[index])


def _strains(found: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Return found / allowed; 0 for 0 of 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        share = found / allowed
    return np.where(found == 0, 0.0, np.nan_to_num(share, nan=math.inf, posinf=math.inf))


def quantile(comparisons: int, false_alarms: float = FALSE_ALARMS / 2, draws: int = DRAWS) -> float:
    """Return how many times its scale an error may be, so that few of `comparisons` pass it."""
    return float(stats.t.isf(false_alarms / (2 * max(comparisons, 1)), draws))


def case_quantile(comparisons: int, freedom: float) -> float:
    """Return the same for the error of a case that varies as `freedom` independent ones do."""
    rate = FALSE_ALARMS / 2 / max(comparisons, 1)
    return float(max(np.sqrt(stats.f.isf(rate, freedom, freedom * DRAWS)), 1.0))


def together(ratios: Sequence[float], outputs: int) -> tuple[float, float]:
    """Return the geometric mean of error / scale over the cases of an output, and its bound.

    The logarithm of the ratio of two errors that hang on one rounding each, one of them known from
    FIRST_DRAWS runs, has this mean and variance (half the logarithm of Fisher's F); `outputs` is how
    many such means are judged in the graph.
    """
    logs = np.log(np.maximum(ratios, np.finfo(float).tiny))
    mean = 0.5 * (_mean_log(1) - _mean_log(FIRST_DRAWS))
    variance = 0.25 * (special.polygamma(1, 0.5) + special.polygamma(1, FIRST_DRAWS / 2))
    z = stats.norm.isf(FALSE_ALARMS / (2 * max(outputs, 1)))
    bound = mean + z * math.sqrt(float(variance) / len(ratios))
    return float(np.exp(logs.mean())), math.exp(bound)


def _mean_log(freedom: int) -> float:
    """Return the mean of the logarithm of a mean of `freedom` squared normal numbers."""
    return float(special.digamma(freedom / 2)) - math.log(freedom / 2)
