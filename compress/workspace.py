"""The folder of a training run beside its destination: saved states, the log, a batch that failed.

A state is a directory that appears by one rename once all of it is on the disk; the newest and the
one before are kept. It holds tensors in safetensors files and all else as JSON: nothing in it is
unpickled. Only the main process writes here; all read.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from calib_data.errors import ConfigError, DestinationError, ModelError
from compress.files import destination_errors, read_json, sync_directory, write_json
from compress.processes import is_main
from compress.train_log import LOG

_SETTINGS, _TENSORS, _PLAIN = "settings.json", "tensors.safetensors", "state.json"
_PARTIAL = "state.partial"
# What others keep here is named by what it is made of, so that another run may use it.
REUSED = ("generations", "teacher", "pruning")


@dataclass(frozen=True)
class State:
    """What training needs to go on: tensors and plain values; and the directory they came from."""

    step: int
    tensors: Mapping[str, Tensor]
    plain: Mapping[str, Any]
    directory: Path


@dataclass(frozen=True)
class Workspace:
    """Where a training run keeps its state, and what is done with a state that is there already.

    `resume` continues from it, `overwrite` starts anew; with both, it is continued where settings,
    data and models are the same. `save_every` counts steps, 0 saves none.
    """

    path: Path
    resume: bool = False
    overwrite: bool = False
    save_every: int = 0

    @property
    def log(self) -> Path:
        """The file of the step-by-step log."""
        return self.path / LOG

    def claim(self, settings: Mapping[str, Any]) -> bool:
        """Note what this run is; return whether there is a state of it to continue from.

        Raises `DestinationError` for a state that neither `resume` nor `overwrite` allows for, and
        `ConfigError`, naming the difference, for one of another run.
        """
        with destination_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if self.states():
                self._check_allowed()
                noted = read_json(self.path / _SETTINGS)
                differences = list(_differences(noted, settings))
                if self.resume and not differences:
                    return True
                if not self.overwrite:
                    raise ConfigError(
                        f"{self.path} holds a run with other settings: {'; '.join(differences)}. "
                        "Use the same, or start anew with --overwrite"
                    )
            self._clear()
            write_json(self.path / _SETTINGS, settings)
        return False

    def _check_allowed(self) -> None:
        if self.states() and not (self.resume or self.overwrite):
            raise DestinationError(
                f"{self.path} holds an unfinished run of {_step(self.states()[-1])} steps; continue "
                "it with --resume, or start anew with --overwrite"
            )

    def _clear(self) -> None:
        for entry in self.path.iterdir():
            if entry.name in REUSED:
                continue
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()

    def states(self) -> list[Path]:
        """Return the directories of the whole states, oldest first."""
        return sorted(p for p in self.path.glob("step-*") if p.is_dir())

    def reused(self) -> list[Path]:
        """Return the folders there are that hold more than one run's work."""
        return [self.path / name for name in REUSED if (self.path / name).is_dir()]

    def load(self) -> State:
        """Return the newest state that can be read; raises `ModelError` where none can."""
        for directory in reversed(self.states()):
            try:
                tensors = load_file(directory / _TENSORS)
                plain = read_json(directory / _PLAIN)
            except (OSError, SafetensorError, ModelError):
                continue  # damaged: that is what the one before is kept for
            return State(_step(directory), tensors, plain, directory)
        raise ModelError(f"no state in {self.path} can be read; start anew with --overwrite")

    def begin(self) -> Path:
        """Return an empty directory for a state, which `commit` makes one."""
        partial = self.path / _PARTIAL
        with destination_errors(self.path):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        return partial

    def commit(self, step: int, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Put the state after `step` steps in place; what fails leaves the earlier ones.

        Raises `DestinationError` where the disk is full.
        """
        partial = self.path / _PARTIAL
        try:
            with destination_errors(self.path):
                save_file(dict(tensors), partial / _TENSORS)
                write_json(partial / _PLAIN, plain)
                sync_directory(partial)
                target = self.path / f"step-{step:08d}"
                shutil.rmtree(target, ignore_errors=True)  # a damaged one that was passed over
                partial.rename(target)
                sync_directory(self.path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        for old in self.states()[:-2]:
            shutil.rmtree(old, ignore_errors=True)

    def keep_batches(self, step: int, batches: Mapping[int, Mapping[str, Tensor]]) -> Path:
        """Write batches that made training fail, by their place in the step; return the file."""
        path = self.path / f"batch-{step:08d}.safetensors"
        tensors = {f"{i}.{n}": t.contiguous() for i, b in batches.items() for n, t in b.items()}
        with destination_errors(self.path):
            save_file({name: value.clone() for name, value in tensors.items()}, path)
        return path


@contextmanager
def open_workspace(
    path: Path, *, resume: bool = False, overwrite: bool = False, save_every: int = 0
) -> Iterator[Workspace]:
    """Yield a run's workspace; it goes when the block succeeds, and stays if there is use for it.

    Raises `DestinationError` where another run is at work in it, or where it holds a state and
    neither `resume` nor `overwrite` is given.
    """
    from filelock import FileLock, Timeout

    workspace = Workspace(path, resume, overwrite, save_every)
    with ExitStack() as stack:
        if is_main():
            workspace._check_allowed()
            with destination_errors(path):
                path.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(FileLock(path / "lock", timeout=0))
            except Timeout as error:
                raise DestinationError(f"another run is at work in {path}; wait for it") from error
        try:
            yield workspace
        except BaseException:
            kept = [workspace.states(), list(path.glob("batch-*")), workspace.reused()]
            if is_main() and not any(kept):
                shutil.rmtree(path, ignore_errors=True)
            raise
        if is_main():
            shutil.rmtree(path, ignore_errors=True)


def _step(directory: Path) -> int:
    return int(directory.name.rpartition("-")[2])


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], at: str = "") -> Iterator[str]:
    """Yield each setting that differs: its name, the old value and the new one."""
    for name in sorted({*then, *now}):
        old, new = then.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{at}{name}.")
        elif old != new:
            yield f"{at}{name} was {_short(old)}, is {_short(new)}"


def _short(value: Any) -> str:
    """Return a value for a message; of a hash its beginning."""
    text = str(value)
    return text[:12] if len(text) == 64 and " " not in text else text
