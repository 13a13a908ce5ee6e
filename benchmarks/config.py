"""What to measure, and how: the settings of a benchmark."""

import os
from dataclasses import dataclass

from benchmarks.statistics import DECISIVE_ROUNDS
from compress.config import StageConfig, one_of, require

PROVIDERS = ("cpu", "cuda", "tensorrt")


@dataclass(frozen=True)
class BenchmarkConfig(StageConfig):
    """Which inputs, how long, on what, and which data judges the quality."""

    shapes: tuple[tuple[int, int], ...] = ((1, 32), (8, 128))  # (batch, sequence)
    traffic: str | None = None  # data spec: texts as they come, in the batch sizes of the shapes
    traffic_columns: str | None = None
    prompts: tuple[int, ...] = ()  # tokens that decoding starts from
    new_tokens: int = 32  # that it makes
    rounds: int = 12  # at least; every variant is timed once per round
    seconds: float = 0.3  # per variant, workload and round
    precision: float = 0.03  # half of a speed-up's interval, as a share of it, that ends the rounds
    max_time: float = 300.0  # seconds that all rounds may take on a machine too noisy for that
    warm_up_seconds: float = 5.0  # the most spent waiting for times to settle
    threads: tuple[int, ...] = ()  # per model, each in turn; none: all cores that may be used
    streams: tuple[int, ...] = ()  # requests answered at once, where arrivals are measured
    target: float | None = None  # milliseconds that 95 % of them may take, waiting included
    provider: str = "cpu"
    transfers: bool = False  # whether a GPU's calls carry inputs and outputs from and to the host
    cuda_graphs: bool = False  # record each input's kernels and launch them together
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
        object.__setattr__(self, "prompts", tuple(dict.fromkeys(self.prompts)))
        require(
            self.rounds >= DECISIVE_ROUNDS,
            f"rounds must be at least {DECISIVE_ROUNDS}, got {self.rounds}: "
            "fewer cannot tell a difference from noise at 99 %",
        )
        require(
            all(isinstance(n, int) and n >= 1 for n in self.prompts),
            f"prompts must have at least 1 token, got {self.prompts}",
        )
        require(self.new_tokens >= 2, f"new tokens must be at least 2, got {self.new_tokens}")
        require(self.precision > 0, f"precision must be above 0, got {self.precision}")
        require(self.max_time > 0, f"max time must be above 0 seconds, got {self.max_time}")
        require(self.seconds > 0, f"seconds per round must be above 0, got {self.seconds}")
        require(
            self.warm_up_seconds >= 0,
            f"warm-up seconds must not be negative, got {self.warm_up_seconds}",
        )
        for name in ("threads", "streams"):
            given = getattr(self, name)
            numbers = (given,) if isinstance(given, int) else tuple(given)  # as a recipe may say
            good = all(isinstance(n, int) and n >= 1 for n in numbers)
            require(good, f"{name} must be at least 1, got {numbers}")
            object.__setattr__(self, name, tuple(sorted(set(numbers))))
        require(
            (self.target is None) != bool(self.streams),
            "streams and a target latency need each other: --streams 1,2 --target-latency 50",
        )
        require(
            self.target is None or self.target > 0,
            f"target must be above 0 milliseconds, got {self.target}",
        )
        one_of("provider", self.provider, PROVIDERS)
        require(
            not self.cuda_graphs or (self.provider == "cuda" and not self.transfers),
            "CUDA graphs need --provider cuda, and buffers that stay there: leave --transfers out",
        )
        require(
            not self.cuda_graphs or (self.traffic is None and not self.streams),
            "CUDA graphs are of fixed shapes and one call at a time; leave --traffic and --streams out",
        )
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
