"""What the gate reports: every comparison with its figures, and one verdict over them."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from calib_data.errors import ParityError
from export.tolerance import DRAWS, FALSE_ALARMS, NOISE, Errors, Finding

BROKEN = "does not run"  # how a rule's name begins where there was nothing to compare


def broken(error: BaseException) -> str:
    """Return the rule of a check that ONNX Runtime could not get to, with its reason."""
    return f"{BROKEN}: {' '.join(str(error).split())[:300] or type(error).__name__}"


@dataclass(frozen=True, kw_only=True)
class Check(Finding):
    """One comparison: where it was made, by which rule, and what was found."""

    graph: str
    case: str
    session: str
    output: str
    rule: str

    @classmethod
    def of(
        cls,
        where: tuple[str, str, str, str],
        rule: str,
        found: Errors,
        allowed: Errors = (0.0, 0.0),
    ) -> "Check":
        """Return the check of (graph, case, session, output) of two errors: of all, and the largest."""
        pairs = zip(found, allowed)
        return cls.judged(where, rule, Finding(*(x for pair in pairs for x in pair)))

    @classmethod
    def judged(cls, where: tuple[str, str, str, str], rule: str, found: Finding) -> "Check":
        """Return the check of (graph, case, session, output)."""
        graph, case, session, output = where
        return cls(**vars(found), graph=graph, case=case, session=session, output=output, rule=rule)


@dataclass(frozen=True)
class ParityReport:
    """All comparisons of a checkpoint's graphs with their source."""

    checks: tuple[Check, ...]
    diverges: str | None = None  # the first module whose output differs, where a check failed
    # int8 only, judged with fixed steps: how much padding a row changes an output, relative to its size
    padding_drift: Mapping[str, float] = field(default_factory=dict)
    branch: str | None = None  # that it is right on one side of a length alone
    witness: Mapping[str, Any] | None = None  # the library that was asked, or why none was

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
            "rule": {"false alarms": FALSE_ALARMS, "draws": DRAWS, "int8 noise": NOISE},
            "diverges": self.diverges,
            "branch": self.branch,
            "witness": None if self.witness is None else dict(self.witness),
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
        where += f": {self.branch}" if self.branch else ""
        raise ParityError(
            f"{worst.graph} disagrees with its source: {worst.output} at {worst.case} "
            f"({worst.rule}, {worst.session}) {_told(worst)}{where}"
        )


def _told(check: Check) -> str:
    """Return what is wrong with it, in the figure that is furthest beyond its bound."""
    if not math.isfinite(check.rms):
        return "is not finite where the source is, or has another shape"
    figures = {
        "rms": (check.rms, check.rms_allowed),
        "rms in one row": (check.row, check.row_allowed),
        "at most": (check.largest, check.largest_allowed),
    }
    name = max(figures, key=lambda n: figures[n][0] / (figures[n][1] or math.ulp(0.0)))
    error, allowed = figures[name]
    return f"has error {error:.3g} {name}, allowed {allowed:.3g}"


def joined(reports: Iterable[ParityReport]) -> ParityReport:
    """Return one report over all; it diverges where the first of them does."""
    listed = list(reports)
    return ParityReport(
        tuple(check for report in listed for check in report.checks),
        next((report.diverges for report in listed if report.diverges), None),
        {name: drift for report in listed for name, drift in report.padding_drift.items()},
        next((report.branch for report in listed if report.branch), None),
    )
