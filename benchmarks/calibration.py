"""Time and memory of calibration, against a plain forward pass and ONNX Runtime's own calibrators.

    python -m benchmarks.calibration [MODEL] [--samples 256,4096] [--others 256]

Every pass runs in a process of its own over texts of full length, sentences of Python's documentation
one after another. Times are taken in turns, round by round. ONNX Runtime's calibrators get the graph
that PyTorch's exporter makes of the model, all inputs and outputs of its matrix products (they know no
narrower choice), and a limit of memory, since they keep what they see.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.config import usable_cores
from benchmarks.exporters import export_plainly
from benchmarks.report import Environment
from benchmarks.statistics import MINIMUM_ROUNDS, percentile, sign_interval
from benchmarks.worker import WorkerError, resident_peak

_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
PLAIN, OURS = "forward pass", "calibration"
_METHODS = {"min-max": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}


@dataclass(frozen=True)
class Work:
    """One pass over data, in a process of its own."""

    what: str  # PLAIN, OURS, or one of ONNX Runtime's methods
    model: str
    samples: int
    tokens: int = 128
    batch: int = 32
    threads: int = 1
    graph: str | None = None  # for ONNX Runtime
    limit: int | None = None  # bytes of memory


@dataclass(frozen=True)
class Pass:
    """How long a pass took, and the most memory that its process had until then."""

    seconds: float
    peak: int


class Worker:
    """A process that makes a pass whenever it is asked."""

    def __init__(self, work: Work) -> None:
        self.work = work
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(work, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def run(self) -> Pass:
        """Make a pass; raises `WorkerError` where that is not possible."""
        try:
            self._pipe.send("go")
            answer = self._pipe.recv()
        except (EOFError, BrokenPipeError) as error:
            raise WorkerError(f"{self.work.what}: the process ended") from error
        if isinstance(answer, str):
            raise WorkerError(f"{self.work.what}: {answer}")
        assert isinstance(answer, Pass)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


@contextmanager
def working(work: Work) -> Iterator[Worker]:
    """Yield a process for the work, which ends with the block."""
    worker = Worker(work)
    try:
        yield worker
    finally:
        worker.close()


def ratios(one: Work, other: Work, rounds: int) -> list[float]:
    """Return per round the seconds of `one` over those of `other`, after a round to warm up."""
    found = []
    with ExitStack() as stack:
        workers = [stack.enter_context(working(work)) for work in (one, other)]
        for number in range(rounds + 1):
            ordered = workers if number % 2 else workers[::-1]
            seconds = {worker.work.what: worker.run().seconds for worker in ordered}
            found.append(seconds[one.what] / seconds[other.what])
    return found[1:]


def once(work: Work) -> Pass | str:
    """Return a single pass, or why there is none."""
    with working(work) as worker:
        try:
            return worker.run()
        except WorkerError as error:
            return str(error).partition(": ")[2]


def _serve(work: Work, pipe: Connection) -> None:
    try:
        make_pass: Callable[[], float] | None = None
        while pipe.recv() == "go":
            make_pass = make_pass or _prepared(work)
            pipe.send(Pass(make_pass(), resident_peak()))
    except EOFError:
        return
    except Exception as error:
        pipe.send(" ".join(f"{type(error).__name__}: {error}".split())[:120])


def _prepared(work: Work) -> Callable[[], float]:
    """Return what makes a pass and returns its seconds; a limit of memory holds from then on."""
    import torch

    torch.set_num_threads(work.threads)
    if work.what in (PLAIN, OURS):
        made = _ours(work) if work.what == OURS else _plain(work)
    else:
        made = _theirs(work)
    if work.limit:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (work.limit, work.limit))

    def timed() -> float:
        started = time.perf_counter()
        made()
        return time.perf_counter() - started

    return timed


def _plain(work: Work) -> Callable[[], object]:
    checkpoint, batches = _opened(work)

    def run() -> None:
        for batch in batches:
            checkpoint.predict(batch)

    return run


def _ours(work: Work) -> Callable[[], object]:
    from torch import nn

    from compress.calibration import calibrate

    checkpoint, batches = _opened(work)
    names = [n for n, m in checkpoint.backbone.named_modules() if isinstance(m, nn.Linear)]
    return lambda: calibrate(checkpoint, names, batches)


def _theirs(work: Work) -> Callable[[], object]:
    from onnxruntime.quantization import calibrate

    _, batches = _opened(work)
    folder = tempfile.mkdtemp()

    class Reader(calibrate.CalibrationDataReader):
        def __init__(self) -> None:
            self._left = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._left, None)
            return batch and {name: value.numpy() for name, value in batch.items()}

    def run() -> None:
        calibrator = calibrate.create_calibrator(
            work.graph,
            ["MatMul", "Gemm"],
            f"{folder}/augmented.onnx",
            getattr(calibrate.CalibrationMethod, _METHODS[work.what]),
        )
        with contextlib.redirect_stdout(sys.stderr):  # they tell how far they are
            calibrator.collect_data(Reader())
            calibrator.compute_data()

    return run


def _opened(work: Work) -> tuple[Any, Any]:
    """Return the checkpoint and batches of texts that are cut at `tokens`."""
    import datasets

    from calib_data.batches import Batches
    from calib_data.sources import Examples, open_data
    from compress.loading import open_checkpoint

    checkpoint = open_checkpoint(work.model)
    sentences = open_data("pydoc:train").column("text")
    several = work.tokens // 8  # a sentence has some twenty tokens
    texts = [
        " ".join(sentences[(7 * start + i) % len(sentences)] for i in range(several))
        for start in range(work.samples)
    ]
    examples = Examples(datasets.Dataset.from_dict({"text": texts}), "sentences")
    batches = Batches(examples, checkpoint.processor, batch_size=work.batch, max_length=work.tokens)
    if int(batches.lengths.min()) < work.tokens:
        raise WorkerError("a text is shorter than it should be; lower --tokens")
    return checkpoint, batches


def memory_table(work: Work, counts: Sequence[int]) -> Iterator[str]:
    """Yield a Markdown table of the peak memory and seconds of a pass, by samples."""
    yield from ("| pass | samples | peak memory, MB | seconds |", "|---|---|---|---|")
    for count in counts:
        for what in (PLAIN, OURS):
            yield _row(replace(work, what=what, samples=count))


def others_table(work: Work, count: int, limit: int) -> Iterator[str]:
    """Yield rows for ONNX Runtime's calibrators, each over `count` samples."""
    from compress.loading import open_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "plain.onnx"
        export_plainly(open_checkpoint(work.model), graph)
        theirs = replace(work, samples=count, graph=str(graph), limit=limit)
        for method in _METHODS:
            yield _row(replace(theirs, what=method))


