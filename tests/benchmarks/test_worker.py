import os
from pathlib import Path

import numpy as np
import pytest

from benchmarks.runtimes import Place, find_runtime
from benchmarks.worker import Variant, Worker, WorkerError, resident_peak
from calib_data.errors import ConfigError, ProviderError

FAKES = "tests.benchmarks.fakes:"


def test_a_worker_loads_times_and_predicts() -> None:
    inputs = {"input_ids": np.array([[1, 2], [3, 4]])}
    with Worker(
        Variant("fake", "sleep=0.001,factor=2", FAKES + "steady"), Place(threads=1)
    ) as worker:
        assert worker.load().providers == ("fake:1",)
        assert 3 <= worker.warm_up([inputs], 0.0).calls <= 4
        assert worker.warm_up([inputs], 60.0).settled
        assert len(worker.time([inputs], seconds=60, most=5)) == 5
        times = worker.time([inputs], seconds=0.01)
        assert sum(times[:-1]) < 0.01 <= sum(times)
        assert worker.timed_outputs()["output"].tolist() == [[6, 2], [14, 6]]
        assert worker.predict({"input_ids": inputs["input_ids"] + 1})["output"][0, 1] == 4
        assert 10e6 < worker.peak_memory() < 1e9
        process = worker._process
    assert not process.is_alive()


def test_failures_are_told_and_a_model_that_raised_can_go_on() -> None:
    inputs = {"input_ids": np.ones((1, 2))}
    with Worker(Variant("raising", "x", FAKES + "raising")) as worker:
        worker.load()
        with pytest.raises(WorkerError, match=r"^RuntimeError: the weights are bad$"):
            worker.predict(inputs)
        assert worker.peak_memory() > 0
    with Worker(Variant("dying", "x", FAKES + "dying")) as worker:
        worker.load()
        for _ in range(2):  # once by its death, once by being dead
            with pytest.raises(WorkerError, match="killed"):
                worker.predict(inputs)
    with Worker(Variant("providerless", "x", FAKES + "providerless"), Place("cuda")) as worker:
        with pytest.raises(ProviderError, match="cuda is not there") as caught:
            worker.load()
        assert caught.value.exit_code == 5


def test_peak_memory_is_a_high_water_mark() -> None:
    block = b"x" * 80_000_000
    peak = resident_peak()
    del block
    assert peak > 80_000_000
    assert resident_peak() > peak - 5_000_000  # the kernel counts in batches of pages


def test_an_unknown_runtime_is_named() -> None:
    for name in ("tensorflow", "os:nothing"):
        with pytest.raises(ConfigError, match=f"{name}.*pytorch, compiled, onnx"):
            find_runtime(name)


def test_no_heavy_import_and_threads_in_the_child(tmp_path: Path) -> None:
    """The worker of a graph must not hold PyTorch: its memory is a figure of the report."""
    probe = tmp_path / "probe_runtime.py"
    probe.write_text(
        "import os, sys\n"
        "import numpy as np\n"
        "from benchmarks.runtimes import Loaded, Runtime\n"
        "def run(batch):\n"
        "    heavy = [name for name in ('torch', 'transformers') if name in sys.modules]\n"
        "    threads = int(os.environ['OMP_NUM_THREADS'])\n"
        "    return {'heavy': np.array([len(heavy)]), 'threads': np.array([threads])}\n"
        "probe = Runtime(None, lambda *_: Loaded(dict, run, dict, ()))\n"
    )
    paths = os.environ.get("PYTHONPATH", "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), paths]))
        patch.syspath_prepend(str(tmp_path))
        with Worker(Variant("probe", "x", "probe_runtime:probe"), Place(threads=3)) as worker:
            worker.load()
            found = worker.predict({})
    assert found["heavy"].tolist() == [0]
    assert found["threads"].tolist() == [3]
