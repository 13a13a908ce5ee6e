from pathlib import Path

import numpy as np
import pytest

from benchmarks import gpus
from benchmarks.bound import BoundSession
from export.sessions import complete_feed, open_session, run
from tests.export.graphs import checkpoint_of, graph_of, save
from tests.export.test_sessions import halved


# The processor records nothing, but the buffers that recorded kernels need are kept all the same.
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_bound_buffers_give_what_a_call_gives(family: str, graphs: bool, tmp_path: Path) -> None:
    session = open_session(save(graph_of(family), tmp_path), threads=1)
    bound = BoundSession(session, "cpu", graphs)
    for seed in (0, 1):
        sample = checkpoint_of(family).signature.sample(2, seed=seed)
        feed = bound.prepare(complete_feed(session, sample))
        for _ in range(2):  # the buffers are used again
            found = bound.collect(bound.run(feed))
        expected = run(session, sample)
        assert set(found) == set(expected)
        for name, values in expected.items():
            assert np.array_equal(found[name], values)


def test_bfloat16_is_bound_too(tmp_path: Path) -> None:
    session = open_session(halved(tmp_path), threads=1)
    values = {"pixel_values": np.ones((2, 3), np.float32), "offset": np.zeros(3, np.float32)}
    bound = BoundSession(session, "cpu")
    found = bound.collect(bound.run(bound.prepare(complete_feed(session, values))))
    expected = run(session, values)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_a_gpu_in_words() -> None:
    line = "NVIDIA H200, 580.95.05, 1980 MHz, 3201 MHz, 700.00 W"
    assert gpus.describe_line(line) == (
        "NVIDIA H200, driver 580.95.05, up to 1980 MHz, memory 3201 MHz, 700.00 W"
    )


def test_where_there_is_no_gpu_nothing_is_told() -> None:
    if gpus.describe() is not None:
        pytest.skip("this machine has a GPU")
    assert gpus.energy_meters() == []
    assert gpus.held_memory(1) is None
