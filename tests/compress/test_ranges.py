import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from calib_data.errors import DataError
from compress.histogram import Histogram
from compress.ranges import choose_range

WAYS = ("minmax", "percentile", "mse", "entropy")


def histogram(x: Tensor) -> Histogram:
    made = Histogram()
    made.add(x)
    return made


def chosen(
    x: Tensor, ranges: str, symmetric: bool = False, percentile: float = 99.9
) -> tuple[float, float]:
    return choose_range(histogram(x), ranges, percentile, 255 if symmetric else 256, symmetric)


def draw(kind: str, count: int = 30_000) -> Tensor:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(count, generator=random)
    if kind == "gelu":
        return torch.nn.functional.gelu(2 * x)
    if kind == "relu":
        return x.relu()
    if kind == "negative":
        return -x.abs() - 0.1
    if kind == "outliers":  # a few numbers, a hundred times as large
        x[::1000] *= 100
    if kind == "shifted":
        return x + 3
    return x


KINDS = ("normal", "gelu", "relu", "negative", "outliers", "shifted")


def squared_error(x: Tensor, low: float, high: float, levels: int) -> float:
    """Return the mean squared error of rounding x as `QuantizeLinear` does."""
    step = (high - low) / (levels - 1)
    zero = round(-low / step)
    rounded = ((x.double() / step).round() + zero).clamp(0, levels - 1)
    return float(((rounded - zero) * step - x.double()).square().mean())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranges", WAYS)
def test_range_holds_zero_and_no_more_than_the_values(
    ranges: str, kind: str, symmetric: bool
) -> None:
    x = draw(kind)
    low, high = chosen(x, ranges, symmetric)
    assert low <= 0 <= high
    assert low < high
    if symmetric:
        assert low == -high
        assert high <= float(x.abs().max())
    else:
        assert low >= min(float(x.min()), 0)
        assert high <= max(float(x.max()), 0)


def test_minmax_is_exact() -> None:
    x = draw("normal")
    assert chosen(x, "minmax") == (float(x.min()), float(x.max()))
    assert chosen(x, "minmax", symmetric=True)[1] == float(x.abs().max())


