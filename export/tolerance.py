"""How large an error is, and how large the model's own rounding lets it be."""

import numpy as np


def errors(found: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return (root mean square, largest) difference; infinite where shapes or NaN differ."""
    if found.shape != y.shape:
        return float("inf"), float("inf")
    difference = np.abs(found.astype(np.float64) - y)
    if not np.isfinite(difference).all():
        return float("inf"), float("inf")
    if difference.size == 0:
        return 0.0, 0.0
    return float(np.sqrt(np.mean(difference**2))), float(difference.max())


def allowed_errors(y: np.ndarray, own: np.ndarray, factor: float) -> tuple[float, float]:
    """Return the (root mean square, largest) error that a float graph may have against y.

    `own` is what float32 PyTorch gives; where it happens to be exact, one rounding step of the
    output's typical and largest value stands in.
    """
    rms, largest = errors(own, y)
    step = float(np.finfo(np.float32).eps)
    typical, peak = errors(y, np.zeros_like(y))
    return factor * max(rms, step * typical), factor * max(largest, step * peak)
