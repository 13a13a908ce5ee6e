"""What every stage that trains has in common: its workspace, its judge, and what it tells."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxpress.judge import Judge, judge_of

if TYPE_CHECKING:
    from compress.checkpoint import Checkpoint
    from compress.training import TrainRun
    from onnxpress.stages import Run

SAVE_EVERY = 200  # steps between saved states


@dataclass(frozen=True)
class Place:
    """Where a training stage writes: a staging directory, and the run with its workspace."""

    staging: Path
    train_run: "TrainRun"

    def kept(self, name: str) -> Path:
        """Return a folder of the workspace, a row of `workspace.REUSED`."""
        assert self.train_run.workspace is not None
        return self.train_run.workspace.path / name

    def save(self, checkpoint: "Checkpoint") -> None:
        """Write the trained checkpoint and the log of its training."""
        from compress.checkpoint import save_checkpoint
        from compress.train_log import LOG

        save_checkpoint(checkpoint, self.staging)
        workspace = self.train_run.workspace
        if workspace is not None and workspace.log.is_file():
            shutil.copyfile(workspace.log, self.staging / LOG)


@dataclass(frozen=True)
class TrainingChoice:
    """What belongs to the run of a training stage and not to its config."""

    save_every: int = SAVE_EVERY
    tensorboard: Path | None = None
    eval: str | None = None  # spec of the data that judges the model in training
    eval_columns: str | None = None

    @contextmanager
    def place(self, out: Path, run: "Run") -> Iterator[Place]:
        """Yield where to write: OUT.training holds the run's state until OUT is in place.

        Of several processes only the main one writes `out`; the others get a folder that goes.
        """
        from compress.files import staged_directory
        from compress.processes import is_main
        from compress.training import TrainRun
        from compress.workspace import open_workspace

        path = out.with_name(f"{out.name}.training")
        with tempfile.TemporaryDirectory() as nowhere:
            with (
                open_workspace(
                    path, resume=run.resume, overwrite=run.overwrite, save_every=self.save_every
                ) as workspace,
                staged_directory(
                    out if is_main() else Path(nowhere) / "out", run.overwrite
                ) as staging,
            ):
                yield Place(staging, TrainRun(workspace, self.tensorboard))

    def judge(self, reference: "Checkpoint", max_length: int | None) -> Judge | None:
        """Return what judges a student of `reference`, or None where no data is named.

        The metric is the first that the data's columns and the task allow.
        """
        from calib_data.sources import open_data

        if self.eval is None:
            return None
        examples = open_data(self.eval, self.eval_columns)
        return judge_of(reference, examples, max_length=max_length)


def told(report: Mapping[str, Any], judge: Judge | None) -> dict[str, Any]:
    """Return what a command tells of a training report: no curves, which the log holds."""
    short = {k: v for k, v in report.items() if k not in ("losses", "curve")}
    return short if judge is None else {**short, "metric": judge.metric}
