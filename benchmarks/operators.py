"""Micro-benchmark of every operator choice that the exporter makes, against its alternatives.

    python -m benchmarks.operators [--provider cpu] [--only attention] [-o DIR]

Each alternative is a tiny graph in a process of its own. All of one choice must agree on the same
data before they are timed, in rounds. Times are told as ratios to what the exporter emits.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from benchmarks.config import usable_cores
from benchmarks.operator_choices import CHOICES, COMPARED, SHARED, Choice, build
from benchmarks.report import Environment
from benchmarks.runtimes import Arrays, Loaded, Place, Runtime, Source
from benchmarks.statistics import MINIMUM_ROUNDS, percentile, pooled, round_ratios, sign_interval
from benchmarks.worker import Variant, Worker, WorkerError
from calib_data.errors import OnnxPressError
from export.sessions import PROVIDERS, open_session


@dataclass(frozen=True)
class Timing:
    """What an alternative takes at one shape."""

    milliseconds: float  # of one operator, the median
    ratio: float  # to the time of what the exporter emits, the median over rounds
    interval: tuple[float, float]  # 95 %, by the sign test
    fastest: bool


@dataclass(frozen=True)
class Row:
    """One alternative's result."""

    alternative: str
    emitted: bool
    runs_as: Mapping[str, int]  # operators of one copy once ONNX Runtime has optimized the graph
    error: float | None  # largest difference to the first alternative, over its largest value
    failure: str | None  # why it was not timed
    timings: Mapping[str, Timing]  # by shape


@dataclass
class _Subject:
    """An alternative being measured."""

    worker: Worker
    allowed: float
    runs_as: Mapping[str, int]
    error: float | None = None
    failure: str | None = None


def _no_description(model: str) -> Source:
    raise NotImplementedError("an operator's graph describes no source")


def _open(model: str, place: Place) -> Loaded:
    """Open a graph with its buffers bound once, so that a run is the operators and little else."""
    session = open_session(Path(model), place.provider, place.threads)
    device = place.device
    notes = session.get_modelmeta().custom_metadata_map
    shared = json.loads(notes[SHARED])
    outputs = [item.name for item in session.get_outputs()]

    def prepare(batch: Arrays) -> Any:
        bound = session.io_binding()
        values = {n: ort.OrtValue.ortvalue_from_numpy(v, device, 0) for n, v in batch.items()}
        for name, value in values.items():
            bound.bind_ortvalue_input(name, value)
        owners = {output: values[past] for past, output in shared.items()}
        for name in outputs:  # the first run makes the buffers that all others write to
            if name not in owners:
                bound.bind_output(name, device)
            else:
                bound.bind_ortvalue_output(name, owners[name])
        session.run_with_iobinding(bound)
        made = bound.get_outputs()
        bound.clear_binding_outputs()
        for name, value in zip(outputs, made):
            bound.bind_ortvalue_output(name, value)
        return bound

    def run(bound: Any) -> Any:
        session.run_with_iobinding(bound)
        return bound

    def collect(bound: Any) -> Arrays:
        values = dict(zip(outputs, bound.get_outputs()))
        compared = json.loads(notes[COMPARED])
        return {str(i): values[name].numpy() for i, name in enumerate(compared)}

    return Loaded(prepare, run, collect, tuple(session.get_providers()))


OPERATORS = Runtime(_no_description, _open)


