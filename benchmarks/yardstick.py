"""How fast a checkpoint's graph is next to another's, both timed in the same rounds.

Graphs are exported without the gate, which asks what they compute; here they are only timed, in float
or quantized.
"""

import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil

from benchmarks.config import usable_cores
from benchmarks.runtimes import Place
from benchmarks.statistics import MINIMUM_ROUNDS, percentile, sign_interval
from benchmarks.timing import agreement
from benchmarks.worker import Variant, Worker
from calib_data.errors import ModelError
from compress.checkpoint import Checkpoint, save_checkpoint
from compress.config import StageConfig, one_of, require
from compress.quantize import quantize
from compress.quantize_config import QuantizeConfig

OVER = ("graph", "pytorch")
_REFERENCE = "reference"
_SHARE = 0.5  # of the free memory that graphs side by side may take
_COPIES, _RUNTIME = 3, 2**28  # a session's bytes: weights, packed weights and buffers; and the rest

Progress = Callable[[str], None]  # told what begins


@dataclass(frozen=True)
class Conditions(StageConfig):
    """On what, on which inputs and how long graphs are timed."""

    provider: str = "cpu"
    shapes: tuple[tuple[int, int], ...] = ((8, 128),)  # (batch, sequence)
    threads: int | None = None  # per graph; None: all cores that this process may use
    rounds: int = 9  # every graph is timed once per round
    seconds: float = 0.3  # per graph, shape and round
    scheme: str | None = None  # by which graphs are quantized before they are timed; None: float
    over: str = "graph"  # what the reference is timed as: its graph, or itself in pytorch

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", tuple(tuple(shape) for shape in self.shapes))
        one_of("--provider", self.provider, ("cpu", "cuda"))
        one_of("--over", self.over, OVER)
        require(bool(self.shapes), "name at least one shape, as in 8x128")
        for shape in self.shapes:
            fits = len(shape) == 2 and all(isinstance(n, int) and n >= 1 for n in shape)
            require(fits, f"a shape is batch × sequence, both at least 1, got {shape}")
        threads = self.threads
        require(threads is None or threads >= 1, f"--threads must be at least 1, got {threads}")
        require(
            self.rounds >= MINIMUM_ROUNDS,
            f"rounds must be at least {MINIMUM_ROUNDS}, got {self.rounds}",
        )
        require(self.seconds > 0, f"seconds per round must be above 0, got {self.seconds}")
        if self.scheme is not None:
            require(
                not QuantizeConfig(self.scheme, target=self.provider).needs_data,
                f"graphs are timed without data, which the scheme {self.scheme} needs; dynamic takes "
                "about the same time",
            )

    @property
    def used_threads(self) -> int:
        """The threads that each graph gets."""
        return self.threads or usable_cores()


@dataclass(frozen=True)
class Timed:
    """One graph against the reference; several shapes count alike."""

    relative: float  # its time ÷ the reference's: mean over shapes, median over rounds
    interval: tuple[float, float]  # 95 %, of `relative`
    milliseconds: float  # a call: `relative` × the reference's median, mean over shapes
    reference_milliseconds: float

    @property
    def speedup(self) -> float:
        """How many times faster than the reference."""
        return 1 / self.relative


