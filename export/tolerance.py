"""The rule of the gate: how large an error is, and how large the model's own rounding lets it be.

With y the PyTorch model in float64:

- float: error(graph) ≤ FLOAT × the error of PyTorch in float32, for the root mean square of every case
  and output and for its largest element, which is held to PyTorch's largest of all cases. A correct
  graph does the same arithmetic in another order, so its error is PyTorch's own up to a small factor.
- half precision: the same with HALF, against PyTorch in the same precision.
- int8: the noise of the graph against that of the PyTorch simulation, pooled over all cases, up to
  NOISE. Elementwise comparison does not fit there: a difference of one rounding error flips a
  quantization step, and the flips of one layer cause more in the next. With fixed steps that is the
  bound for what padding may change in a row as well, though mostly it changes nothing: where a flip
  happens in one run and not in the other, a deep model makes noise of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

FLOAT = 4.0
HALF = 2.0
NOISE = 1.25

Errors = tuple[float, float]  # root mean square, largest


@dataclass(frozen=True)
class Expected:
    """One output of one case: its float64 value and how far off PyTorch is, rounding as it does."""

    y: np.ndarray
    own: Errors  # of the model in its own precision, int8 weights taken as floats
    noise: Errors  # of the model as it is: another one only where it is int8


def errors(found: np.ndarray, y: np.ndarray) -> Errors:
    """Return (root mean square, largest) difference; infinite where shapes or NaN differ."""
    if found.shape != y.shape:
        return float("inf"), float("inf")
    if y.size == 0:
        return 0.0, 0.0
    difference = found.astype(np.float64).ravel()  # a copy: logits are large, so work in place
    difference -= y.ravel()
    if not np.isfinite(difference).all():
        return float("inf"), float("inf")
    rms = float(np.sqrt(np.vdot(difference, difference) / difference.size))
    return rms, float(np.abs(difference, out=difference).max())


def allowed_errors(
    y: np.ndarray, own: np.ndarray, factor: float, dtype: torch.dtype = torch.float32
) -> Errors:
    """Return the errors that a graph may have against y where PyTorch gives `own`."""
    rms, largest = errors(own, y)
    step, peak = _floor(y, dtype)
    return factor * max(rms, step), factor * max(largest, peak)


def allowances(
    cases: Mapping[str, Expected], factor: float, dtype: torch.dtype = torch.float32
) -> dict[str, Errors]:
    """Return the errors allowed in each case of one output.

    PyTorch may happen to be nearly exact where a case has few numbers, so its error over all cases
    together, and one rounding step of what the output is like, count as well; for the largest error
    that is the largest of all cases. A row that a norm blows up carries the rounding of a few sums
    alone, and of two such errors one is more than four times the other in one row of six.
    """
    numbers = [max(expected.y.size, 1) for expected in cases.values()]
    own = [expected.own[0] for expected in cases.values()]
    pooled = float(np.sqrt(np.average(np.square(own), weights=numbers)))
    largest = max(expected.own[1] for expected in cases.values())
    floors = [_floor(expected.y, dtype) for expected in cases.values()]
    step, peak = (max(floor[i] for floor in floors) for i in (0, 1))
    return {
        name: (
            factor * max(expected.own[0], pooled, step),
            factor * max(largest, 3 * pooled, peak),
        )
        for name, expected in cases.items()
    }


def pooled_errors(found: list[Errors]) -> Errors:
    """Return the root mean square of the root mean squares, and the largest of the largest."""
    return float(np.sqrt(np.mean([rms**2 for rms, _ in found]))), max(e for _, e in found)


def _floor(y: np.ndarray, dtype: torch.dtype) -> Errors:
    """Return one rounding step of y's typical and of its largest value."""
    if y.size == 0:
        return 0.0, 0.0
    eps, flat = torch.finfo(dtype).eps, y.ravel()
    return eps * float(np.sqrt(np.vdot(flat, flat) / y.size)), eps * float(max(y.max(), -y.min()))