def measure(
    choice: Choice,
    provider: str = "cpu",
    *,
    threads: int | None = None,
    rounds: int = MINIMUM_ROUNDS,
    seconds: float = 0.1,
) -> list[Row]:
    """Return one row per alternative of `choice`, each timed once per round at every shape.

    One that fails, or computes something else than the first, is a row with its reason. Raises
    `ProviderError` where the provider is not obtained.
    """
    names = list(choice.alternatives)
    timings: dict[str, dict[str, Timing]] = {name: {} for name in names}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        subjects = {}
        for index, name in enumerate(names):
            path = folder / f"{index}.onnx"
            onnx.save(build(choice, name, choice.shapes[0]).model(), path)
            variant = Variant(name, str(path), "benchmarks.operators:OPERATORS")
            worker = stack.enter_context(
                Worker(variant, Place(provider, threads or usable_cores()))
            )
            allowed = choice.alternatives[name].error
            subjects[name] = _Subject(worker, allowed, runs_as(path, provider, choice.copies))
            _attempt(subjects[name], worker.load)
        for shape in choice.shapes:
            inputs = {name: _feed(choice, name, shape) for name in names}
            _compare(subjects, inputs)
            spent = _time(subjects, inputs, rounds, seconds)
            found = _judge(spent, choice.chosen.get(provider), choice.copies)
            for name, timing in found.items():
                timings[name]["×".join(map(str, shape))] = timing
    return [
        Row(
            name,
            choice.chosen.get(provider) == name,
            subject.runs_as,
            subject.error,
            subject.failure,
            timings[name],
        )
        for name, subject in subjects.items()
    ]


