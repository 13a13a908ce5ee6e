import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.clock import counted, seconds_spent


def test_runs_add_up_whatever_ends_them(tmp_path: Path) -> None:
    target = tmp_path / "made"
    assert seconds_spent(target) is None
    handler = signal.getsignal(signal.SIGTERM)
    (tmp_path / "made.seconds").write_text("100.0\n")
    with pytest.raises(RuntimeError), counted(target):
        raise RuntimeError
    first = seconds_spent(target)
    with counted(target):
        pass
    second = seconds_spent(target)
    assert first is not None
    assert second is not None
    assert 100 <= first <= second < 160
    assert signal.getsignal(signal.SIGTERM) is handler


STOPPED = """
import subprocess, sys
from pathlib import Path
from benchmarks.clock import counted
with counted(Path(sys.argv[1])):
    subprocess.run([sys.executable, "-c", "print('begun', flush=True); import time; time.sleep(600)"])
"""


def test_a_stopped_run_is_counted_and_its_child_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STOPPED, str(tmp_path / "made")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.terminate()
        assert process.stdout.read() == ""  # which ends when the child has, too
    assert process.returncode == 128 + signal.SIGTERM
    assert seconds_spent(tmp_path / "made") is not None
