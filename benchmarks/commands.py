"""Commands of `onnxpress`, each in a process of its own, as a user would type them."""

import subprocess
import sys
from collections.abc import Container, Sequence

from calib_data.errors import OnnxPressError


def run_command(words: Sequence[str]) -> None:
    """Run a command, which prints to stderr. Raises `OnnxPressError` if it fails."""
    _require(words, subprocess.run(_line(words), stdout=sys.stderr).returncode)


def output_of(words: Sequence[str]) -> str:
    """Run a command and return what it printed. Raises `OnnxPressError` if it fails."""
    done = subprocess.run(_line(words), stdout=subprocess.PIPE, text=True)
    _require(words, done.returncode)
    return done.stdout


def failure_of(words: Sequence[str], fine: Container[int] = (0,)) -> str | None:
    """Run a command; return why it failed, None where its exit code is among `fine`."""
    done = subprocess.run(_line(words), stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if done.returncode in fine:
        return None
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    return f"exit code {done.returncode}: {last.removeprefix('Error: ')}"


def _line(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "onnxpress", *words]


def _require(words: Sequence[str], code: int) -> None:
    if code:
        named = " ".join(words[:3])
        raise OnnxPressError(f"`onnxpress {named} …` ended with exit code {code}; see above")
