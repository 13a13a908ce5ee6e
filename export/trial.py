"""One graph's trial: what PyTorch gives for every case, and how far a session is from it."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.checkpoint import Checkpoint
from compress.quantize import dequantized
from compress.signature import named_outputs
from compress.tokens import Tokens, row_alone, tokens_of
from export.cases import padded_row
from export.precision import precision
from export.sessions import run
from export.tolerance import FLOAT, HALF, Errors, Expected, errors
from export.verdict import broken

Case = Mapping[str, Tensor]
Outputs = Mapping[str, np.ndarray]
Progress = Callable[[], None]

ALONE, PADDING = "one row alone", "the same row padded and alone"


@dataclass(frozen=True)
class Trial:
    """The cases of one graph with what PyTorch gives for them."""

    part: Checkpoint
    cases: Mapping[str, Case]
    tokens: Tokens
    padded: tuple[str, int] | None  # the case and the row that are compared with `ALONE`
    expected: Mapping[str, Mapping[str, Expected]]  # output → case

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the model computes in."""
        return precision(self.part.module)

    @property
    def factor(self) -> float:
        """How many times PyTorch's own error is allowed."""
        return factor_of(self.dtype)

    @property
    def fixed_steps(self) -> bool:
        """Whether it rounds activations, and each row for itself: padding must not matter then."""
        return (self.part.quantization or {}).get("scheme") == "static"

    def outputs(self, case: str, found: Outputs) -> dict[str, np.ndarray]:
        """Return what counts of a case's outputs."""
        return {
            name: self.tokens.real(name, found[name], self.cases[case])
            for name in self.part.signature.outputs
            if name in found
        }


def make_trial(part: Checkpoint, cases: dict[str, Case], progress: Progress) -> Trial:
    """Run the cases in PyTorch: in float64, in the model's own precision, and as it rounds."""
    padded = padded_row(cases, part)
    if padded is not None:
        cases[ALONE] = row_alone(cases[padded[0]], part, padded[1])
    exact = dequantized(part) if part.quantization else part
    double = copy.deepcopy(exact.module).double()
    expected: dict[str, dict[str, Expected]] = {name: {} for name in part.signature.outputs}
    trial = Trial(part, cases, tokens_of(part), padded, expected)
    runs: list[Callable[[Case], Outputs]] = [lambda case: _in_double(double, case), exact.predict]
    if part.quantization:
        runs.append(part.predict)
    kept: dict[str, list[Outputs]] = {}
    for name, case in cases.items():
        every: list[Outputs] = [run_(case) for run_ in runs]
        if padded is not None and name in (padded[0], ALONE):
            kept[name] = every
        _expect(expected, name, [trial.outputs(name, found) for found in every])
        progress()
    if padded is not None:
        pairs = zip(kept[padded[0]], kept[ALONE])
        _expect(expected, PADDING, [_padding(trial, *pair) for pair in pairs])
    return trial


def _expect(
    expected: dict[str, dict[str, Expected]], case: str, every: list[dict[str, np.ndarray]]
) -> None:
    for name, y in every[0].items():
        found = [errors(values[name], y) for values in every[1:]]
        expected[name][case] = Expected(y, found[0], found[-1])


def _in_double(double: nn.Module, case: Case) -> dict[str, np.ndarray]:
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in case.items()}
    with torch.inference_mode():
        return {name: value.numpy() for name, value in named_outputs(double, inputs).items()}


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


def factor_of(dtype: torch.dtype) -> float:
    """Return how many times PyTorch's own error a graph in this precision may have."""
    return FLOAT if dtype == torch.float32 else HALF


# --- what is found ------------------------------------------------------------------------------


@dataclass
class Compared:
    """The errors of one session: output → case → errors; and the cases it could not run."""

    found: dict[str, dict[str, Errors]]
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
                compared.found[name][case] = errors(value, expected[case].y)

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
