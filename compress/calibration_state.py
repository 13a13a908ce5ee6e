"""What calibration has seen so far, on disk: a killed run goes on where it was."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from calib_data.errors import DestinationError
from compress.checkpoint import Checkpoint, weights_sha256
from compress.input_stats import Tally
from compress.workspace import Workspace, open_workspace

SAVE_SECONDS = 30.0
_SHARE = 0.05  # of the time that saving may take
_SETTINGS = "settings.json"

# the layers that a tensor came into, in order → what it held
Tallies = dict[tuple[str, ...], Tally]


class CalibrationState:
    """How far calibration has come; `keep` saves it every so often, where there is a workspace."""

    def __init__(self, workspace: Workspace | None, resume: bool) -> None:
        self._workspace = workspace
        self.steps, self.samples = 0, 0
        self.tallies: Tallies = {}
        self._due = time.monotonic() + SAVE_SECONDS
        if workspace is not None and resume:
            found = workspace.load()
            self.steps, self.samples = found.step, int(found.plain["samples"])
            for index, entry in enumerate(found.plain["tallies"]):
                start = f"{index}."
                tensors = {
                    name.removeprefix(start): value
                    for name, value in found.tensors.items()
                    if name.startswith(start)
                }
                self.tallies[tuple(entry["layers"])] = Tally.from_state(tensors, entry)

    def keep(self, steps: int, samples: int, tallies: Tallies) -> None:
        """Note that `steps` batches are done; `DestinationError` where the disk is full."""
        started = time.monotonic()
        if self._workspace is None or started < self._due:
            return
        tensors, entries = {}, []
        for index, (layers, tally) in enumerate(tallies.items()):
            own, plain = tally.state()
            tensors.update({f"{index}.{name}": value for name, value in own.items()})
            entries.append({"layers": list(layers), **plain})
        self._workspace.begin()
        self._workspace.commit(steps, tensors, {"samples": samples, "tallies": entries})
        now = time.monotonic()
        self._due = now + max(SAVE_SECONDS, (now - started) / _SHARE)


@contextmanager
def calibration_state(
    folder: Path | None, checkpoint: Checkpoint, names: Sequence[str], data: str, moments: bool
) -> Iterator[CalibrationState]:
    """Yield the state in `folder`, or an empty one; the folder goes when the block succeeds.

    Raises `ConfigError`, naming the difference, for a state of other data, layers or weights, and
    `DestinationError` for a folder that holds something else.
    """
    if folder is None:
        yield CalibrationState(None, False)
        return
    if folder.is_dir() and not (folder / _SETTINGS).exists():
        others = sorted(path.name for path in folder.iterdir() if path.name != "lock")
        if others:  # it would be emptied
            raise DestinationError(
                f"{folder} holds {others[0]} and no calibration; name an empty folder"
            )
    with open_workspace(folder, resume=True) as workspace:
        settings = {
            "data": data,
            "model": weights_sha256(checkpoint.module),
            "layers": list(names),
            "moments": moments,
        }
        yield CalibrationState(workspace, workspace.claim(settings))
