"""One process per model: its threads, its memory and its crashes are its own.

Sessions of ONNX Runtime side by side in one process disturb each other, as their thread pools
spin. Here an idle model waits for its turn on a pipe.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import numpy as np

from benchmarks.runtimes import Arrays, Loaded, find_runtime
from benchmarks.statistics import settled
from calib_data.errors import OnnxPressError, ProviderError

MOST_CALLS = 200  # of one `time`: beyond this a report grows and the median does not change
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


class WorkerError(OnnxPressError):
    """A model cannot be measured: it failed, or its process died."""


@dataclass(frozen=True)
class Variant:
    """One thing to measure: its name in the report, where it is, and what runs it."""

    name: str
    model: str
    runtime: str = "onnx"  # a row of `runtimes.RUNTIMES`


@dataclass(frozen=True)
class LoadInfo:
    """What a worker tells of the model it has loaded."""

    seconds: float
    providers: tuple[str, ...]


@dataclass(frozen=True)
class WarmUp:
    """How warm-up went."""

    calls: int
    settled: bool  # by the rule of `statistics.settled`, within the time allowed


class Worker:
    """A process that holds one model. Use as a context manager.

    Every method raises `WorkerError` with the reason where the model fails or its process dies,
    and `ProviderError` where the provider is not obtained.
    """

    def __init__(self, variant: Variant, provider: str = "cpu", threads: int = 1) -> None:
        self.variant = variant
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(theirs, variant, provider, threads),
            name=f"onnxpress-{variant.name}",
            daemon=True,
        )
        self._process.start()
        theirs.close()  # so that a dead child reads as end-of-file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()

    def load(self) -> LoadInfo:
        """Load the model; return what it took."""
        return self._call("load")

    def warm_up(self, inputs: Mapping[str, Any], seconds: float) -> WarmUp:
        """Run until times settle, at least 3 calls and at most about `seconds`."""
        return self._call("warm_up", _arrays(inputs), seconds)

    def time(
        self, inputs: Mapping[str, Any], seconds: float = 0.0, calls: int = MOST_CALLS
    ) -> list[float]:
        """Return the seconds of each call, made until `seconds` or `calls` are reached."""
        return self._call("time", _arrays(inputs), seconds, calls)

    def timed_outputs(self) -> dict[str, np.ndarray]:
        """Return what the last timed call computed."""
        return self._call("timed_outputs")

    def predict(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return the outputs for `batch`: a `Predict` that runs over there."""
        return self._call("predict", _arrays(batch))

    def peak_memory(self) -> int:
        """Return the most bytes of memory that the process has been resident in so far."""
        return self._call("peak_memory")

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            self._pipe.send((method, arguments))
            succeeded, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise WorkerError(self._death()) from error
        if succeeded:
            return value
        of_provider, message = value
        raise ProviderError(message) if of_provider else WorkerError(message)

    def _death(self) -> str:
        self._process.join(5)
        code = self._process.exitcode
        if code == -signal.SIGKILL:
            return (
                "its process was killed, perhaps for want of memory; free some, or shrink --shapes"
            )
        if code is not None and code < 0:
            return f"its process crashed ({signal.Signals(-code).name}); run it alone to see why"
        return f"its process ended with exit code {code}; run it alone to see why"


def _arrays(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    # Arrays travel by value; pickled tensors would share memory and bring PyTorch to the worker.
    return {name: np.asarray(value) for name, value in batch.items()}


# --- in the child --------------------------------------------------------------------------------


def _serve(pipe: Connection, variant: Variant, provider: str, threads: int) -> None:
    """Answer (method, arguments) until None, with (True, result) or (False, (kind, message)).

    The kind says whether the failure is the provider's.
    """
    # Ctrl-C goes to the whole group: the parent ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    model = _Model(variant, provider, threads)
    while True:
        try:
            request = pipe.recv()
        except EOFError:  # the parent is gone
            return
        if request is None:
            return
        method, arguments = request
        try:
            reply = (True, getattr(model, method)(*arguments))
        except Exception as error:  # whatever a model raises is a row of the report
            reply = (False, (isinstance(error, ProviderError), _one_line(error)))
        pipe.send(reply)


class _Model:
    """The child's side of `Worker`, method by method."""

    def __init__(self, variant: Variant, provider: str, threads: int) -> None:
        self.variant, self.provider, self.threads = variant, provider, threads
        self.loaded: Loaded
        self.last: Any = None

    def load(self) -> LoadInfo:
        start = time.perf_counter()
        runtime = find_runtime(self.variant.runtime)
        self.loaded = runtime.open(self.variant.model, self.provider, self.threads)
        return LoadInfo(time.perf_counter() - start, self.loaded.providers)

    def warm_up(self, inputs: Arrays, seconds: float) -> WarmUp:
        deadline = time.perf_counter() + seconds
        spent: list[float] = []
        for spent_now in self._calls(inputs):
            spent.append(spent_now)
            if settled(spent) or (len(spent) >= 3 and time.perf_counter() >= deadline):
                break
        return WarmUp(len(spent), settled(spent))

    def time(self, inputs: Arrays, seconds: float, calls: int) -> list[float]:
        spent: list[float] = []
        timed = self._calls(inputs)
        next(timed)  # untimed: the others have used the caches since this model's last turn
        for spent_now in timed:
            spent.append(spent_now)
            if sum(spent) >= seconds or len(spent) >= calls:
                break
        return spent

    def timed_outputs(self) -> dict[str, np.ndarray]:
        return {name: np.asarray(value) for name, value in self.loaded.collect(self.last).items()}

    def predict(self, batch: Arrays) -> dict[str, np.ndarray]:
        outputs = self.loaded.collect(self.loaded.run(self.loaded.prepare(batch)))
        return {name: np.asarray(value) for name, value in outputs.items()}

    def peak_memory(self) -> int:
        return resident_peak()

    def _calls(self, inputs: Arrays) -> Iterator[float]:
        run, prepared = self.loaded.run, self.loaded.prepare(inputs)
        while True:
            start = time.perf_counter()
            self.last = run(prepared)
            yield time.perf_counter() - start


def resident_peak() -> int:
    """Return the most bytes that this process has been resident in."""
    status = Path("/proc/self/status")
    if status.exists():  # not ru_maxrss: Linux hands the parent's peak down to the child
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    import psutil

    info = psutil.Process().memory_info()
    return getattr(info, "peak_wset", info.rss)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if not isinstance(error, OnnxPressError):  # whose messages say it all
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return text if len(text) <= 300 else text[:299] + "…"