def runs_as(path: Path, provider: str, copies: int) -> dict[str, int]:
    """Return the operators that ONNX Runtime makes of one of the copies; none where it fails."""
    try:
        options = open_session(path, provider).get_session_options()
    except OnnxPressError:
        return {}
    optimized = path.with_suffix(".optimized.onnx")
    options.optimized_model_filepath = str(optimized)
    ort.InferenceSession(str(path), options, providers=[PROVIDERS[provider]])
    counts = Counter(node.op_type for node in onnx.load(optimized).graph.node)
    optimized.unlink()
    return {name: -(-count // copies) for name, count in sorted(counts.items())}


def _feed(choice: Choice, alternative: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: fed.array for name, fed in build(choice, alternative, shape).inputs.items()}


def _attempt(subject: _Subject, action: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `action` does, or None for a subject that has failed, now or before."""
    if subject.failure is None:
        try:
            return action(*arguments)
        except WorkerError as error:
            subject.failure = str(error)
    return None


def _compare(subjects: Mapping[str, _Subject], inputs: Mapping[str, Arrays]) -> None:
    """Fail the subjects whose outputs are not those of the first one that works."""
    reference: Mapping[str, np.ndarray] | None = None
    for name, subject in subjects.items():
        outputs = _attempt(subject, subject.worker.predict, inputs[name])
        if outputs is None:
            continue
        reference = reference or outputs
        error = largest_difference(outputs, reference)
        subject.error = max(error, subject.error or 0.0)
        if not error <= subject.allowed:
            subject.failure = f"differs by {error:.2g}; {subject.allowed:.2g} is allowed"


def largest_difference(outputs: Arrays, reference: Arrays) -> float:
    """Return the largest difference of any output over its largest value; infinite for other shapes."""
    errors = [0.0]
    for name, expected in reference.items():
        if outputs[name].shape != expected.shape:
            return float("inf")
        errors.append(float(np.abs(outputs[name] - expected).max() / np.abs(expected).max()))
    return max(errors)


def _time(
    subjects: Mapping[str, _Subject], inputs: Mapping[str, Arrays], rounds: int, seconds: float
) -> dict[str, list[list[float]]]:
    """Return the seconds of each call, by alternative and round."""
    for name, subject in subjects.items():
        _attempt(subject, subject.worker.warm_up, [inputs[name]], 10 * seconds)
    spent: dict[str, list[list[float]]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, subject in subjects.items():
            calls = _attempt(subject, subject.worker.time, [inputs[name]], seconds)
            spent[name].append(calls or [])
    return {name: calls for name, calls in spent.items() if subjects[name].failure is None}


def _judge(
    spent: Mapping[str, list[list[float]]], emitted: str | None, copies: int
) -> dict[str, Timing]:
    """Return the timings against those of what is emitted, or of the first where nothing is."""
    if not spent:
        return {}
    baseline = spent.get(emitted or "", next(iter(spent.values())))
    medians = {name: percentile(pooled(calls), 50) for name, calls in spent.items()}
    best = min(medians, key=medians.__getitem__)
    found = {}
    for name, calls in spent.items():
        ratios = round_ratios(baseline, calls)
        found[name] = Timing(
            1000 * medians[name] / copies,
            percentile(ratios, 50),
            sign_interval(ratios),
            name == best,
        )
    return found


def render(results: Mapping[str, list[Row]], environment: Environment) -> str:
    """Return the results as Markdown: the fastest in bold, what the exporter emits with an arrow."""
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    lines = [
        f"{environment.cpu}, {environment.threads} threads, {environment.provider}; {versions}; "
        f"load before: {environment.load_average}.",
        "",
        "Milliseconds of one operator, and how many times those of the one that the exporter emits "
        "(→; else of the first), with the 95 % interval; the fastest in bold.",
    ]
    axes = {choice.name: choice.axes for choice in CHOICES}
    for name, rows in results.items():
        shapes = list(dict.fromkeys(shape for row in rows for shape in row.timings))
        lines += ["", f"## {name}", "", f"| {axes[name]} | runs as | {' | '.join(shapes)} |"]
        lines.append("|---" * (2 + len(shapes)) + "|")
        for row in rows:
            kernels = ", ".join(f"{n} {k}" if n > 1 else k for k, n in row.runs_as.items())
            cells = [_cell(row, row.timings.get(shape)) for shape in shapes]
            arrow = "→ " if row.emitted else ""
            lines.append(f"| {arrow}{row.alternative} | {kernels} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(row: Row, timing: Timing | None) -> str:
    if timing is None:
        return row.failure or "–"
    text = f"{timing.milliseconds:.3g} ms"
    if timing.interval != (1.0, 1.0):  # which only a time against itself has
        low, high = map(_ratio, timing.interval)
        text += f", {_ratio(timing.ratio)} × ({low}–{high})"
    return f"**{text}**" if timing.fastest else text


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def to_json(results: Mapping[str, list[Row]], environment: Environment) -> dict[str, Any]:
    """Return the results as JSON gives them back."""
    rows = {
        name: [
            {**vars(row), "timings": {shape: vars(t) for shape, t in row.timings.items()}}
            for row in rows
        ]
        for name, rows in results.items()
    }
    return {"environment": vars(environment), "choices": rows}


def main(words: Sequence[str] | None = None) -> None:
    """Time the operators that the exporter emits against their alternatives; print Markdown."""
    parser = argparse.ArgumentParser(prog="benchmarks.operators", description=main.__doc__)
    add = parser.add_argument
    add("--provider", choices=list(PROVIDERS), default="cpu")
    add("--only", action="append", default=[], help="choices whose names hold this text")
    add("--rounds", type=int, default=10, help=f"at least {MINIMUM_ROUNDS}")
    add("--seconds", type=float, default=0.1, help="per alternative and round")
    add("--threads", type=int, default=usable_cores(), help="per alternative; default: all cores")
    add("-o", "--out", type=Path, help="directory for operators.md and operators.json")
    asked = parser.parse_args(words)
    wanted = [c for c in CHOICES if not asked.only or any(part in c.name for part in asked.only)]
    if not wanted:
        parser.error(f"--only names none of: {'; '.join(choice.name for choice in CHOICES)}")
    if asked.rounds < MINIMUM_ROUNDS:
        parser.error(f"--rounds must be at least {MINIMUM_ROUNDS}, got {asked.rounds}")
    environment = Environment.here(asked.provider, asked.threads)
    settings = {name: getattr(asked, name) for name in ("threads", "rounds", "seconds")}
    results = {}
    try:
        for choice in wanted:
            print(choice.name, file=sys.stderr)
            results[choice.name] = measure(choice, asked.provider, **settings)
    except OnnxPressError as error:
        parser.exit(error.exit_code, f"Error: {error}\n")
    text = render(results, environment)
    print(text, end="")
    if asked.out is not None:
        asked.out.mkdir(parents=True, exist_ok=True)
        found = json.dumps(to_json(results, environment), indent=2, ensure_ascii=False)
        (asked.out / "operators.json").write_text(f"{found}\n", encoding="utf-8")
        (asked.out / "operators.md").write_text(f"# Operators\n\n{text}", encoding="utf-8")


if __name__ == "__main__":
    main()
