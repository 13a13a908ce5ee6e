import os
import time
from collections.abc import Callable

import numpy as np

from benchmarks.confined import GIB, confined, out_of_memory
from calib_data.errors import DataError


def fill(gibibytes: float) -> Callable[[], object]:
    return lambda: np.ones(int(gibibytes * GIB), np.uint8)


def fail(error: Exception) -> Callable[[], object]:
    def work() -> None:
        raise error

    return work


def crash() -> Callable[[], object]:
    return os.abort


def sleep(before: float, during: float) -> Callable[[], object]:
    time.sleep(before)
    return lambda: time.sleep(during)


def test_time_and_memory_of_the_work_are_told() -> None:
    found = confined(sleep, 0.3, 0.1)
    assert found.failure is None
    assert found.seconds is not None
    assert 0.1 <= found.seconds < 0.3, "what comes before the work was timed too"
    large = confined(fill, 0.25)
    assert found.peak_bytes is not None
    assert large.peak_bytes is not None
    assert large.peak_bytes > max(0.25 * GIB, found.peak_bytes)


def test_memory_is_limited() -> None:
    assert confined(fill, 4.0, memory=2 * GIB).failure == out_of_memory(2 * GIB)
    wrapped = RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc")
    assert confined(fail, wrapped).failure == "out of memory at 8 GB"


def test_an_error_is_told_on_one_line() -> None:
    assert confined(fail, ValueError("two\nlines")).failure == "ValueError: two lines"
    assert confined(fail, DataError("no rows")).failure == "no rows"


def test_a_process_that_dies_or_does_not_end_is_told() -> None:
    found = confined(crash)
    assert found.failure == "its process crashed (SIGABRT) under a limit of 8 GB"
    assert confined(sleep, 0, 60, seconds=0.3).failure == "not done in 0.005 minutes"
