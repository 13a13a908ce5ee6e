import numpy as np
import pytest
import torch
from torch import Tensor

from calib_data.errors import DataError
from compress.histogram import BINS, Histogram


def of(*parts: Tensor) -> Histogram:
    made = Histogram()
    for part in parts:
        made.add(part)
    return made


def same(one: Histogram, other: Histogram) -> bool:
    return one.counts.equal(other.counts) and vars(one) | {"counts": 0} == vars(other) | {
        "counts": 0
    }


def values(*shape: int, seed: int = 0) -> Tensor:
    """Return numbers of many magnitudes, both signs."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random) * 10.0 ** torch.randint(
        -4, 3, shape, generator=random
    )


def test_counts_match_numpy() -> None:
    x = values(50_000)
    made = of(x)
    expected = np.histogram(x.double().numpy(), made.edges().numpy())[0]
    assert np.array_equal(made.counts.numpy(), expected)
    assert (made.low, made.high, made.count) == (float(x.min()), float(x.max()), len(x))
    bound = max(-made.low, made.high)
    assert 2 ** (made.exponent - 1) <= bound < 2**made.exponent  # no larger than it must be


def test_growing_moves_no_count() -> None:
    x = values(40_000)
    ordered = x[x.abs().argsort()]  # the range doubles some twenty times
    whole = of(x)
    assert same(of(*ordered.split(500)), whole)
    assert same(of(*ordered.flip(0).split(500)), whole)


def test_values_beside_an_edge_fall_right() -> None:
    edges = of(torch.tensor([3.9])).edges().float()
    beside = torch.cat([edges[1:-1], torch.nextafter(edges[1:-1], torch.tensor(-9.0))])
    tiny = torch.tensor([-1e-30, 1e-30, -1e-44, 0.0, -0.0])
    x = torch.cat([beside, tiny])
    made = of(x)
    expected = np.histogram(x.double().numpy(), made.edges().numpy())[0]
    assert np.array_equal(made.counts.numpy(), expected)
    assert same(of(tiny, beside), made)


@pytest.mark.parametrize("threads", [1, 2, 6])
def test_threads_share_the_work(threads: int) -> None:
    x = values(700, 1001)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        made = of(x)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    expected = np.histogram(x.double().flatten().numpy(), made.edges().numpy())[0]
    assert np.array_equal(made.counts.numpy(), expected)


def test_merged_equals_added() -> None:
    x, y = values(3000), values(2000, seed=1) * 100
    made, larger = of(x), of(y)
    made.merge(larger)
    assert same(made, of(x, y))
    assert same(larger, of(y))  # untouched
    larger.merge(of(x))
    assert same(larger, made)
    made.merge(Histogram())
    assert same(made, larger)


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 3e38])
def test_any_finite_number_can_be_counted(size: float) -> None:
    made = of(torch.tensor([size, -size, size / 3]), torch.ones(2))
    assert made.count == 5
    assert (made.low, made.high) == (min(-torch.tensor(size).item(), 1), max(size, 1)) or size > 1
    assert made.counts.sum() == 5
    assert len(made.edges()) == BINS + 1


def test_no_values_change_nothing() -> None:
    made = of(torch.ones(3), torch.ones(0))
    assert same(made, of(torch.ones(3)))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_no_number_is_refused(value: float) -> None:
    made = of(torch.ones(3))
    with pytest.raises(DataError, match="infinite or not a number"):
        made.add(torch.tensor([0.0, value, 2.0]))
    assert same(made, of(torch.ones(3)))
