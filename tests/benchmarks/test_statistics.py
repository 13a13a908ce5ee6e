import numpy as np
import pytest
from scipy import stats

from benchmarks import statistics


def test_settled_needs_two_windows_and_equal_medians() -> None:
    assert not statistics.settled([1, 1, 1, 1, 1])
    assert statistics.settled([9, 5, 2, 1.02, 1, 1, 1, 1.01, 1])
    assert not statistics.settled([2, 2, 2, 1, 1, 1])
    assert statistics.settled([1, 1, 1, 1, 50, 1])  # one outlier does not prolong the warm-up


def test_typical_interval_matches_scipy_where_rounds_are_single_calls() -> None:
    values = np.random.default_rng(0).gamma(4, size=60)
    ours = statistics.typical_interval([[v] for v in values], seed=0, resamples=4000)
    theirs = stats.bootstrap(
        (values,), np.median, method="percentile", n_resamples=4000, rng=1
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), rel=0.03)


def test_typical_interval_widens_with_drift_between_rounds() -> None:
    random = np.random.default_rng(0)
    steady = [(1 + 0.01 * random.normal(size=50)).tolist() for _ in range(8)]
    drifting = [[v * (1 + 0.05 * i) for v in calls] for i, calls in enumerate(steady)]
    low, high = statistics.typical_interval(steady, seed=0)
    assert low <= 1.002
    assert high >= 0.998
    drift_low, drift_high = statistics.typical_interval(drifting, seed=0)
    assert drift_high - drift_low > 10 * (high - low)


def test_typical_interval_is_seeded_and_without_spread_a_point() -> None:
    assert statistics.typical_interval([[2.0, 2.0]] * 6, seed=3) == (2.0, 2.0)
    rounds = np.random.default_rng(1).random((6, 9)).tolist()
    first = statistics.typical_interval(rounds, seed=3)
    assert first == statistics.typical_interval(rounds, seed=3)


def test_round_ratios_cancel_drift() -> None:
    drift = [1.0, 1.5, 0.7, 3.0, 1.0, 2.0]
    fast = [[d, d, 9 * d] for d in drift]
    slow = [[2 * d] * 3 for d in drift]
    assert statistics.round_ratios(fast, slow) == pytest.approx([2.0] * 6)


@pytest.mark.parametrize(("n", "dropped"), [(6, 0), (8, 0), (9, 1), (10, 1), (12, 2), (20, 5)])
def test_sign_interval_matches_the_tables(n: int, dropped: int) -> None:
    values = list(range(n))
    assert statistics.sign_interval(values) == (dropped, n - 1 - dropped)
    # the sign test rejects one value further in, and not this one
    assert stats.binomtest(dropped, n).pvalue <= 0.05 < stats.binomtest(dropped + 1, n).pvalue


def test_too_few_rounds_have_no_interval() -> None:
    with pytest.raises(ValueError, match="7 values cannot give an interval of 99%"):
        statistics.sign_interval([1.0] * 7, 0.99)
    with pytest.raises(ValueError, match="5 values"):
        statistics.sign_interval([1.0] * 5)


def test_equal_models_show_no_difference_and_slower_ones_do() -> None:
    random = np.random.default_rng(7)
    false, found = 0, 0
    for _ in range(200):
        drift = 1 + 0.3 * random.random((10, 1))
        noise = [(drift * random.lognormal(0, 0.04, (10, 20))).tolist() for _ in range(3)]
        slower = [[1.05 * v for v in calls] for calls in noise[2]]
        base = noise[0]
        for rounds, counter in ((noise[1], "same"), (slower, "slower")):
            different = statistics.is_different(statistics.round_ratios(rounds, base))
            false += different and counter == "same"
            found += different and counter == "slower"
    assert false <= 10
    assert found >= 180


def test_paired_interval_matches_scipy() -> None:
    random = np.random.default_rng(0)
    baseline = random.random(200)
    values = baseline - 0.1 + 0.05 * random.normal(size=200)
    low, high = statistics.paired_interval(values.tolist(), baseline.tolist(), seed=0)
    theirs = stats.bootstrap((values - baseline,), np.mean, method="percentile", rng=1)
    assert low == pytest.approx(theirs.confidence_interval.low, abs=0.001)
    assert high == pytest.approx(theirs.confidence_interval.high, abs=0.001)


def test_rank_correlation_matches_scipy() -> None:
    left, right = np.random.default_rng(0).integers(0, 9, (2, 50))
    expected = stats.spearmanr(left, right).statistic
    assert statistics.rank_correlation(left, right) == pytest.approx(expected)
    assert statistics.rank_correlation(left, np.ones(50)) == 0


def test_row_cosines() -> None:
    left = np.array([[[1.0, 0.0]], [[1.0, 1.0]], [[0.0, 0.0]], [[0.0, 0.0]]], dtype=np.float32)
    right = np.array([[[0.0, 2.0]], [[3.0, 3.0]], [[0.0, 0.0]], [[1.0, 0.0]]], dtype=np.float32)
    assert statistics.row_cosines(left, right) == pytest.approx([0, 1, 1, 0])
