"""Work in a process of its own, held to an amount of memory and of time: what it took, or why it failed.

A program that runs away is a row of a table here, and not a machine that has to be started anew.
"""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.worker import resident_peak
from calib_data.errors import OnnxPressError

GIB = 2**30
# How allocators say so: Python and NumPy raise MemoryError, C++ throws, ONNX Runtime wraps that.
_EXHAUSTED = (
    "bad_alloc",
    "bad allocation",
    "failed to allocate",
    "cannot allocate",
    "unable to allocate",
)

Work = Callable[[], object]


@dataclass(frozen=True)
class Outcome:
    """What became of the work."""

    seconds: float | None  # of the work alone, without what was imported for it
    peak_bytes: int | None  # the most that the process was resident in, all in all
    failure: str | None = None


def confined(
    prepare: Callable[..., Work],
    *arguments: Any,
    memory: int = 8 * GIB,
    seconds: float = 1800,
) -> Outcome:
    """Return how `prepare(*arguments)()` went in a new process with `memory` bytes of address space.

    `prepare` imports what is needed and returns the work that is timed; it and its arguments are
    pickled. Address space is more than what is resident: libraries and reserved pages count. Where the
    system knows no such limit (Windows) there is none. Work that takes longer than `seconds` is ended.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, memory, prepare, arguments), daemon=True)
    process.start()
    theirs.close()  # so that a dead child reads as end-of-file
    try:
        if not ours.poll(seconds):
            return Outcome(None, None, f"not done in {seconds / 60:g} minutes")
        found: Outcome = ours.recv()
        return found
    except EOFError:
        process.join()
        return Outcome(None, None, _death(process.exitcode, memory))
    finally:
        process.kill()
        process.join()
        ours.close()


def out_of_memory(memory: int) -> str:
    """Return how a row says that the limit was reached."""
    return f"out of memory at {memory / GIB:g} GB"


def _serve(
    pipe: Connection, memory: int, prepare: Callable[..., Work], arguments: tuple[Any, ...]
) -> None:
    _limit(memory)
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        pipe.send(_attempt(memory, prepare, arguments))


def _attempt(memory: int, prepare: Callable[..., Work], arguments: tuple[Any, ...]) -> Outcome:
    try:
        work = prepare(*arguments)
        start = time.perf_counter()
        work()
        return Outcome(time.perf_counter() - start, resident_peak())
    except MemoryError:
        return Outcome(None, resident_peak(), out_of_memory(memory))
    except Exception as error:  # whatever a quantizer raises is a row
        text = " ".join(str(error).split())
        if any(word in text.lower() for word in _EXHAUSTED):
            return Outcome(None, resident_peak(), out_of_memory(memory))
        kind = "" if isinstance(error, OnnxPressError) else f"{type(error).__name__}: "
        return Outcome(None, resident_peak(), (kind + text)[:200])


def _limit(memory: int) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    with contextlib.suppress(ValueError, OSError):  # macOS refuses to set it
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def _death(code: int | None, memory: int) -> str:
    # SIGABRT is what C++ does with a failed allocation that nobody caught, SIGKILL what the kernel does
    if code is not None and -code in (signal.SIGABRT, signal.SIGKILL, signal.SIGSEGV):
        return f"its process crashed ({signal.Signals(-code).name}) under a limit of {memory / GIB:g} GB"
    return f"its process ended with exit code {code}"
