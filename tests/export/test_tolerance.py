import numpy as np
import pytest
import torch

from export.tolerance import Expected, allowances, allowed_errors, errors, pooled_errors

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


def test_half_precision_has_a_coarser_step() -> None:
    coarse = allowed_errors(Y, Y, 1.0, torch.float16)
    assert coarse[1] == pytest.approx(4 * torch.finfo(torch.float16).eps)


def expected(*numbers: float, own: tuple[float, float]) -> Expected:
    return Expected(np.array(numbers), own, own)


def test_case_that_happens_to_be_exact_is_allowed_the_usual_error() -> None:
    cases = {
        "usual": expected(1.0, 2.0, 3.0, own=(1e-3, 5e-3)),
        "exact": expected(1.0, own=(0.0, 0.0)),
        "bad": expected(1.0, 1.0, own=(2e-3, 2e-3)),
    }
    found = allowances(cases, 4.0)
    pooled = ((3 * 1e-6 + 2 * 4e-6) / 6) ** 0.5
    assert found["exact"] == pytest.approx((4 * pooled, 20e-3))
    assert found["usual"] == pytest.approx((4 * pooled, 20e-3))
    assert found["bad"] == pytest.approx((8e-3, 20e-3))
    alike = {name: expected(1.0, own=(1e-3, 1e-3)) for name in "ab"}  # few numbers: no tail seen
    assert allowances(alike, 4.0)["a"] == pytest.approx((4e-3, 12e-3))


def test_allowance_of_an_exact_output_is_its_step() -> None:
    eps = np.finfo(np.float32).eps
    found = allowances({"a": expected(2.0, -2.0, own=(0.0, 0.0))}, 4.0)
    assert found["a"] == pytest.approx((8 * eps, 8 * eps))


def test_pooled_errors_known_values() -> None:
    assert pooled_errors([(3.0, 5.0), (4.0, 4.5)]) == pytest.approx((12.5**0.5, 5.0))
    assert pooled_errors([(float("inf"), float("inf")), (0.0, 0.0)])[0] == float("inf")
