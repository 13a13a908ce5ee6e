"""Steps per second of distillation with the teacher's answers looked up, against asked each time.

    python -m benchmarks.teacher_cache [--layers 3] [--rows 256] [--epochs 2] [--rounds 2]

A student with some of the layers of all-MiniLM-L6-v2 learns from it, on sentences of Python's
documentation. Both ways train on the same batches of the same epochs, alternating; the first epoch
fills the cache and is counted apart. The losses of both are compared, so that what is timed is known to
be the same work.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.statistics import percentile, sign_interval
from calib_data.batches import Batches
from calib_data.sources import open_data
from compress.checkpoint import Checkpoint, weights_sha256
from compress.distill import AskTeacher, DistillConfig, cached_teacher, distill, running_teacher
from compress.loading import open_checkpoint
from compress.sizes import StudentShape
from compress.students import make_student
from compress.training import TrainConfig
from compress.versions import versions

TOLERANCE = 1e-3  # relative, of any step's loss: what rounding grows to over the steps


def measure(
    teacher: Checkpoint,
    student: Checkpoint,
    batches: Batches,
    epochs: int,
    losses: tuple[str, ...],
    rounds: int,
) -> dict[str, Any]:
    """Return steps per second of both ways, their ratio, and how far their losses are apart."""
    steps = epochs * len(batches)
    config = DistillConfig(losses, train=TrainConfig(steps=steps))

    def timed(ask: AskTeacher) -> tuple[list[float], list[float]]:
        """Return each step's loss, and the seconds of all but the first."""
        ticks: list[float] = []
        report = distill(
            teacher, student, batches, config, lambda _: ticks.append(time.perf_counter()), ask
        ).report
        return report["losses"], [after - before for before, after in itertools.pairwise(ticks)]

    seconds: dict[str, list[float]] = {"asked": [], "filled": [], "looked up": []}
    apart = 0.0
    stored = 0
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            cached, cached_seconds = timed(cached_teacher(batches, Path(folder), config.train))
            stored = sum(path.stat().st_size for path in Path(folder).glob("*.npy"))
        asked, asked_seconds = timed(running_teacher)
        apart = max(apart, *(abs(a - b) / abs(b) for a, b in zip(cached, asked)))
        # the same batches of the same epochs; those of the first warm the other way up
        first = len(batches) - 1
        seconds["filled"] += cached_seconds[:first]
        seconds["looked up"] += cached_seconds[first:]
        seconds["asked"] += asked_seconds[first:]
    if apart > TOLERANCE:
        raise SystemExit(f"the losses differ by {apart:.2g} of their value; nothing was compared")
    # step by step the same batch: its length does not matter
    ratios = [one / other for one, other in zip(seconds["asked"], seconds["looked up"])]
    rate = {name: 1 / statistics.mean(values) for name, values in seconds.items()}
    return {
        "steps_per_second": rate,
        "ratio": rate["looked up"] / rate["asked"],
        "ratio_while_filling": rate["filled"] / rate["asked"],
        "steps_timed": len(seconds["asked"]),
        "ratio_per_step": {"median": percentile(ratios, 50), "interval": sign_interval(ratios)},
        "largest_difference_of_losses": apart,
        "bytes_stored": stored,
    }


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=3, help="of the student")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=2, help="the first fills the cache")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--losses", default="embedding,similarity,hidden")
    chosen = parser.parse_args()
    teacher = open_checkpoint("sentence-transformers/all-MiniLM-L6-v2")
    student = make_student(teacher, StudentShape(layers=chosen.layers))
    examples = open_data("pydoc:train", None, chosen.rows, 0)
    batches = Batches(
        examples,
        teacher.processor,
        batch_size=chosen.batch_size,
        max_length=chosen.max_length,
        shuffle=True,
    ).numbered()
    losses = tuple(chosen.losses.split(","))
    figures = measure(teacher, student, batches, chosen.epochs, losses, chosen.rounds)
    conditions = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "teacher": weights_sha256(teacher.backbone),
        "data": batches.fingerprint,
        **vars(chosen),
        "tokens_per_row": float(batches.lengths.mean()),
    }
    print(json.dumps({**figures, "conditions": conditions}, indent=2))


if __name__ == "__main__":
    main()
