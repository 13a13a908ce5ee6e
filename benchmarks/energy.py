"""What energy the machine says it has used: Intel's and AMD's RAPL for processors, NVML for GPUs."""

import contextlib
from pathlib import Path

from benchmarks import gpus

_RAPL = Path("/sys/class/powercap")


class Meter:
    """The joules that a machine has used since some moment; None where it does not tell.

    Processors count per package, the whole machine's work together, in microjoules that wrap around.
    """

    def __init__(self, provider: str = "cpu", rapl: Path = _RAPL) -> None:
        self._gpus = gpus.energy_meters() if provider != "cpu" else []
        self._packages: list[tuple[Path, int]] = []
        self._last: list[int] = []
        self._passed: list[int] = []  # by each package, in microjoules
        for folder in sorted(rapl.glob("*-rapl:?")):
            with contextlib.suppress(OSError, ValueError):
                if not (folder / "name").read_text().startswith("package"):
                    continue  # "psys" holds the packages and more
                limit = int((folder / "max_energy_range_uj").read_text())
                self._last.append(int((folder / "energy_uj").read_text()))  # root's alone in places
                self._packages.append((folder / "energy_uj", limit))
                self._passed.append(0)

    def joules(self) -> float | None:
        """Return the energy used since some moment, of all that tell: differences count."""
        if not self._packages and not self._gpus:
            return None
        for i, (path, limit) in enumerate(self._packages):
            now = int(path.read_text())
            wrapped = limit if now < self._last[i] else 0
            self._passed[i] += now - self._last[i] + wrapped
            self._last[i] = now
        used = sum(self._passed) / 1e6
        return used + sum(gpu() / 1e3 for gpu in self._gpus)
