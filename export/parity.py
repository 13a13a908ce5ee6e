"""The gate: a graph that disagrees with its source is not published.

The rule has no constant per model. For every case and output, with y the PyTorch model in float64:

- float: error(graph) ≤ FLOAT × max(error(PyTorch float32), floor), for the root mean square and for
  the largest element, where floor is one rounding step of the output's largest value. A correct
  graph does the same arithmetic in another order, so its error is PyTorch's own up to a small factor.
- int8 is checked twice. First without the rounding of activations (`linearize`): the graph's own
  weights and scales, in float, under the float rule. Then as it ships: its noise against the
  unrounded model may exceed the PyTorch simulation's by at most the factor NOISE. Elementwise
  comparison does not fit there: a difference of one rounding error flips a quantization step, and
  the flips of one layer cause more in the next.
- embedding tables are compared bit by bit, since no set of cases visits every row.
"""

import copy
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from calib_data.embedded import pydoc_sentences
from calib_data.errors import ParityError
from compress.checkpoint import Checkpoint
from compress.quantize import dequantized
from compress.signature import named_outputs
from export.linearize import linearize_
from export.localize import first_divergence
from export.sessions import open_session, run
from export.tolerance import allowed_errors, errors

FLOAT = 4.0
NOISE = 1.25
_LONGEST = 512  # for models without a limit


@dataclass(frozen=True)
class Check:
    """One comparison: the errors found and the errors allowed."""

    case: str
    session: str
    output: str
    rule: str
    rms: float
    rms_allowed: float
    largest: float
    largest_allowed: float

    @property
    def passed(self) -> bool:
        """Whether both errors are within bounds (NaN is not)."""
        return self.rms <= self.rms_allowed and self.largest <= self.largest_allowed


@dataclass(frozen=True)
class ParityReport:
    """All comparisons of one graph with its source."""

    checks: tuple[Check, ...]
    diverges: str | None = None  # the first module whose output differs, where a check failed

    @property
    def passed(self) -> bool:
        """Whether there were checks and all of them passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def worst(self) -> Check:
        """Return the check that comes nearest to its bound, or exceeds it most."""
        return max(self.checks, key=_strain)

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON-able dict."""
        return {
            "passed": self.passed,
            "factors": {"float": FLOAT, "noise": NOISE},
            "diverges": self.diverges,
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
            f"the graph disagrees with its source: {worst.output} at {worst.case} ({worst.rule}, "
            f"{worst.session}) has error {worst.rms:.3g} rms, {worst.largest:.3g} at most, "
            f"allowed {worst.rms_allowed:.3g} and {worst.largest_allowed:.3g}{where}"
        )


def check_parity(
    checkpoint: Checkpoint,
    model: Path,
    provider: str = "cpu",
    progress: Callable[[], None] = lambda: None,
) -> ParityReport:
    """Compare the graph in `model` with `checkpoint` on every case, optimized and not."""
    cases = dict(parity_cases(checkpoint))
    checks: list[Check] = [*_tables(checkpoint, ir.load(model))]
    exact = dequantized(checkpoint) if checkpoint.quantization else checkpoint
    double = copy.deepcopy(exact.module).double()
    references = {}
    for name, case in cases.items():
        references[name] = (_reference(double, case), exact.predict(case))
        progress()
    with tempfile.TemporaryDirectory() as folder:
        plain = _linearized(model, Path(folder)) if checkpoint.quantization else model
        for session_name, optimize in (("plain", False), ("optimized", True)):
            session = open_session(plain, provider, optimize=optimize)
            for name, case in cases.items():
                found = run(session, case)
                y, own = references[name]
                checks += [
                    _float_check(name, session_name, output, found[output], y[output], own[output])
                    for output in checkpoint.signature.outputs
                ]
                progress()
        diverges = None
        if not all(check.passed for check in checks):
            worst = max((c for c in checks if c.case in cases), key=_strain, default=None)
            if worst is not None and not worst.passed:
                diverges = first_divergence(exact, double, plain, cases[worst.case], FLOAT)
    if checkpoint.quantization:
        checks += _noise_checks(checkpoint, model, provider, cases, references)
    return ParityReport(tuple(checks), diverges)


