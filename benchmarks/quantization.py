"""The quality that int8 keeps: the first table of docs/results/quantization.md, by one command.

    python -m benchmarks.quantization DATA MODELS -o OUT [--trained DIR] [--only PREFIX]

DATA and MODELS are folders with the data sets and the models that `quantization_subjects` names. Every
step is a command of `onnxpress` whose result lies in OUT: what is finished is not run again, what fails
is a row with its reason. The classifier and the character model are those of `benchmarks.distillation`,
trained here (hours) unless --trained names where that has run.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.commands import failure_of
from benchmarks.config import usable_cores
from benchmarks.quantization_subjects import CALIBRATED, LOWER_IS_BETTER, SCHEMES, Subject, subjects
from benchmarks.report import Environment
from benchmarks.runtimes import Place
from benchmarks.worker import Variant, Worker
from calib_data.errors import OnnxPressError


@dataclass(frozen=True)
class Figure:
    """One row of the table: a metric of a model, float and quantized."""

    subject: str
    data: str
    metric: str
    scheme: str
    float_onnx: float
    onnx: float | None  # of the exported graph
    bound: float  # what that is to reach
    pytorch: float | None = None  # of the simulation, where it is measured
    failure: str | None = None

    @property
    def met(self) -> bool:
        """Whether the graph keeps what is claimed."""
        if self.onnx is None:
            return False
        ours, bound = (-self.onnx, -self.bound) if self.lower else (self.onnx, self.bound)
        return ours >= bound

    @property
    def lower(self) -> bool:
        """Whether less is better."""
        return self.metric in LOWER_IS_BETTER


def commands(subject: Subject, scheme: str, folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield what makes a quantized graph: what each command writes, and its arguments."""
    calibration = subject.calibration if scheme in CALIBRATED else ()
    small, graph = folder / scheme, folder / f"{scheme}.onnx"
    quantize = ["compress", "quantize", subject.model, *SCHEMES[scheme], *calibration]
    yield small, [*quantize, "-o", str(small)]
    yield graph, ["export", "onnx", str(small), "-o", str(graph)]


def run(target: Path, arguments: Sequence[str]) -> str | None:
    """Run a command of onnxpress that writes `target`, unless it is there; return why it failed."""
    if target.exists():
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    return failure_of(arguments)


def measure(subject: Subject, evaluation: str, model: Path | str, runtime: str) -> float:
    """Return the metric of a bundle ("onnx") or a checkpoint ("pytorch") on one of a subject's data."""
    from calib_data.batches import Batches
    from calib_data.metrics import measure_metric, perplexity
    from calib_data.objectives import Packed
    from calib_data.sources import open_data
    from compress.loading import open_checkpoint

    source = open_checkpoint(subject.model)
    examples = open_data(*subject.evaluations[evaluation])
    names = getattr(source.config, "id2label", None) or {}
    if examples.label_names and set(examples.label_names) <= set(names.values()):
        examples = examples.relabel([names[i] for i in sorted(names)])
    with Worker(Variant(subject.name, str(model), runtime), Place("cpu", usable_cores())) as worker:
        worker.load()
        if subject.metric == "loss":
            blocks = Batches(
                examples, source.processor, max_length=source.max_length, objective=Packed()
            )
            return math.log(perplexity(worker.predict, blocks).value)
        return measure_metric(
            subject.metric,
            worker.predict,
            examples,
            source.processor,
            task=source.task,
            max_length=source.max_length,
        ).value


def remembered(
    folder: Path, subject: Subject, evaluation: str, model: Path | str, runtime: str
) -> float:
    """Return what `measure` gives, looked up where it has been measured before."""
    record = folder / "figures.json"
    known = json.loads(record.read_text()) if record.is_file() else {}
    key = f"{evaluation}: {Path(model).name} in {runtime}"
    if key not in known:
        known[key] = measure(subject, evaluation, model, runtime)
        record.write_text(json.dumps(known, indent=1) + "\n")
    return float(known[key])


def figures(subject: Subject, out: Path) -> Iterator[Figure]:
    """Yield the rows of one subject, making and measuring what is not there yet."""
    subject.prepare()
    folder = out / subject.name
    plain = folder / "float.onnx"
    if failure := run(plain, ["export", "onnx", subject.model, "-o", str(plain)]):
        raise OnnxPressError(f"{subject.name} cannot be exported: {failure}")
    for scheme, bound in subject.bounds.items():
        small, graph = folder / scheme, folder / f"{scheme}.onnx"
        # as far as the first that fails
        done = (run(*command) for command in commands(subject, scheme, folder))
        failure = next(filter(None, done), None)
        for evaluation in subject.evaluations:
            whole = remembered(folder, subject, evaluation, plain, "onnx")
            onnx = pytorch = None
            if failure is None:
                onnx = remembered(folder, subject, evaluation, graph, "onnx")
            if subject.simulated and small.exists():
                pytorch = remembered(folder, subject, evaluation, small, "pytorch")
            yield Figure(
                subject.name, evaluation, subject.metric, scheme, whole, onnx, bound.of(whole),
                pytorch, failure,
            )  # fmt: skip


def table(rows: Sequence[Figure]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield "| model | data | metric | scheme | float | quantized | goal | | PyTorch differs by |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        digits = 2 if row.metric in ("spearman", "accuracy") else 4
        quantized = row.failure if row.onnx is None else f"{row.onnx:.{digits}f}"
        sign = "≤" if row.lower else "≥"
        verdict = "met" if row.met else "**missed**"
        apart = ""
        if row.pytorch is not None and row.onnx is not None:
            apart = f"{row.pytorch - row.onnx:+.3f}"
        yield (
            f"| {row.subject} | {row.data} | {row.metric} | {row.scheme} | {row.float_onnx:.{digits}f} "
            f"| {quantized} | {sign} {row.bound:.{digits}f} | {verdict} | {apart} |"
        )


def main() -> None:
    """Make, measure and print what is claimed; write it to OUT/quality.json, too."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantization", description=main.__doc__
    )
    parser.add_argument("data", type=Path, help="the folder with the data sets")
    parser.add_argument("models", type=Path, help="the folder with the models")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--trained", type=Path, help="where benchmarks.distillation has run")
    parser.add_argument("--only", default="", help="the models whose name begins so")
    given = parser.parse_args()
    every = subjects(given.data, given.models, given.out, given.trained or given.out)
    try:
        rows = [
            row
            for subject in every
            if subject.name.startswith(given.only)
            for row in figures(subject, given.out)
        ]
    except OnnxPressError as error:
        parser.exit(error.exit_code, f"Error: {error}\n")
    told = {
        "environment": asdict(Environment.here("cpu", usable_cores())),
        "rows": [asdict(row) | {"met": row.met} for row in rows],
    }
    (given.out / "quality.json").write_text(json.dumps(told, indent=1) + "\n")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
