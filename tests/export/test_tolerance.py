import numpy as np
import pytest
import torch
from scipy import stats

from export.tolerance import (
    DRAWS,
    FALSE_ALARMS,
    FIRST_DRAWS,
    Scale,
    deviation,
    errors,
    finding,
    pooled_errors,
    quantile,
    scale_for,
    together,
)

Y = np.array([[1.0, -2.0], [3.0, 4.0]])


def test_errors_known_values() -> None:
    assert errors(Y, Y) == (0, 0)
    assert errors(Y + np.array([[1, 0], [0, -3]]), Y) == pytest.approx(((10 / 4) ** 0.5, 3))
    assert errors(np.zeros((0, 2)), np.zeros((0, 2))) == (0, 0)


@pytest.mark.parametrize("found", [Y[:1], Y.ravel(), Y * np.nan, Y * np.inf])
def test_wrong_shapes_and_values_are_infinitely_wrong(found: np.ndarray) -> None:
    assert errors(found, Y) == (np.inf, np.inf)


def test_rows_run_along_the_last_axis() -> None:
    away = deviation(Y + np.array([[3.0, 4.0], [0.0, -2.0]]), Y)
    assert away.rows == pytest.approx([12.5**0.5, 2**0.5])
    assert away.peaks == pytest.approx([4.0, 2.0])


def test_the_same_infinity_or_nan_is_no_difference() -> None:
    y = np.array([[np.inf, 1.0, np.nan], [-np.inf, 2.0, 3.0]])
    assert errors(y.copy(), y) == (0.0, 0.0)
    assert errors(-y, y)[1] == np.inf
    assert errors(np.nan_to_num(y), y)[1] == np.inf


def test_pooled_errors_known_values() -> None:
    assert pooled_errors([(3.0, 5.0), (4.0, 4.5)]) == pytest.approx((12.5**0.5, 5.0))
    assert pooled_errors([(float("inf"), float("inf")), (0.0, 0.0)])[0] == float("inf")


def scale_of(y: np.ndarray, *draws: np.ndarray) -> Scale:
    scale = scale_for(y, torch.float32)
    for draw in draws:
        scale.add(deviation(draw, y))
    return scale


def test_scale_is_the_root_mean_square_over_draws_and_at_least_one_rounding() -> None:
    scale = scale_of(Y, Y + 3.0, Y + 4.0)
    assert scale.rms == pytest.approx(12.5**0.5)
    assert scale.rows == pytest.approx([12.5**0.5] * 2)
    unit = np.finfo(np.float32).eps / 2
    exact = scale_of(Y, Y)
    assert exact.rms == pytest.approx(unit * (30 / 4) ** 0.5)
    assert exact.peaks == pytest.approx([2 * unit, 4 * unit])
    half = scale_for(Y, torch.float16)
    half.add(deviation(Y, Y))
    assert half.peaks[1] == pytest.approx(4 * torch.finfo(torch.float16).eps / 2)


def test_a_draw_that_is_not_finite_is_seen() -> None:
    assert scale_of(Y, Y + 1).finite
    assert not scale_of(Y, Y + 1, Y * np.nan).finite


def test_error_in_a_quiet_row_is_found() -> None:
    """What vanishes beside the error of all is seen in its row, which rounding hardly moves."""
    y = np.array([[1e4, -1e4], [1.0, 2.0]])
    noise = np.array([[1.0, -1.0], [1e-4, 1e-4]])
    scale = scale_of(y, y + noise, y - noise)
    away = finding(deviation(y + np.array([[0.0, 0.0], [0.01, 0.0]]), y), scale, 10)
    assert away.rms < 0.01 * away.rms_allowed
    assert not away.passed
    assert away.row > away.row_allowed


def test_quantile_keeps_the_promised_rate() -> None:
    """Against the definition: of `n` ratios of normal errors, at most that share passes it."""
    n, rate = 50, 0.01
    q = quantile(n, rate, DRAWS)
    random = np.random.default_rng(0)
    found = np.abs(random.standard_normal((20_000, n)))
    scales = np.sqrt(np.mean(random.standard_normal((DRAWS, 20_000, n)) ** 2, axis=0))
    refused = float(np.mean((found > q * scales).any(axis=1)))
    assert stats.binom.cdf(refused * 20_000, 20_000, rate) > 0.001  # not far below either
    assert stats.binom.sf(refused * 20_000, 20_000, rate) > 0.001


def test_errors_in_every_case_are_judged_together() -> None:
    random = np.random.default_rng(0)
    rates = []
    for factor in (1.0, 4.0):
        refused = 0
        for _ in range(2000):
            ratios = np.abs(random.standard_normal(20)) * factor
            ratios /= np.sqrt(np.mean(random.standard_normal((FIRST_DRAWS, 20)) ** 2, axis=0))
            mean, bound = together(list(ratios), 2)
            refused += mean > bound
        rates.append(refused / 2000)
    assert rates[0] <= 10 * FALSE_ALARMS
    assert rates[1] > 0.5
    assert together([0.0, 1.0], 1)[0] < 1e-100