@pytest.mark.parametrize("percentile", [60, 99, 99.9, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_percentile_is_that_of_numpy(kind: str, percentile: float) -> None:
    x = draw(kind)
    width = histogram(x).width
    low, high = chosen(x, "percentile", percentile=percentile)
    rest = (100 - percentile) / 2
    expected = np.percentile(x.double().numpy(), [rest, 100 - rest], method="inverted_cdf")
    assert low == pytest.approx(min(expected[0], 0), abs=1.01 * width)
    assert high == pytest.approx(max(expected[1], 0), abs=1.01 * width)
    bound = chosen(x, "percentile", True, percentile)[1]
    magnitude = np.percentile(x.double().abs().numpy(), percentile, method="inverted_cdf")
    assert bound == pytest.approx(magnitude, abs=1.01 * width)


@pytest.mark.parametrize("kind", KINDS)
def test_error_is_as_small_as_a_search_finds_it(kind: str) -> None:
    x = draw(kind)
    shares = np.concatenate([np.geomspace(0.004, 0.2, 20), np.linspace(0.2, 1, 41)])
    lows = min(float(x.min()), 0) * (shares if x.min() < 0 else np.ones(1))
    highs = max(float(x.max()), 0) * (shares if x.max() > 0 else np.ones(1))
    some = x[:: max(1, len(x) // 3000)] if kind != "outliers" else x
    pairs = sorted(itertools.product(lows, highs), key=lambda pair: squared_error(some, *pair, 256))
    best = min(squared_error(x, *pair, 256) for pair in pairs[:60])
    assert squared_error(x, *chosen(x, "mse"), 256) <= 1.02 * best
    bound = float(x.abs().max())
    best = min(squared_error(x, -share * bound, share * bound, 255) for share in shares)
    assert squared_error(x, *chosen(x, "mse", symmetric=True), 255) <= 1.02 * best


def test_error_cuts_off_what_is_rare_where_levels_are_few() -> None:
    x = draw("normal")
    low, high = choose_range(histogram(x), "mse", 99, 16, False)
    # the best clipping of a normal distribution for 4 bits is about 2.5 standard deviations
    assert (low, high) == pytest.approx((-2.5, 2.5), abs=0.3)
    assert squared_error(x, low, high, 16) < 0.6 * squared_error(x, *chosen(x, "minmax"), 16)


def test_error_keeps_a_range_without_outliers() -> None:
    x = torch.linspace(-1, 3, 10_001)
    assert chosen(x, "mse") == pytest.approx((-1, 3), rel=0.01)


def divergence(counts: list[int], start: int, end: int, levels: int) -> float:
    """Return Σ P log(P / Q) by the formula, bin by bin."""
    inside = counts[start:end]
    p = [float(count) for count in inside]
    p[0] += sum(counts[:start])
    p[-1] += sum(counts[end:])
    q = [0.0] * len(inside)
    for level in range(levels):
        bins = [i for i in range(len(inside)) if i * levels // len(inside) == level]
        filled = [i for i in bins if inside[i]]
        for i in filled:
            q[i] = sum(inside[j] for j in bins) / len(filled)
    q = [max(b, 0.5) if a else b for a, b in zip(p, q)]
    return sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q) if a)


@pytest.mark.parametrize("symmetric", [False, True])
def test_entropy_is_as_small_as_a_search_finds_it(symmetric: bool) -> None:
    levels = 8  # few, so that the formula written out takes no minutes
    x = draw("gelu", 4000) * 3 + 0.3
    made = histogram(x)
    counts, half = made.counts.tolist(), len(made.counts) // 2
    low, high = choose_range(made, "entropy", 99, levels, symmetric)
    bins = [round(low / made.width), round(high / made.width)]
    exact = divergence(counts, half + bins[0], half + bins[1], levels)
    used = made.counts.nonzero()
    down, up = half - int(used[0]), int(used[-1]) + 1 - half
    down, up = (max(down, up),) * 2 if symmetric else (down, up)
    tried = range(8, max(down, up), 400)
    others = [divergence(counts, half - min(n, down), half + min(n, up), levels) for n in tried]
    assert exact <= min(others) * 1.02


def test_entropy_leaves_outliers_out() -> None:
    assert chosen(draw("outliers"), "entropy")[1] < 0.5 * float(draw("outliers").max())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.7, -1e-3, 12345.0])
@pytest.mark.parametrize("ranges", WAYS)
def test_constant_is_represented(ranges: str, value: float, symmetric: bool) -> None:
    x = torch.full((5000,), value)
    low, high = chosen(x, ranges, symmetric)
    assert squared_error(x, low, high, 255 if symmetric else 256) < (value / 1000) ** 2


@pytest.mark.parametrize("ranges", WAYS)
@pytest.mark.parametrize("value", [0.0, 1e-44, -1e-38])
def test_zeros_have_no_range(ranges: str, value: float) -> None:
    x = torch.zeros(5000)
    x[7] = value
    assert chosen(x, ranges) == (0, 0)


@pytest.mark.parametrize(
    ("ranges", "symmetric", "needed"),
    [("percentile", False, 2000), ("percentile", True, 1000), ("entropy", False, 2048)],
)
def test_too_few_values_are_refused(ranges: str, symmetric: bool, needed: int) -> None:
    x = draw("normal", needed - 1)
    with pytest.raises(DataError, match=f"needs {needed} values .* there are {needed - 1}"):
        chosen(x, ranges, symmetric)
    chosen(draw("normal", needed), ranges, symmetric)


def test_no_values_are_refused() -> None:
    with pytest.raises(DataError, match="no value"):
        choose_range(Histogram(), "minmax", 99, 256, False)


def test_few_values_suffice_for_the_others() -> None:
    x = torch.tensor([-0.5, 1.0])
    for ranges in ("minmax", "mse"):
        assert chosen(x, ranges) == pytest.approx((-0.5, 1.0), rel=0.01)
