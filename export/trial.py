"""One graph's trial: what PyTorch gives for every case, and how far a session is from it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calib_data.errors import ParityError
from compress.checkpoint import Checkpoint
from compress.fresh import unchanged
from compress.quantize import dequantized
from compress.signature import named_outputs
from compress.tokens import Tokens, row_alone, tokens_of
from export.cases import padded_row
from export.finite import not_finite
from export.precision import precision
from export.rounding import Rounded, exactly
from export.sessions import run
from export.tolerance import (
    DRAWS,
    FIRST_DRAWS,
    HOPELESS,
    Deviation,
    Errors,
    Finding,
    Scale,
    deviation,
    errors,
    finding,
    scale_for,
)
from export.verdict import broken

Case = Mapping[str, Tensor]
Outputs = Mapping[str, np.ndarray]
Progress = Callable[[], None]

ALONE, PADDING = "one row alone", "the same row padded and alone"
SESSIONS = 2  # each graph is judged as it is written and as the runtime optimizes it


@dataclass(frozen=True)
class Expected:
    """One output of one case: its true value, how rounding moves it, and the noise of int8."""

    y: np.ndarray
    scale: Scale  # of the model with its weights taken as floats
    noise: Errors = (0.0, 0.0)  # of the model as it is, where that is int8


@dataclass(frozen=True)
class Trial:
    """The cases of one graph with what PyTorch gives for them."""

    part: Checkpoint
    exact: Checkpoint  # the same with its weights as floats
    cases: Mapping[str, Case]
    tokens: Tokens
    padded: tuple[str, int] | None  # the case and the row that are compared with `ALONE`
    expected: dict[str, dict[str, Expected]]  # output → case

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the model computes in."""
        return precision(self.part.module)

    @property
    def fixed_steps(self) -> bool:
        """Whether it rounds activations, and each row for itself: padding must not matter then."""
        return (self.part.quantization or {}).get("scheme") == "static"

    @property
    def comparisons(self) -> int:
        """How many numbers are judged in all sessions: each case, its rows and their largest."""
        scales = [e.scale for cases in self.expected.values() for e in cases.values()]
        return SESSIONS * sum(1 + 2 * scale.floor.rows.size for scale in scales)

    def outputs(self, case: str, found: Outputs) -> dict[str, np.ndarray]:
        """Return what counts of a case's outputs."""
        return {
            name: self.tokens.real(name, found[name], self.cases[case])
            for name in self.part.signature.outputs
            if name in found
        }

    def judge(self, output: str, case: str, found: Deviation, patient: bool = True) -> Finding:
        """Return what was found beside what is allowed; the patient look again before they condemn."""
        scale = self.expected[output][case].scale
        told = finding(found, scale, self.comparisons)
        while patient and not told.passed and told.strain < HOPELESS and scale.draws < DRAWS:
            self.draw(case)
            told = finding(found, scale, self.comparisons)
        return told

    def draw(self, case: str) -> None:
        """Run a case once more, rounding at random, and add that to the scales of its outputs."""
        names = [case] if self.padded is None or case != PADDING else [self.padded[0], ALONE]
        first = next(cases[case] for cases in self.expected.values() if case in cases)
        seed = first.scale.draws
        with Rounded(seed):
            runs = [_run(self.exact, self.cases[name]) for name in names]
        values = _padding(self, *runs) if case == PADDING else self.outputs(case, runs[0])
        for name, value in values.items():
            expected = self.expected[name][case]
            expected.scale.add(deviation(value, expected.y))


def make_trial(part: Checkpoint, cases: dict[str, Case], progress: Progress) -> Trial:
    """Run the cases in PyTorch: in float64, several times as it may round, and in int8 where it is.

    Raises `ParityError` where the model itself overflows in its own precision.
    """
    padded = padded_row(cases, part)
    if padded is not None:
        cases[ALONE] = row_alone(cases[padded[0]], part, padded[1])
    exact = dequantized(part) if part.quantization else part
    trial = Trial(
        part, exact, cases, tokens_of(part), padded, {name: {} for name in part.signature.outputs}
    )
    kept: dict[str, Outputs] = {}
    for name, case in cases.items():
        with exactly():
            found = _run(exact, case)
        if padded is not None and name in (padded[0], ALONE):
            kept[name] = found
        noisy = trial.outputs(name, _run(part, case)) if part.quantization else {}
        _expect(trial, name, trial.outputs(name, found), noisy)
        progress()
    if padded is not None:
        _expect(trial, PADDING, _padding(trial, kept[padded[0]], kept[ALONE]), {})
    return trial


def _expect(
    trial: Trial, case: str, exact: Mapping[str, np.ndarray], noisy: Mapping[str, np.ndarray]
) -> None:
    for name, y in exact.items():
        noise = errors(noisy[name], y) if name in noisy else (0.0, 0.0)
        trial.expected[name][case] = Expected(y, scale_for(y, trial.dtype), noise)
    for _ in range(FIRST_DRAWS if exact else 0):
        trial.draw(case)
    for name in exact:
        if not trial.expected[name][case].scale.finite:
            raise ParityError(not_finite(trial.exact, trial.cases.get(case, {}), case, name))


def _run(checkpoint: Checkpoint, case: Case) -> dict[str, np.ndarray]:
    """Return a model's outputs, as a model gives them that nothing was run on before."""
    with torch.inference_mode(), unchanged(checkpoint.module):
        outputs = named_outputs(checkpoint.module, case)
    return {
        name: (value if value.dtype == torch.float64 else value.float()).numpy()
        for name, value in outputs.items()
    }


def _padding(trial: Trial, padded: Outputs, alone: Outputs) -> dict[str, np.ndarray]:
    """Return how much padding changes the outputs of one row; where shapes differ, nothing is said."""
    assert trial.padded is not None
    case, row = trial.padded
    made = {}
    for name in trial.part.signature.outputs:
        if name not in padded or name not in alone:
            continue
        one = trial.tokens.row(name, padded[name], trial.cases[case], row)
        if one.shape == alone[name].shape:
            made[name] = one.astype(np.float64) - alone[name]
    return made


# --- what is found ------------------------------------------------------------------------------


@dataclass
class Compared:
    """How far one session is: output → case; and the cases it could not run."""

    found: dict[str, dict[str, Deviation]]
    failures: dict[str, str] = field(default_factory=dict)
    drift: dict[str, float] = field(default_factory=dict)


def compare(trial: Trial, session: Any, progress: Progress) -> Compared:
    """Run every case in a session and compare."""
    compared = Compared({name: {} for name in trial.expected})
    kept: dict[str, Outputs] = {}

    def keep(case: str, outputs: Outputs) -> None:
        for name, expected in trial.expected.items():
            if case in expected:
                value = outputs.get(name, np.zeros(0))
                compared.found[name][case] = deviation(value, expected[case].y)

    for name, case in trial.cases.items():
        try:
            outputs = run(session, case)
        except Exception as error:  # the pybind exceptions have no common base
            compared.failures[name] = broken(error)
            outputs = {}
        if trial.padded is not None and name in (trial.padded[0], ALONE):
            kept[name] = outputs
        keep(name, trial.outputs(name, outputs))
        progress()
    if trial.padded is not None and all(kept.values()):
        moved = _padding(trial, kept[trial.padded[0]], kept[ALONE])
        keep(PADDING, moved)
        for name, difference in moved.items():
            size, _ = errors(kept[ALONE][name], np.zeros_like(kept[ALONE][name]))
            compared.drift[name] = errors(difference, np.zeros_like(difference))[0] / (size or 1.0)
    return compared
