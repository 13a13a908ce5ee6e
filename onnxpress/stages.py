"""What the commands and the recipe runner share: open, run a stage, write, tell what came out.

Each function writes one directory, whole or not at all, and returns a JSON-able summary.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib_data.errors import ConfigError
from onnxpress.training import TrainingChoice, told

if TYPE_CHECKING:
    from calib_data.batches import Batches
    from calib_data.sources import Examples
    from compress.checkpoint import Checkpoint
    from compress.distill import DistillConfig
    from compress.prune import PruneConfig
    from compress.quantize import QuantizeConfig
    from export.graph import ExportConfig

Advance = Callable[..., None]


@contextmanager
def _no_progress(label: str, total: int | None) -> Iterator[Advance]:
    yield lambda *_: None


@dataclass(frozen=True)
class Run:
    """What every command takes: the seed, whether to replace or go on, and where progress is shown."""

    seed: int = 0
    overwrite: bool = False
    resume: bool = (
        False  # go on with a training that was killed; with `overwrite`, if it is the same
    )
    progress: Callable[[str, int | None], AbstractContextManager[Advance]] = _no_progress


@dataclass(frozen=True)
class ModelChoice:
    """Which model, and how to open it."""

    name: str
    task: str | None = None
    trust_remote_code: bool = False

    def open(self) -> "Checkpoint":
        """Return the checkpoint."""
        from compress.loading import open_checkpoint

        return open_checkpoint(self.name, task=self.task, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True)
class DataChoice:
    """Which data, and how it is batched."""

    spec: str
    columns: str | None = None
    limit: int | None = None
    batch_size: int = 32
    max_length: int | None = 128

    def batches(self, checkpoint: "Checkpoint", seed: int, shuffle: bool) -> "Batches":
        """Return the data encoded for `checkpoint`, its labels checked against the model's."""
        from calib_data.batches import Batches
        from calib_data.sources import open_data

        if self.max_length is not None and self.spec not in ("digits",):
            checkpoint.check_length(self.max_length)
        examples = with_labels_of(checkpoint, open_data(self.spec, self.columns, self.limit, seed))
        joint = checkpoint.task.endswith("-classification")
        return Batches(
            examples,
            checkpoint.processor,
            batch_size=self.batch_size,
            max_length=self.max_length,
            seed=seed,
            shuffle=shuffle,
            field="both" if joint else "text",
        )


def with_labels_of(checkpoint: "Checkpoint", examples: "Examples") -> "Examples":
    """Return the examples with class indices in the order of the model's own labels."""
    from calib_data.batches import check_labels

    if checkpoint.task_row.target == "class" and "label" in examples.roles:
        names = getattr(checkpoint.config, "id2label", None) or {}
        if examples.label_names and set(examples.label_names) <= set(names.values()):
            examples = examples.relabel([names[i] for i in sorted(names)])
        check_labels(examples, checkpoint.config.num_labels)
    return examples


@dataclass(frozen=True)
class ReportChoice:
    """What a report compares."""

    bundles: tuple[tuple[str, str], ...]  # (name, path)
    baseline: str | None = None  # a model, measured in PyTorch
    title: str | None = None
    command: str | None = None
    config: dict[str, Any] = field(default_factory=dict)


def distill_model(
    teacher: ModelChoice,
    student: ModelChoice | None,
    layers: int | None,
    data: DataChoice,
    config: "DistillConfig",
    out: Path,
    run: Run,
    training: TrainingChoice | None = None,
) -> dict[str, Any]:
    """Train a student, from a directory or from the teacher's own layers, and write it."""
    from compress.distill import distill
    from compress.students import evenly_spaced, layer_stack, student_from_layers

    if (student is None) == (layers is None):
        raise ConfigError("name either --student or --layers")
    training = training or TrainingChoice()
    with training.place(out, run) as place:
        source = teacher.open()
        if student is not None:
            start = student.open()
        else:
            keep = evenly_spaced(len(layer_stack(source.backbone)[1]), layers or 0)
            start = student_from_layers(source, keep)
        batches = data.batches(source, run.seed, shuffle=True)
        judge = training.judge(source, data.max_length)
        with run.progress("distill", config.train.total_steps(len(batches))) as advance:
            result = distill(
                source, start, batches, config, advance, evaluate=judge, run=place.train_run
            )
        place.save(result.checkpoint)
    return {"stage": "distill", "path": str(out), **told(result.report, judge)}


