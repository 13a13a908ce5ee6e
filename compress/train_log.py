"""What happened in training: step by step as JSON lines, and as plain data afterwards."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from calib_data.errors import ConfigError, DestinationError
from compress.files import destination_errors

LOG = "training.jsonl"
CURVE = 200  # points of the loss curve that a checkpoint's lineage keeps


@dataclass(frozen=True)
class TrainLog:
    """The loss of every step, and what the run was like."""

    losses: tuple[float, ...]
    epochs: float
    padding: float | None = None  # share of the token places that held padding; None: no tokens
    tokens_per_second: float | None = None  # median over the steps, padding not counted
    evaluations: tuple[tuple[int, float], ...] = ()  # (steps done, value), higher is better
    best_step: int | None = None  # whose weights are returned, where there were evaluations

    def summary(self, last: int = 20) -> dict[str, Any]:
        """Return the mean loss of the first and the last steps, and the other figures there are.

        The same for the same run, as what is kept with a checkpoint must be: no times.
        """
        head, tail = self.losses[:last], self.losses[-last:]
        found: dict[str, Any] = {
            "loss_first": sum(head) / len(head),
            "loss_last": sum(tail) / len(tail),
            "steps": len(self.losses),
            "epochs": self.epochs,
            "padding": self.padding,
            "curve": self.curve(),
        }
        if self.evaluations:
            found["evaluations"] = [list(pair) for pair in self.evaluations]
            found["best_step"] = self.best_step
        return {name: value for name, value in found.items() if value is not None}

    def report(self) -> dict[str, Any]:
        """Return the summary, the loss of every step and how fast it went."""
        speed = (
            {} if self.tokens_per_second is None else {"tokens_per_second": self.tokens_per_second}
        )
        return {**self.summary(), **speed, "losses": list(self.losses)}

    def curve(self, points: int = CURVE) -> list[list[float]]:
        """Return at most `points` pairs of steps done and the mean loss since the pair before."""
        size = math.ceil(len(self.losses) / points)
        pairs = []
        for start in range(0, len(self.losses), size):
            part = self.losses[start : start + size]
            pairs.append([start + len(part), float(f"{sum(part) / len(part):.6g}")])
        return pairs


class LogWriter:
    """Writes a record a step to a file of JSON lines, and to TensorBoard; either may be absent."""

    def __init__(self, file: Path | None, tensorboard: Path | None, start: int = 0) -> None:
        """Append to `file`; a resumed run hides TensorBoard's points past step `start`."""
        self._file = None
        if file is not None:
            with destination_errors(file):
                self._file = file.open("a", encoding="utf-8")
        self._place = file
        self._board = None if tensorboard is None else _summary_writer(tensorboard, start)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Add one record; figures that are not finite, which JSON cannot hold, become null."""
        if self._file is not None and self._place is not None:
            with destination_errors(self._place):
                self._file.write(json.dumps(_finite(record)) + "\n")
        if self._board is not None:
            for name, value in _flat(record).items():
                self._board.add_scalar(name, value, record["step"])

    def sync(self) -> None:
        """Make sure that what was written is on the disk."""
        if self._file is not None and self._place is not None:
            with destination_errors(self._place):
                self._file.flush()
                os.fsync(self._file.fileno())


def read_records(file: Path, steps: int) -> list[dict[str, Any]]:
    """Return the records of the first `steps` steps and cut the file after them.

    A killed run leaves lines past its last saved state, the last of them perhaps torn. Raises
    `DestinationError` where some of the first steps are missing.
    """
    records = []
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for line in lines[:steps]:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    if [record.get("step") for record in records] != list(range(1, steps + 1)):
        raise DestinationError(
            f"{file} does not hold the {steps} steps before the saved state; "
            "start anew with --overwrite"
        )
    partial = file.with_suffix(".partial")
    with destination_errors(file):
        partial.write_text("".join(line + "\n" for line in lines[:steps]), encoding="utf-8")
        partial.replace(file)
    return records


def check_tensorboard() -> None:
    """Raise a `ConfigError` where TensorBoard's package is missing."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "--tensorboard needs the package tensorboard; pip install 'onnxpress[tensorboard]'"
        ) from error


def _summary_writer(directory: Path, start: int) -> Any:
    check_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    with destination_errors(directory):
        return SummaryWriter(str(directory), purge_step=start + 1)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of a record by TensorBoard's names: train/loss, terms/logits."""
    terms = {f"terms/{name}": value for name, value in record["terms"].items()}
    rest = {f"train/{k}": v for k, v in record.items() if k not in ("step", "terms")}
    return terms | rest
