"""What to measure, and how: the settings of a benchmark."""

import os
from dataclasses import dataclass

from benchmarks.statistics import MINIMUM_ROUNDS
from compress.config import StageConfig, one_of, require

PROVIDERS = ("cpu", "cuda")


@dataclass(frozen=True)
class BenchmarkConfig(StageConfig):
    """Which inputs, how long, on what, and which data judges the quality."""

    shapes: tuple[tuple[int, int], ...] = ((1, 32), (8, 128))  # (batch, sequence)
    rounds: int = 10  # every variant is timed once per round
    seconds: float = 0.3  # per variant, shape and round
    warm_up_seconds: float = 5.0  # the most spent waiting for times to settle
    threads: int | None = None  # per model; None: all cores that this process may use
    provider: str = "cpu"
    seed: int = 0
    eval: str | None = None  # data spec that the quality is measured on
    columns: str | None = None
    limit: int | None = None  # examples used of `eval`
    batch_size: int = 16
    metrics: tuple[str, ...] = ()  # empty: what the task and the data allow

    def __post_init__(self) -> None:
        # JSON knows no tuples, so that shapes come back as lists.
        object.__setattr__(self, "shapes", tuple(tuple(shape) for shape in self.shapes))
        require(bool(self.shapes), "name at least one shape, as in 8x128")
        for shape in self.shapes:
            fits = len(shape) == 2 and all(isinstance(n, int) and n >= 1 for n in shape)
            require(fits, f"a shape is batch × sequence, both at least 1, got {shape}")
        require(len(set(self.shapes)) == len(self.shapes), "a shape is named twice; name it once")
        require(
            self.rounds >= MINIMUM_ROUNDS,
            f"rounds must be at least {MINIMUM_ROUNDS}, got {self.rounds}: "
            "fewer cannot tell a difference from noise at 95 %",
        )
        require(self.seconds > 0, f"seconds per round must be above 0, got {self.seconds}")
        require(
            self.warm_up_seconds >= 0,
            f"warm-up seconds must not be negative, got {self.warm_up_seconds}",
        )
        require(
            self.threads is None or self.threads >= 1,
            f"threads must be at least 1, got {self.threads}",
        )
        one_of("provider", self.provider, PROVIDERS)
        require(self.batch_size >= 1, f"batch size must be at least 1, got {self.batch_size}")
        require(
            self.eval is not None or not self.metrics,
            f"metric {', '.join(self.metrics)} needs data: add --eval",
        )


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
