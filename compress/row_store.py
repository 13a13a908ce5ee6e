"""Arrays on disk with a part per example row, filled row by row, in any order, and checked.

Rows of texts have as many entries as tokens; they lie one after another without padding. What is read
is mapped into memory; what is written is written by calls, since a mapped write to a full disk would
kill the process.
"""

import contextlib
import math
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calib_data.errors import DestinationError, ModelError
from compress.files import destination_errors, read_json, write_json

FORMAT = 1
_HEADER, _MARKS = "cache.json", "rows.npy"
_FILLED, _INPUT, _CONTENT = range(3)  # columns of the marks: 1 if stored; checksums
_SPARE = 64 << 20  # bytes that stay free for all else


@dataclass(frozen=True)
class Layout:
    """How one tensor is stored: float32 of this shape for each row, or for each token of it."""

    shape: tuple[int, ...]
    per_token: bool

    def bytes(self, rows: int, tokens: int) -> int:
        """Return the size of so many rows with so many tokens."""
        return 4 * (tokens if self.per_token else rows) * math.prod(self.shape)


class RowStore:
    """Named float32 arrays for rows of known `lengths` (tokens; ignored by layouts per row).

    Opens what `folder` holds under the same `key` and layouts, and replaces what it holds under
    others; several processes may use it at once. A part is marked as stored after it is written,
    with a checksum that is compared when it is first read: what a killed run, or a machine without
    power, left half-written counts as missing. `reached` is the share of the rows that will be
    stored. Raises `DestinationError` where the disk has no room for them.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        layouts: Mapping[str, Layout],
        lengths: np.ndarray,
        reached: float = 1.0,
    ) -> None:
        from filelock import FileLock

        self._folder, self._layouts = folder, layouts
        self._lengths = lengths
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self._checked = np.zeros(len(lengths), dtype=bool)  # written or compared by this process
        header = {
            "format": FORMAT,
            "key": key,
            "layouts": {name: asdict(layout) for name, layout in layouts.items()},
        }
        with destination_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "lock"):
                if _header(folder) != _plain(header):
                    self._clear()
                    self._check_room(reached)
                    self._create(header)
                elif not self._marks_whole():
                    self._check_room(reached)
            self._marks = _Array(folder / _MARKS)
            self._arrays = {name: _Array(folder / f"{name}.npy") for name in layouts}

    @property
    def stored(self) -> int:
        """How many rows are stored."""
        return int(self._marks.view[:, _FILLED].sum())

    def has(self, row: int, given: int) -> bool | None:
        """Whether `row` is stored for the input with the checksum `given`; None: for another one."""
        filled, known, content = self._marks.view[row]
        if not filled:
            return False
        if int(known) != given:
            return None
        if not self._checked[row]:
            self._checked[row] = checksum(self.read(row).values()) == int(content)
        return bool(self._checked[row])

    def read(self, row: int) -> dict[str, np.ndarray]:
        """Return the arrays of a row, mapped: (tokens, …) or, for layouts per row, (1, …)."""
        return {name: array.view[self._span(name, row)] for name, array in self._arrays.items()}

    def write(self, row: int, given: int, values: Mapping[str, np.ndarray]) -> None:
        """Store a row's arrays, shaped as `read` returns them.

        Raises `DestinationError` where the disk is full.
        """
        with destination_errors(self._folder):
            for name, array in self._arrays.items():
                array.write(self._span(name, row), values[name])
            mark = np.array([[1, given, checksum(values[name] for name in self._arrays)]])
            self._marks.write(slice(row, row + 1), mark)
        self._checked[row] = True

    def _span(self, name: str, row: int) -> slice:
        if not self._layouts[name].per_token:
            return slice(row, row + 1)
        return slice(int(self._starts[row]), int(self._starts[row + 1]))

    def _check_room(self, reached: float) -> None:
        rows, tokens = len(self._lengths), int(self._starts[-1])
        whole = sum(layout.bytes(rows, tokens) for layout in self._layouts.values())
        present = sum(_on_disk(path) for path in self._folder.glob("*.npy"))
        needed = int(min(reached, 1.0) * whole) - present
        free = shutil.disk_usage(self._folder).free - _SPARE
        if needed > free:
            raise DestinationError(
                f"the teacher's answers take {needed / 1e9:.1f} GB more, and {self._folder} has "
                f"{max(free, 0) / 1e9:.1f} GB free; lower --limit, leave out losses that compare "
                "layers, or do without --cache-teacher"
            )

    def _clear(self) -> None:
        left = [path.name for path in self._folder.iterdir() if path.name != "lock"]
        if left and _HEADER not in left:
            raise DestinationError(
                f"{self._folder} holds {sorted(left)[0]} and no teacher cache; name an empty folder"
            )
        for path in [*self._folder.glob("*.npy"), self._folder / _HEADER]:
            path.unlink(missing_ok=True)

    def _create(self, header: Mapping[str, Any]) -> None:
        write_json(self._folder / _HEADER, {})  # whose folder this is; what follows may be killed
        rows, tokens = len(self._lengths), int(self._starts[-1])
        np.save(self._folder / _MARKS, np.zeros((rows, 3), dtype=np.uint32))
        for name, layout in self._layouts.items():
            shape = (tokens if layout.per_token else rows, *layout.shape)
            # its size is set and nothing written: the disk fills as rows are stored
            np.lib.format.open_memmap(
                self._folder / f"{name}.npy", mode="w+", dtype=np.float32, shape=shape
            )
        made = self._folder / f"{_HEADER}.new"
        write_json(made, header)
        made.replace(self._folder / _HEADER)

    def _marks_whole(self) -> bool:
        return bool(_Array(self._folder / _MARKS).view[:, _FILLED].all())


class _Array:
    """An array on disk that is read through a map and written by calls."""

    def __init__(self, path: Path) -> None:
        try:
            self.view: np.memmap = np.lib.format.open_memmap(path, mode="r")
        except ValueError as error:  # of Python objects, which would be unpickled, or no array
            raise ModelError(f"{path} cannot be read as an array ({error}); remove it") from error
        self._file = path.open("r+b")

    def write(self, span: slice, values: np.ndarray) -> None:
        """Write `values` where `span` is."""
        values = np.ascontiguousarray(values, dtype=self.view.dtype)
        expected = (span.stop - span.start, *self.view.shape[1:])
        if values.shape != expected:
            raise ModelError(
                f"the teacher's answer has the shape {values.shape}, and {expected} was expected; "
                "it cannot be cached"
            )
        entry = self.view.itemsize * math.prod(self.view.shape[1:])
        self._file.seek(self.view.offset + span.start * entry)
        self._file.write(values.tobytes())
        self._file.flush()


def checksum(arrays: Any) -> int:
    """Return the CRC-32 of the arrays' bytes, one after another."""
    total = 0
    for array in arrays:
        total = zlib.crc32(np.ascontiguousarray(array).tobytes(), total)
    return total


def _header(folder: Path) -> Any:
    with contextlib.suppress(ModelError):
        return read_json(folder / _HEADER)
    return None


def _plain(header: Mapping[str, Any]) -> Any:
    import json

    return json.loads(json.dumps(header))


def _on_disk(path: Path) -> int:
    """Return the bytes that a file takes on the disk, which is less than its size where it is sparse."""
    return getattr(path.stat(), "st_blocks", 0) * 512