class Yardstick:
    """The model that graphs are timed against. Use as a context manager, which removes the graphs."""

    def __init__(self, reference: Checkpoint, conditions: Conditions) -> None:
        for _, sequence in conditions.shapes:
            reference.check_length(sequence)
        self.conditions = conditions
        self.reference = reference
        self._samples = [
            {
                name: np.asarray(value)
                for name, value in reference.signature.sample(batch=b, sequence=s, seed=0).items()
            }
            for b, s in conditions.shapes
        ]
        self._folder: Any = None
        self._reference: Variant | None = None

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="onnxpress-")
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def time(
        self, checkpoints: Mapping[str, Checkpoint], progress: Progress = lambda what: None
    ) -> dict[str, Timed]:
        """Return how each checkpoint's graph compares, by its name.

        Raises `ModelError` for a model that becomes more than one graph, `WorkerError` for one that
        fails, `ProviderError` where the provider is not obtained.
        """
        paths = {name: self._export(name, made, progress) for name, made in checkpoints.items()}
        if self._reference is None:
            self._reference = self._made(progress)
        found: dict[str, Timed] = {}
        for names in _batched(list(paths), _at_once(self._reference)):
            graphs = [Variant(name, str(paths[name]), "onnx") for name in names]
            times = self._rounds([self._reference, *graphs], progress)
            for name in names:
                found[name] = _compared(times[name], times[_REFERENCE])
        for path in paths.values():
            path.unlink()
        return found

    def _export(self, name: str, checkpoint: Checkpoint, progress: Progress) -> Path:
        from export.graph import ExportConfig, build_graph
        from export.parts import parts
        from export.serialize import write_model

        progress(f"exporting {name}")
        conditions = self.conditions
        if conditions.scheme is not None:
            config = QuantizeConfig(conditions.scheme, target=conditions.provider)
            checkpoint = quantize(checkpoint, config).checkpoint
        made = parts(checkpoint)
        if "model" not in made:
            raise ModelError(
                f"{type(checkpoint.backbone).__name__} becomes {' and '.join(made)}, and only models "
                "of one graph are timed; say how much to remove with --heads and --ffn, or --size"
            )
        path = Path(self._folder.name) / f"{name}.onnx"
        write_model(build_graph(made["model"], ExportConfig(target=conditions.provider)), path)
        return path

    def _made(self, progress: Progress) -> Variant:
        """Return the reference as a graph, or as a checkpoint that PyTorch runs."""
        if self.conditions.over == "graph":
            return Variant(
                _REFERENCE, str(self._export(_REFERENCE, self.reference, progress)), "onnx"
            )
        folder = Path(self._folder.name) / _REFERENCE
        folder.mkdir()
        save_checkpoint(self.reference, folder)
        return Variant(_REFERENCE, str(folder), "pytorch")

    def _rounds(
        self, variants: Sequence[Variant], progress: Progress
    ) -> dict[str, list[list[float]]]:
        """Return each model's median seconds by round and shape, in another order each round."""
        conditions = self.conditions
        times: dict[str, list[list[float]]] = {
            variant.name: [[] for _ in range(conditions.rounds)] for variant in variants
        }
        with ExitStack() as stack:
            workers = []
            for variant in variants:
                worker = Worker(variant, Place(conditions.provider, conditions.used_threads))
                workers.append(stack.enter_context(worker))
                progress(f"loading {variant.name}")
                worker.load()
            shuffle = random.Random(0)
            for sample in self._samples:
                for worker in workers:
                    worker.warm_up([sample], 2.0)
                for number in range(conditions.rounds):
                    progress(f"round {number + 1} of {conditions.rounds}")
                    for worker in shuffle.sample(workers, len(workers)):
                        spent = worker.time([sample], conditions.seconds)
                        times[worker.variant.name][number].append(percentile(spent, 50))
                for worker in workers:
                    agreement(worker.timed_outputs(), None, None)  # raises for NaN
        return times


def _compared(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Timed:
    """Return what the rounds say, each of them timed within seconds: drift divides out."""
    ratios = [
        float(np.mean(np.divide(mine, reference)))
        for mine, reference in zip(ours, theirs, strict=True)
    ]
    relative = percentile(ratios, 50)
    reference = 1000 * percentile([float(np.mean(each)) for each in theirs], 50)
    return Timed(relative, sign_interval(ratios), relative * reference, reference)


def _at_once(reference: Variant) -> int:
    """Return how many graphs may be held beside the reference."""
    path = Path(reference.model)
    files = path.iterdir() if path.is_dir() else path.parent.glob(f"{path.name}*")
    size = sum(p.stat().st_size for p in files)
    room = _SHARE * psutil.virtual_memory().available
    return max(1, int(room / (_COPIES * size + _RUNTIME)) - 1)


def _batched(names: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(names), size):
        yield names[start : start + size]
