from pathlib import Path

import pytest

from benchmarks.commands import failure_of, output_of, run_command
from benchmarks.pruning_subjects import split_lines
from calib_data.errors import DataError, OnnxPressError


def test_what_a_command_prints(capfd: pytest.CaptureFixture[str]) -> None:
    assert output_of(["--version"]).startswith("onnxpress")
    run_command(["--version"])
    assert capfd.readouterr().err.startswith("onnxpress")


def test_a_command_that_fails(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["export", "onnx", "nowhere", "-o", "out"]
    for call in (run_command, output_of):
        with pytest.raises(
            OnnxPressError, match="`onnxpress export onnx nowhere …` ended with exit code 4"
        ):
            call(words)
        assert capfd.readouterr().err.startswith("Error: ")
    reason = failure_of(words)
    assert reason is not None
    assert reason.startswith("exit code 4: ")
    assert "Error: " not in reason
    assert failure_of(words, fine=(0, 4)) is None


def test_data_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.txt; name the folder"):
        split_lines(tmp_path / "gone.txt", tmp_path / "new" / "texts")
    assert not (tmp_path / "new").exists()
