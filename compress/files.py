"""Writing directories that are whole or absent, and fingerprints of what is in them."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import psutil

from calib_data.errors import DestinationError, ModelError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EROFS, errno.EFBIG}  # the latter: 4 GB on FAT, or a limit of the user's
_UNUSABLE = (PermissionError, NotADirectoryError, FileExistsError, IsADirectoryError)


@contextlib.contextmanager
def staged_directory(destination: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside `destination` that replaces it when the block succeeds.

    The result appears by one rename, so a killed run leaves the old state or the new one, never
    half of either; what an earlier killed run left beside the destination is cleared away.

    Raises `DestinationError` where the destination exists (without `overwrite`), cannot be written,
    or the disk is full.
    """
    destination = Path(destination).absolute()
    if destination.is_file():
        raise DestinationError(f"{destination} is a file; name a directory")
    staging = destination.parent / f".{destination.name}.partial-{os.getpid()}"
    with destination_errors(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        _recover(destination)
        if destination.exists() and not overwrite:
            raise DestinationError(f"{destination} exists; pass --overwrite to replace it")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
    try:
        with destination_errors(destination):
            yield staging
            sync_directory(staging)
            _replace(staging, destination)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def destination_errors(destination: Path) -> Iterator[None]:
    """Turn a full disk or a read-only place into a `DestinationError` that names it."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DestinationError(
                f"no space left while writing {destination}; free some or choose another place"
            ) from error
        if isinstance(error, _UNUSABLE) or error.errno in _REFUSED:
            raise DestinationError(
                f"cannot write {destination} ({error.strerror}); choose a writable place"
            ) from error
        raise
    except Exception as error:
        # safetensors and onnx wrap the operating system's error in their own
        if "No space left" in str(error):
            raise DestinationError(
                f"no space left while writing {destination}; free some or choose another place"
            ) from error
        raise


def _replace(staging: Path, destination: Path) -> None:
    if not destination.exists():
        staging.rename(destination)
        return
    old = destination.parent / f".{destination.name}.old-{os.getpid()}"
    destination.rename(old)
    staging.rename(destination)
    shutil.rmtree(old, ignore_errors=True)


def _recover(destination: Path) -> None:
    """Undo what a killed run left: put back a set-aside result, drop half-written ones."""
    for kind in ("old", "partial"):
        for left in destination.parent.glob(f".{destination.name}.{kind}-*"):
            owner = left.name.rpartition("-")[2]
            if owner.isdigit() and int(owner) != os.getpid() and psutil.pid_exists(int(owner)):
                continue  # another run is at work here
            if kind == "old" and not destination.exists():
                left.rename(destination)
            else:
                shutil.rmtree(left, ignore_errors=True)


def sync_directory(directory: Path) -> None:
    """Wait until all files below `directory`, and their names, are on the disk."""
    for path in (*directory.rglob("*"), directory):
        if path.is_file() or os.name == "posix":  # elsewhere a directory cannot be opened
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_directory(directory: Path, without: Collection[str] = ()) -> str:
    """Return the hex sha256 over the names and bytes of the files below `directory`.

    Files called as `without` says do not count: logs, which hold times.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in directory.rglob("*") if p.is_file() and p.name not in without):
        digest.update(f"{path.relative_to(directory)}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Return the JSON value in `path`; a `ModelError` names a file that is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error


def inside(directory: Path, relative: str) -> Path:
    """Return directory/relative; a `ModelError` if that leaves the directory."""
    path = (directory / relative).resolve()
    if not path.is_relative_to(directory.resolve()):
        raise ModelError(f"{directory}: the path {relative!r} leads outside the model's folder")
    return path
