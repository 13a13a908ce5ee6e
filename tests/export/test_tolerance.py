import numpy as np
import pytest

from export.tolerance import allowed_errors, errors

Y = np.array([[1.0, -2.0], [3.0, 4.0]])


def test_errors_known_values() -> None:
    assert errors(Y, Y) == (0, 0)
    assert errors(Y + np.array([[1, 0], [0, -3]]), Y) == pytest.approx(((10 / 4) ** 0.5, 3))
    assert errors(np.zeros((0, 2)), np.zeros((0, 2))) == (0, 0)


@pytest.mark.parametrize("found", [Y[:1], Y.ravel(), Y * np.nan, Y * np.inf])
def test_wrong_shapes_and_values_are_infinitely_wrong(found: np.ndarray) -> None:
    assert errors(found, Y) == (np.inf, np.inf)


def test_allowance_is_the_models_own_error_and_at_least_one_step() -> None:
    assert allowed_errors(Y, Y + 0.5, 4.0) == pytest.approx((2.0, 2.0))
    step = np.finfo(np.float32).eps
    assert allowed_errors(Y, Y, 4.0) == pytest.approx((4 * step * (30 / 4) ** 0.5, 16 * step))
    assert allowed_errors(Y * 0, Y * 0, 4.0) == (0, 0)