def _row(work: Work) -> str:
    made = once(work)
    name = work.what if work.what in (PLAIN, OURS) else f"ONNX Runtime, {work.what}"
    if isinstance(made, str):
        within = f"not within {work.limit / 1e6:.0f}: " if work.limit else ""
        return f"| {name} | {work.samples} | {within}{made} | – |"
    return f"| {name} | {work.samples} | {made.peak / 1e6:.0f} | {made.seconds:.2f} |"


def main() -> None:
    """Print tables of the time and memory of calibration."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibration", description=main.__doc__
    )
    parser.add_argument("model", nargs="?", default=_MODEL)
    parser.add_argument("--samples", default="256,4096", help="for the memory, by commas")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=MINIMUM_ROUNDS)
    parser.add_argument("--round-samples", type=int, default=128, help="a pass when timing")
    parser.add_argument(
        "--others", type=int, default=0, metavar="N", help="samples for ONNX Runtime"
    )
    parser.add_argument("--limit", type=float, default=10.0, help="GB of memory for ONNX Runtime")
    parser.add_argument("--only", choices=["time", "memory"])
    parser.add_argument("--threads", type=int, default=usable_cores())
    given = parser.parse_args()
    work = Work(OURS, given.model, given.round_samples, given.tokens, threads=given.threads)
    here = Environment.here("cpu", given.threads)
    versions = ", ".join(f"{name} {version}" for name, version in here.versions.items())
    print(f"{here.cpu}, {here.threads} threads; {versions}; load before: {here.load_average}.\n")
    if given.only != "memory":
        found = ratios(work, replace(work, what=PLAIN), given.rounds)
        low, high = sign_interval(found)
        median = percentile(found, 50)
        print(
            f"Calibration takes {median:.3f} ({low:.3f}–{high:.3f}) × a forward pass.\n", flush=True
        )
    if given.only != "time":
        for line in memory_table(work, [int(count) for count in given.samples.split(",")]):
            print(line, flush=True)
        if given.others:
            for line in others_table(work, given.others, int(given.limit * 1e9)):
                print(line, flush=True)


if __name__ == "__main__":
    main()
