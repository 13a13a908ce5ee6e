"""What the gate reports: every comparison with its figures, and one verdict over them."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from calib_data.errors import ParityError
from export.tolerance import FLOAT, HALF, NOISE, Errors

BROKEN = "does not run"  # how a rule's name begins where there was nothing to compare


def broken(error: BaseException) -> str:
    """Return the rule of a check that ONNX Runtime could not get to, with its reason."""
    return f"{BROKEN}: {' '.join(str(error).split())[:300] or type(error).__name__}"


@dataclass(frozen=True)
class Check:
    """One comparison: the errors found and the errors allowed."""

    graph: str
    case: str
    session: str
    output: str
    rule: str
    rms: float
    rms_allowed: float
    largest: float
    largest_allowed: float

    @classmethod
    def of(
        cls,
        where: tuple[str, str, str, str],
        rule: str,
        found: Errors,
        allowed: Errors = (0.0, 0.0),
    ) -> "Check":
        """Return the check of (graph, case, session, output)."""
        return cls(*where, rule, found[0], allowed[0], found[1], allowed[1])

    @property
    def passed(self) -> bool:
        """Whether both errors are within bounds (NaN is not)."""
        return self.rms <= self.rms_allowed and self.largest <= self.largest_allowed

    @property
    def strain(self) -> float:
        """The larger of error / allowed: above 1 where the check fails."""
        pairs = ((self.rms, self.rms_allowed), (self.largest, self.largest_allowed))
        return max(
            error / allowed if allowed else (0.0 if error == 0 else float("inf"))
            for error, allowed in pairs
        )


@dataclass(frozen=True)
class ParityReport:
    """All comparisons of a checkpoint's graphs with their source."""

    checks: tuple[Check, ...]
    diverges: str | None = None  # the first module whose output differs, where a check failed
    # int8 only, judged with fixed steps: how much padding a row changes an output, relative to its size
    padding_drift: Mapping[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether there were checks and all of them passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def worst(self) -> Check:
        """Return the check that comes nearest to its bound, or exceeds it most."""
        return max(self.checks, key=lambda check: check.strain)

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON-able dict."""
        return {
            "passed": self.passed,
            "factors": {"float": FLOAT, "half": HALF, "int8 noise": NOISE},
            "diverges": self.diverges,
            "padding_drift": dict(self.padding_drift),
            "checks": [{**asdict(check), "passed": check.passed} for check in self.checks],
        }

    def raise_if_failed(self) -> None:
        """Raise `ParityError` that names the worst check and the first module that differs."""
        if self.passed:
            return
        if not self.checks:
            raise ParityError("the graph was compared with its source on no case at all")
        worst = self.worst()
        where = f"; first differs at {self.diverges}" if self.diverges else ""
        raise ParityError(
            f"{worst.graph} disagrees with its source: {worst.output} at {worst.case} "
            f"({worst.rule}, {worst.session}) has error {worst.rms:.3g} rms, {worst.largest:.3g} at "
            f"most, allowed {worst.rms_allowed:.3g} and {worst.largest_allowed:.3g}{where}"
        )


def joined(reports: Iterable[ParityReport]) -> ParityReport:
    """Return one report over all; it diverges where the first of them does."""
    listed = list(reports)
    return ParityReport(
        tuple(check for report in listed for check in report.checks),
        next((report.diverges for report in listed if report.diverges), None),
        {name: drift for report in listed for name, drift in report.padding_drift.items()},
    )