def prune_model(
    model: ModelChoice, data: DataChoice, config: "PruneConfig", out: Path, run: Run
) -> dict[str, Any]:
    """Prune a model and write it."""
    from compress.checkpoint import save_checkpoint
    from compress.files import staged_directory
    from compress.prune import prune

    with staged_directory(out, run.overwrite) as staging:
        checkpoint = model.open()
        batches = data.batches(checkpoint, run.seed, shuffle=False)
        with run.progress("importance", len(batches)) as advance:
            result = prune(checkpoint, batches, config, advance)
        save_checkpoint(result.checkpoint, staging)
    report = {k: v for k, v in result.report.items() if k != "plan"}
    return {"stage": "prune", "path": str(out), **report}


def quantize_model(
    model: ModelChoice, config: "QuantizeConfig", out: Path, run: Run
) -> dict[str, Any]:
    """Quantize a model and write it."""
    from compress.checkpoint import save_checkpoint
    from compress.files import staged_directory
    from compress.quantize import quantize

    with staged_directory(out, run.overwrite) as staging:
        checkpoint = model.open()
        with run.progress("quantize", None) as advance:
            result = quantize(checkpoint, config, advance)
        save_checkpoint(result.checkpoint, staging)
    report = {k: v for k, v in result.report.items() if k != "modules"}
    report["modules"] = len(result.report["modules"])
    return {"stage": "quantize", "path": str(out), **report}


def export_model(
    model: ModelChoice, config: "ExportConfig", provider: str, out: Path, run: Run
) -> dict[str, Any]:
    """Export a model, pass the gate, and publish the bundle."""
    from export.publish import export_onnx

    with run.progress("export and verify", None) as advance:
        bundle, report = export_onnx(
            model.open(),
            out,
            config,
            provider=provider,
            overwrite=run.overwrite,
            progress=advance,
        )
    worst = report.worst()
    return {
        "stage": "export",
        "path": str(out),
        "bytes": bundle.size_bytes,
        "graphs": {
            name: {
                "bytes": graph.size_bytes,
                "inputs": list(graph.signature.names),
                "outputs": list(graph.signature.outputs),
            }
            for name, graph in bundle.graphs.items()
        },
        "parity": {"passed": report.passed, "checks": len(report.checks), "worst": vars(worst)},
    }


def report_bundles(choice: ReportChoice, out: Path, run: Run) -> dict[str, Any]:
    """Measure bundles against a baseline and write report.json, report.md and report.html."""
    from benchmarks.config import BenchmarkConfig
    from benchmarks.measure import benchmark
    from benchmarks.render import write_report
    from benchmarks.worker import Variant
    from compress.files import staged_directory

    config: BenchmarkConfig = BenchmarkConfig.from_json({**choice.config, "seed": run.seed})
    variants = [Variant(name, path, "onnx") for name, path in choice.bundles]
    if choice.baseline is not None:
        variants.insert(0, Variant("PyTorch", choice.baseline, "pytorch"))
    with staged_directory(out, run.overwrite) as staging:
        with run.progress("benchmark", None) as advance:
            report = benchmark(
                variants,
                variants[0].name,
                config,
                title=choice.title,
                command=choice.command,
                progress=lambda what, done, total: advance(what, done, total),
            )
        write_report(report, staging)
    return {"stage": "report", "path": str(out)}