def parity_cases(checkpoint: Checkpoint) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield named inputs: several batch sizes, lengths with the longest, ragged padding, real text."""
    signature = checkpoint.signature
    if not signature.has_sequence:
        for seed, batch in enumerate((1, 3, 8)):
            yield f"batch {batch}", signature.sample(batch, seed=seed)
        return
    longest = signature.longest or _LONGEST
    shapes = [(1, 1), (3, 2), (1, 11), (3, 12), (8, 37), (1, longest)]
    for seed, (batch, sequence) in enumerate(
        dict.fromkeys((b, min(s, longest)) for b, s in shapes)
    ):
        ragged = batch > 1
        name = f"batch {batch} × {sequence}{', ragged' if ragged else ''}"
        yield name, signature.sample(batch, sequence, seed=seed, ragged=ragged)
    if callable(checkpoint.processor) and checkpoint.signature.inputs[0].name == "input_ids":
        texts = pydoc_sentences()[:8]
        if getattr(checkpoint.processor, "pad_token", None) is None:
            texts = texts[:1]
        encoded = checkpoint.processor(
            texts,
            padding=len(texts) > 1,
            truncation=True,
            max_length=min(64, longest),
            return_tensors="pt",
        )
        if all(name in encoded for name in signature.names):
            yield "real text", {name: encoded[name] for name in signature.names}


def _reference(double: nn.Module, case: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in case.items()}
    with torch.inference_mode():
        return {name: value.numpy() for name, value in named_outputs(double, inputs).items()}


def _float_check(
    case: str, session: str, output: str, found: np.ndarray, y: np.ndarray, own: np.ndarray
) -> Check:
    return Check(
        case, session, output, "float", *_pairs(errors(found, y), allowed_errors(y, own, FLOAT))
    )


def _pairs(
    found: tuple[float, float], allowed: tuple[float, float]
) -> tuple[float, float, float, float]:
    return found[0], allowed[0], found[1], allowed[1]


def _noise_checks(
    checkpoint: Checkpoint,
    model: Path,
    provider: str,
    cases: Mapping[str, Mapping[str, Tensor]],
    references: Mapping[str, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]],
) -> list[Check]:
    """Return one check per output and session: noise pooled over all cases, against the simulation's."""
    simulated = {name: checkpoint.predict(case) for name, case in cases.items()}
    checks = []
    for session_name, optimize in (("plain", False), ("optimized", True)):
        session = open_session(model, provider, optimize=optimize)
        found = {name: run(session, case) for name, case in cases.items()}
        for output in checkpoint.signature.outputs:
            mine, theirs = (
                np.array(
                    [errors(made[name][output], references[name][0][output]) for name in cases]
                )
                for made in (found, simulated)
            )
            pooled = [float(np.sqrt(np.mean(e[:, 0] ** 2))) for e in (mine, theirs)]
            largest = [float(e[:, 1].max()) for e in (mine, theirs)]
            checks.append(
                Check(
                    "all cases",
                    session_name,
                    output,
                    "int8 noise",
                    pooled[0],
                    NOISE * pooled[1],
                    largest[0],
                    2 * NOISE * largest[1],
                )
            )
    return checks


def _tables(checkpoint: Checkpoint, model: ir.Model) -> Iterator[Check]:
    """Yield a check for each lookup table in the graph that has the shape of one of the model's."""
    own: dict[tuple[int, ...], set[str]] = {}
    for value in checkpoint.module.state_dict().values():
        if value.dim() in (1, 2):  # 1: the scales of an int8 table
            own.setdefault(_table_shape(value.numpy()), set()).add(_digest(value.numpy()))
    for node in model.graph:
        table = node.inputs[0] if node.op_type == "Gather" else None
        source = table.producer() if table is not None else None
        if source is not None and source.op_type == "Unsqueeze":
            table = source.inputs[0]
        if table is None or table.const_value is None:
            continue
        array = table.const_value.numpy()
        if array.ndim == 0 or array.dtype == np.int64:
            continue  # shape arithmetic
        if _table_shape(array) in own:
            wrong = 0.0 if _digest(array) in own[_table_shape(array)] else float("inf")
            yield Check("weights", "file", str(table.name), "same bits", wrong, 0.0, wrong, 0.0)


def _table_shape(array: np.ndarray) -> tuple[int, ...]:
    """Return the shape of a table; scales are a table of width 1."""
    return (array.shape[0], array[0].size) if array.size else (0, 0)


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _linearized(model: Path, folder: Path) -> Path:
    graph = ir.load(model)
    linearize_(graph)
    ir.save(graph, folder / "linear.onnx", external_data="linear.onnx.data")
    return folder / "linear.onnx"


def _strain(check: Check) -> float:
    pairs = ((check.rms, check.rms_allowed), (check.largest, check.largest_allowed))
    return max(
        error / allowed if allowed else (0.0 if error == 0 else float("inf"))
        for error, allowed in pairs
    )
