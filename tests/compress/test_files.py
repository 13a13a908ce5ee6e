import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from calib_data.errors import DestinationError, ModelError
from compress.files import (
    inside,
    read_json,
    sha256_directory,
    staged_directory,
    write_json,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(destination: Path, content: str = "new", overwrite: bool = False) -> None:
    with staged_directory(destination, overwrite) as staging:
        (staging / "file").write_text(content)


def write_half(destination: Path, overwrite: bool = False) -> None:
    with staged_directory(destination, overwrite) as staging:
        (staging / "file").write_text("half")
        raise RuntimeError("stop")


def dead_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_result_appears_only_at_the_end(tmp_path: Path) -> None:
    destination = tmp_path / "deep" / "out"
    with staged_directory(destination) as staging:
        (staging / "file").write_text("new")
        assert not destination.exists()
        assert staging.parent == destination.parent
    assert names(tmp_path / "deep") == ["out"]
    assert (destination / "file").read_text() == "new"


def test_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"):
        write_half(tmp_path / "out")
    assert names(tmp_path) == []


def test_exception_while_overwriting_leaves_the_old(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(RuntimeError, match="stop"):
        write_half(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_existing_is_refused_unless_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "stale").touch()
    with pytest.raises(DestinationError, match="pass --overwrite") as caught:
        write(tmp_path / "out")
    assert caught.value.exit_code == 8
    assert (tmp_path / "out" / "file").read_text() == "old"
    write(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["file"]


def test_leftovers_of_a_killed_run_are_cleared(tmp_path: Path) -> None:
    dead = dead_process()
    write(tmp_path / "out", "old")
    (tmp_path / f".out.partial-{dead}").mkdir()
    (tmp_path / f".out.old-{dead}").mkdir()
    write(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == ["out"]


def test_result_set_aside_by_a_killed_run_is_put_back(tmp_path: Path) -> None:
    old = tmp_path / f".out.old-{dead_process()}"
    old.mkdir()
    (old / "file").write_text("old")
    with pytest.raises(RuntimeError, match="stop"):
        write_half(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_result_put_back_is_not_overwritten_unasked(tmp_path: Path) -> None:
    old = tmp_path / f".out.old-{dead_process()}"
    old.mkdir()
    (old / "file").write_text("old")
    with pytest.raises(DestinationError, match="pass --overwrite"):
        write(tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_running_process_keeps_its_staging(tmp_path: Path) -> None:
    other = tmp_path / f".out.partial-{os.getppid()}"
    other.mkdir()
    write(tmp_path / "out")
    assert other.is_dir()


def test_destination_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DestinationError, match="choose a writable place"):
        write(tmp_path / "file" / "out")
    with pytest.raises(DestinationError, match="is a file"):
        write(tmp_path / "file", overwrite=True)
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O: No space left (os 28)")],
)
def test_full_disk(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(DestinationError, match="no space left"), staged_directory(tmp_path / "out"):
        raise error
    assert names(tmp_path) == []


def test_file_too_large(tmp_path: Path) -> None:
    with (
        pytest.raises(DestinationError, match="File too large"),
        staged_directory(tmp_path / "out"),
    ):
        raise OSError(errno.EFBIG, "File too large")
    assert names(tmp_path) == []


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="strange"), staged_directory(tmp_path / "out"):
        raise OSError(errno.EIO, "strange")


def test_directory_hash_sees_names_and_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a", "1")
    write(tmp_path / "b", "1")
    write(tmp_path / "c", "2")
    assert sha256_directory(tmp_path / "a") == sha256_directory(tmp_path / "b")
    assert sha256_directory(tmp_path / "a") != sha256_directory(tmp_path / "c")
    (tmp_path / "b" / "file").rename(tmp_path / "b" / "other")
    assert sha256_directory(tmp_path / "a") != sha256_directory(tmp_path / "b")


def test_json_round_trip_and_broken(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, "×"]}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    with pytest.raises(ModelError, match="is missing"):
        read_json(tmp_path / "y.json")
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        read_json(tmp_path / "x.json")


def test_inside(tmp_path: Path) -> None:
    assert inside(tmp_path, "1_Pooling/config.json") == tmp_path / "1_Pooling" / "config.json"
    for path in ("../x", "/etc/passwd", "a/../../x"):
        with pytest.raises(ModelError, match="leads outside"):
            inside(tmp_path, path)
