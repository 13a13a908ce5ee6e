"""A variant while it is measured: its process, what is known of it so far, and why it failed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

from benchmarks.report import Load, Quality
from benchmarks.runtimes import Arrays, GraphUse, Source
from benchmarks.worker import LoadInfo, Variant, WarmUp, Worker, WorkerError

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Timing:
    """What one variant did on one workload."""

    rounds: list[list[float]] = field(default_factory=list)
    warm_up: WarmUp = field(default_factory=lambda: WarmUp(0, False))
    outputs: Arrays = field(default_factory=dict)
    agreement: float | None = None
    joules: float | None = None  # of a call
    done: bool = False  # whether all rounds were timed, and the outputs are numbers


@dataclass
class Subject:
    """A variant being measured; once it has failed it is left alone."""

    variant: Variant
    source: Source
    worker: Worker = field(init=False)  # while it is measured
    failure: str | None = None
    info: LoadInfo | None = None
    peak: int | None = None
    held: int | None = None  # bytes on GPUs
    use: GraphUse | None = None
    timings: dict[str, Timing] = field(default_factory=dict)  # by workload label
    load: list[Load] = field(default_factory=list)
    quality: list[Quality] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What the report calls it."""
        return self.variant.name

    @property
    def comparable(self) -> bool:
        """Whether its timed outputs could be compared with the baseline's."""
        return any(timing.agreement is not None for timing in self.timings.values())

    def reads_apart(self, reference: "Subject") -> bool:
        """Return whether it has another tokenizer than the baseline, as after pruning the vocabulary."""
        mine, theirs = self.source.processor, reference.source.processor
        if not hasattr(mine, "get_vocab") or not hasattr(theirs, "get_vocab"):
            return False
        return bool(mine.get_vocab() != theirs.get_vocab())

    def weigh(self) -> None:
        """Take note of the memory that it has needed so far."""
        peak, held = self.attempt(self.worker.peak_memory), self.attempt(self.worker.device_memory)
        self.grown(peak, held)

    def grown(self, peak: int | None, held: int | None) -> None:
        """Take note of bytes of memory, if they are more than were known."""
        self.peak = max((n for n in (self.peak, peak) if n is not None), default=None)
        self.held = max((n for n in (self.held, held) if n is not None), default=None)

    def attempt(self, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Return what `action` does, or None, taking note of the failure.

        Only `WorkerError` is a row of the report: a provider that is not obtained spoils the whole
        comparison, and a data set that does not fit the metric is the user's to mend.
        """
        if self.failure is not None:
            return None
        try:
            return action(*args, **kwargs)
        except WorkerError as error:
            # The report is shown around: it names no place on this machine.
            model = self.variant.model
            self.failure = str(error).replace(model, Path(model).name)
            return None


class Steps:
    """Counts what a progress bar shows; `extra` steps, which nobody counted on, do not move it."""

    def __init__(self, progress: Callable[[str, int, int], None] | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, what: str, extra: bool = False) -> None:
        """Say what begins now."""
        if self.progress is not None:
            self.progress(what, self.done, self.total)
        self.done += not extra
