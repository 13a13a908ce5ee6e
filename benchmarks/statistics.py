"""What the timings say: medians, percentiles, intervals, and whether a difference is one."""

from collections.abc import Callable, Sequence
from math import comb

import numpy as np

LEVEL = 0.95
CERTAIN = 0.99  # at which a difference is one: of a hundred comparisons of equals one may say so
MINIMUM_ROUNDS = 6  # fewer signs than this cannot reach 95 %: 2 · 2⁻⁵ > 0.05
DECISIVE_ROUNDS = 8  # the same at 99 %: 2 · 2⁻⁷ > 0.01

Rounds = Sequence[Sequence[float]]  # seconds per call, one inner sequence per round


def settled(seconds: Sequence[float], window: int = 3, tolerance: float = 0.05) -> bool:
    """Return whether warm-up is over: the medians of the last two windows differ by under 5 %."""
    if len(seconds) < 2 * window:
        return False
    before = float(np.median(seconds[-2 * window : -window]))
    return abs(float(np.median(seconds[-window:])) - before) < tolerance * before


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile, interpolated linearly between the closest ranks."""
    return float(np.percentile(values, percent))


def pooled(rounds: Rounds) -> list[float]:
    """Return the calls of all rounds as one list."""
    return [second for calls in rounds for second in calls]


def typical(calls: Sequence[float] | np.ndarray, ragged: bool = False) -> float:
    """Return what a call takes: the median, or the mean where inputs of several lengths were called."""
    return float(np.mean(calls) if ragged else np.median(calls))


def typical_interval(
    rounds: Rounds, *, seed: int, ragged: bool = False, resamples: int = 2000
) -> tuple[float, float]:
    """Return the 95 % interval of `typical` over all calls, in the unit of the input.

    Percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13).
    Whole rounds are drawn, not calls: the calls of one round share the machine's mood, and drawing
    them singly would claim more independent evidence than there is (ibid., ch. 8).
    """
    random = np.random.default_rng(seed)
    arrays = [np.asarray(calls, dtype=np.float64) for calls in rounds]
    draws = random.integers(len(arrays), size=(resamples, len(arrays)))
    found = [typical(np.concatenate([arrays[i] for i in draw]), ragged) for draw in draws]
    return _bounds(np.asarray(found))


def round_ratios(rounds: Rounds, baseline: Rounds, ragged: bool = False) -> list[float]:
    """Return per round how many times faster than the baseline: what a call takes there over here.

    Both were timed within seconds of each other, so drift of the machine divides out.
    """
    pairs = zip(rounds, baseline, strict=True)
    return [typical(theirs, ragged) / typical(ours, ragged) for ours, theirs in pairs]


def sign_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Return an interval that holds the median with at least that probability, whatever its law.

    The order statistics that a sign test does not reject (Conover, Practical Nonparametric Statistics,
    3rd ed., 1999, ch. 3.2). Exact for the handful of rounds that a benchmark has, where a bootstrap is
    too narrow; at 95 % one disturbed round in nine does not move it.
    """
    n = len(values)
    if 2 * 2.0**-n > 1 - level:
        raise ValueError(f"{n} values cannot give an interval of {level:.0%}")
    tail, k = 0.0, 0  # k values may be dropped from each end
    while 2 * (tail + comb(n, k) / 2**n) <= 1 - level:
        tail += comb(n, k) / 2**n
        k += 1
    ordered = sorted(values)
    return ordered[k - 1], ordered[n - k]


def is_different(ratios: Sequence[float]) -> bool:
    """Return whether ratios differ from 1 beyond doubt: their interval at 99 % excludes it."""
    low, high = sign_interval(ratios, CERTAIN)
    return not low <= 1 <= high


def precision(rounds: Rounds, baseline: Rounds | None, ragged: bool = False) -> float:
    """Return half of the interval of the ratios to the baseline as a share of their median.

    Without a baseline, of what a call takes.
    """
    if baseline is None:
        value = typical(pooled(rounds), ragged)
        low, high = typical_interval(rounds, seed=0, ragged=ragged, resamples=200)
    else:
        ratios = round_ratios(rounds, baseline, ragged)
        value, (low, high) = percentile(ratios, 50), sign_interval(ratios)
    return (high - low) / (2 * value)


def paired_interval(
    values: Sequence[float] | np.ndarray,
    baseline: Sequence[float] | np.ndarray,
    *,
    seed: int,
    statistic: Callable[[np.ndarray, np.ndarray], float] = lambda values, rows: np.mean(values),
    resamples: int = 1000,
) -> tuple[float, float]:
    """Return the 95 % interval of the difference of a statistic, paired by example.

    Percentile bootstrap over examples. `statistic` is given the values of the drawn examples and
    their rows, so that it can look up what else belongs to them.
    """
    ours, theirs = np.asarray(values, np.float64), np.asarray(baseline, np.float64)
    random = np.random.default_rng(seed)
    draws = (random.integers(len(ours), size=len(ours)) for _ in range(resamples))
    found = [statistic(ours[rows], rows) - statistic(theirs[rows], rows) for rows in draws]
    return _bounds(np.asarray(found))


def row_cosines(outputs: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the cosine between corresponding examples, shape (batch,); two zero rows agree."""
    left = outputs.reshape(len(outputs), -1).astype(np.float64)
    right = reference.reshape(len(reference), -1).astype(np.float64)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    dots = (left * right).sum(axis=1)
    same = (left == right).all(axis=1)
    return np.where(same, 1.0, dots / np.where(norms == 0, 1.0, norms))


def rank_correlation(left: np.ndarray, right: np.ndarray) -> float:
    """Return Spearman's correlation, ties sharing their mean rank; 0 where one side is constant."""
    from scipy.stats import rankdata

    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return 0.0
    return float(np.corrcoef(rankdata(left), rankdata(right))[0, 1])


def _bounds(statistics: np.ndarray) -> tuple[float, float]:
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(statistics, [tail, 100 - tail])
    return float(low), float(high)
