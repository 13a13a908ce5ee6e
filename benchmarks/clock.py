"""How long something took in all, over the runs that were stopped and taken up again."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


def seconds_spent(target: Path) -> float | None:
    """Return the seconds that making `target` took so far, None if nobody has counted."""
    clock = _clock_of(target)
    return float(clock.read_text()) if clock.is_file() else None


@contextmanager
def counted(target: Path) -> Iterator[None]:
    """Add the seconds spent inside to those of `target`, also when it ends by an error or SIGTERM.

    SIGTERM becomes `SystemExit`, upon which `subprocess.run` ends its child. In the main thread alone.
    """
    before, started = seconds_spent(target) or 0.0, time.monotonic()
    former = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
        _clock_of(target).write_text(f"{before + time.monotonic() - started:.1f}\n")


def _leave(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _clock_of(target: Path) -> Path:
    # beside what is made
    return target.with_name(f"{target.name}.seconds")
