"""One process per model: its threads, its memory and its crashes are its own.

Sessions of ONNX Runtime side by side in one process disturb each other, as their thread pools
spin. Here an idle model waits for its turn on a pipe, and a turn begins when the spinning is over.
"""

import contextlib
import itertools
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import numpy as np

from benchmarks import gpus
from benchmarks.energy import Meter
from benchmarks.runtimes import NEW, Arrays, GraphUse, Loaded, Place, Tokens, find_runtime
from benchmarks.statistics import settled
from calib_data.errors import OnnxPressError, ProviderError

Inputs = Mapping[str, Any]

# seconds before each turn: threads of the model before spin for 40 ms after its last call, and for
# longer where there are fewer cores than threads
_CALM = 0.1
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

    def __init__(self, variant: Variant, place: Place | None = None) -> None:
        self.variant = variant
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(theirs, variant, place or Place()),
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

    def warm_up(self, calls: Sequence[Inputs], seconds: float) -> WarmUp:
        """Make passes over `calls` until their times settle: 3 at least, at most about `seconds`."""
        return self._call("warm_up", list(map(_arrays, calls)), seconds)

    def time(
        self, calls: Sequence[Inputs], seconds: float = 0.0, most: int = MOST_CALLS
    ) -> list[float]:
        """Return the seconds of each call, of whole passes until `seconds` or `most` are reached."""
        return self._call("time", list(map(_arrays, calls)), seconds, most)

    def timed_outputs(self) -> dict[str, np.ndarray]:
        """Return what the last timed call computed."""
        return self._call("timed_outputs")

    def capacity(self, inputs: Inputs, streams: int, seconds: float) -> float:
        """Return how many calls per second finish where `streams` callers each wait for answers."""
        return self._call("capacity", _arrays(inputs), streams, seconds)

    def arrivals(
        self, inputs: Inputs, streams: int, rate: float, count: int, seed: int
    ) -> list[float]:
        """Return what each of `count` requests takes, in seconds from its arrival.

        They arrive at random, `rate` per second, and up to `streams` are answered at once.
        """
        return self._call("arrivals", _arrays(inputs), streams, rate, count, seed)

    def joules(self) -> float | None:
        """Return the energy of a timed call on average, since the last time this was asked; or None."""
        return self._call("joules")

    def operators(self, shape: tuple[int, int]) -> GraphUse | None:
        """Return what ONNX Runtime makes of the graph at (batch, length), None where it is no graph.

        The graph is opened anew: ask a worker that has not loaded it, for sessions disturb each other.
        """
        return self._call("operators", shape)

    def predict(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return the outputs for `batch`: a `Predict` that runs over there."""
        return self._call("predict", _arrays(batch))

    def peak_memory(self) -> int:
        """Return the most bytes of memory that the process has been resident in so far."""
        return self._call("peak_memory")

    def device_memory(self) -> int | None:
        """Return the bytes that the process holds on GPUs, or None where that is unknown."""
        return self._call("device_memory")

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


def _serve(pipe: Connection, variant: Variant, place: Place) -> None:
    """Answer (method, arguments) until None, with (True, result) or (False, (kind, message)).

    The kind says whether the failure is the provider's.
    """
    # Ctrl-C goes to the whole group: the parent ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(place.threads)))
    model = _Model(variant, place)
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

    def __init__(self, variant: Variant, place: Place) -> None:
        self.variant, self.place = variant, place
        self.loaded: Loaded
        self.last: Any = None
        self.meter = Meter(place.provider)
        self.used = (0.0, 0)  # joules and calls

    def load(self) -> LoadInfo:
        start = time.perf_counter()
        runtime = find_runtime(self.variant.runtime)
        self.loaded = runtime.open(self.variant.model, self.place)
        return LoadInfo(time.perf_counter() - start, self.loaded.providers)

    def warm_up(self, calls: list[Arrays], seconds: float) -> WarmUp:
        deadline = time.perf_counter() + seconds
        spent: list[float] = []
        for made in self._passes(calls):
            spent.append(sum(made))
            if settled(spent) or (len(spent) >= 3 and time.perf_counter() >= deadline):
                break
        return WarmUp(len(spent) * len(calls), settled(spent))

    def time(self, calls: list[Arrays], seconds: float, most: int) -> list[float]:
        time.sleep(_CALM)
        # untimed: the others have used the caches since this model's last turn
        self._run_for(calls[0])(self.loaded.prepare(calls[0]))
        spent: list[float] = []
        before = self.meter.joules()
        for made in self._passes(calls):
            spent += made
            if sum(spent) >= seconds or len(spent) >= most:
                break
        after = self.meter.joules()
        if before is not None and after is not None:
            self.used = self.used[0] + after - before, self.used[1] + len(spent)
        return spent

    def capacity(self, inputs: Arrays, streams: int, seconds: float) -> float:
        done = self._answered(inputs, streams, itertools.repeat(0.0), seconds)
        return len(done) / max(done)  # that took from the beginning to the last answer

    def arrivals(
        self, inputs: Arrays, streams: int, rate: float, count: int, seed: int
    ) -> list[float]:
        gaps = np.random.default_rng(seed).exponential(1 / rate, count)
        return self._answered(inputs, streams, np.cumsum(gaps).tolist())

    def _answered(
        self, inputs: Arrays, streams: int, arrivals: Iterable[float], seconds: float = math.inf
    ) -> list[float]:
        """Answer requests in the order they arrive, that many seconds from now, for so long.

        Return the seconds from each arrival to its answer.
        """
        run = self._run_for(inputs)
        # two streams may not share one
        feeds = [self.loaded.prepare(inputs) for _ in range(streams)]
        queue, lock = iter(arrivals), threading.Lock()
        spent: list[float] = []
        begun = time.perf_counter()

        def stream(feed: Any) -> None:
            while time.perf_counter() < begun + seconds:
                with lock:
                    arrival = next(queue, None)
                if arrival is None:
                    return
                time.sleep(max(0.0, begun + arrival - time.perf_counter()))
                run(feed)
                spent.append(time.perf_counter() - begun - arrival)

        with ThreadPoolExecutor(streams) as pool:
            for finished in [pool.submit(stream, feed) for feed in feeds]:
                finished.result()
        return spent

    def joules(self) -> float | None:
        (spent, calls), self.used = self.used, (0.0, 0)
        return spent / calls if calls else None

    def operators(self, shape: tuple[int, int]) -> GraphUse | None:
        inspect = find_runtime(self.variant.runtime).inspect
        if inspect is None:
            return None
        return inspect(self.variant.model, self.place, shape)

    def timed_outputs(self) -> dict[str, np.ndarray]:
        if isinstance(self.last, Tokens):
            return {"tokens": self.last.tokens}
        return {name: np.asarray(value) for name, value in self.loaded.collect(self.last).items()}

    def predict(self, batch: Arrays) -> dict[str, np.ndarray]:
        outputs = self.loaded.collect(self.loaded.run(self.loaded.prepare(batch)))
        return {name: np.asarray(value) for name, value in outputs.items()}

    def peak_memory(self) -> int:
        return resident_peak()

    def device_memory(self) -> int | None:
        return gpus.held_memory(os.getpid()) if self.place.device != "cpu" else None

    def _passes(self, calls: list[Arrays]) -> Iterator[list[float]]:
        """Yield the seconds of each call, pass by pass; what a call needs is prepared before."""
        prepared = [(self._run_for(inputs), self.loaded.prepare(inputs)) for inputs in calls]
        while True:
            spent = []
            for run, feed in prepared:
                start = time.perf_counter()
                self.last = run(feed)
                spent.append(time.perf_counter() - start)
            yield spent

    def _run_for(self, inputs: Arrays) -> Callable[[Any], Any]:
        """Return what answers: the model, or its decoding where tokens are asked for."""
        if NEW not in inputs:
            return self.loaded.run
        if self.loaded.generate is None:
            raise WorkerError("it cannot generate; measure it without --prompts")
        return self.loaded.generate


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
