"""What the commands and the recipe runner share: open, run a stage, write, tell what came out.

Each function writes one directory, whole or not at all, and returns a JSON-able summary.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib_data.errors import ConfigError
from onnxpress.quantization import QuantizeChoice, calibration_state, quantize_within
from onnxpress.training import TrainingChoice, told

if TYPE_CHECKING:
    from benchmarks.config import BenchmarkConfig
    from benchmarks.worker import Variant
    from calib_data.batches import Batches, Objective
    from calib_data.sources import Examples
    from compress.checkpoint import Checkpoint
    from compress.distill import DistillConfig
    from compress.finetune import FinetuneConfig
    from compress.quantize_config import QuantizeConfig
    from compress.sizes import StudentShape
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

    def open(self, limit: int | None = None, seed: int = 0) -> "Examples":
        """Return the examples, at most `limit` of them."""
        from calib_data.sources import open_data

        return open_data(self.spec, self.columns, limit, seed)

    def batches(
        self,
        checkpoint: "Checkpoint",
        seed: int,
        shuffle: bool,
        objective: "Objective | None" = None,
        examples: "Examples | None" = None,
        teacher: "Checkpoint | None" = None,
    ) -> "Batches":
        """Return the data encoded for `checkpoint`, its labels checked against the model's.

        `examples` are all there are, if they have been opened before. For a `teacher` with a
        tokenizer of its own they are encoded by that as well.
        """
        from calib_data.batches import Batches, same_tokenizer

        if self.max_length is not None and self.spec not in ("digits",):
            for model in filter(None, (checkpoint, teacher)):
                model.check_length(self.max_length)
        if examples is None:
            examples = self.open(self.limit, seed)
        examples = with_labels_of(checkpoint, examples.limit(self.limit, seed))
        joint = checkpoint.task.endswith("-classification")
        processor = checkpoint.processor or (teacher and teacher.processor)
        apart = teacher is not None and not same_tokenizer(processor, teacher.processor)
        return Batches(
            examples,
            processor,
            batch_size=self.batch_size,
            max_length=self.max_length,
            seed=seed,
            shuffle=shuffle,
            field="both" if joint else "text",
            teacher_processor=teacher.processor if teacher is not None and apart else None,
            objective=objective,
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
class StartChoice:
    """What fine-tuning starts from: a model, or a config file for one of random weights."""

    model: str | None = None
    from_config: Path | None = None
    tokenizer: str | None = None  # with from_config: a directory, or "characters"
    task: str | None = None
    new_head: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if (self.model is None) == (self.from_config is None):
            raise ConfigError("name either a MODEL or --from-config FILE")
        if self.tokenizer is not None and self.from_config is None:
            raise ConfigError("--tokenizer goes with --from-config; a MODEL brings its own")

    def open(self, examples: "Examples", seed: int) -> "tuple[Checkpoint, tuple[str, ...]]":
        """Return a checkpoint for the task that `examples` are for, and its random parameters."""
        from compress.from_config import checkpoint_from_config, read_config
        from compress.heads import classes_of, with_head
        from compress.loading import open_checkpoint
        from compress.tasks import task_of, training_task

        if self.from_config is not None:
            config = read_config(self.from_config)
            own = task_of(config, "feature-extraction").name
            task = training_task(config, examples.roles, self.task, own)
            classes = classes_of(examples) if task.target == "class" else None
            made = checkpoint_from_config(
                self.from_config, config, task, self.tokenizer, examples, classes, seed
            )
            return made, tuple(name for name, _ in made.module.named_parameters())
        source = open_checkpoint(
            self.model or "",
            trust_remote_code=self.trust_remote_code,
            fallback="feature-extraction",
        )
        task = training_task(source.config, examples.roles, self.task, source.task)
        classes = classes_of(examples) if task.target == "class" else None
        return with_head(source, task, classes, seed, self.new_head)


ALSO = ("compiled", "plain")  # by torch.compile; as PyTorch's exporter writes it


@dataclass(frozen=True)
class ReportChoice:
    """What a report compares."""

    bundles: tuple[tuple[str, str], ...]  # (name, path)
    baseline: str | None = None  # a model, measured in PyTorch
    also: tuple[str, ...] = ()  # of the baseline: ALSO
    title: str | None = None
    command: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    earlier: tuple[Path, ...] = ()  # reports made before, for the trend

    def benchmark(self, seed: int) -> "BenchmarkConfig":
        """Return how it measures; raises `ConfigError` for settings that make no sense."""
        from benchmarks.config import BenchmarkConfig

        if self.also and self.baseline is None:
            raise ConfigError(f"--also {self.also[0]} is of a --baseline; name one")
        return BenchmarkConfig.from_json({**self.config, "seed": seed})


def distill_model(
    teacher: ModelChoice,
    student: ModelChoice | None,
    shape: "StudentShape",
    data: DataChoice,
    config: "DistillConfig",
    out: Path,
    run: Run,
    training: TrainingChoice | None = None,
    *,
    pack: bool = False,
    generate: Mapping[str, Any] | None = None,
    cache_teacher: bool = False,
) -> dict[str, Any]:
    """Train a student, from a directory or made of the teacher in `shape`, and write it.

    With `generate`, settings of `GenerateConfig`, it is trained on what the teacher makes of the data;
    with `cache_teacher` the teacher's answers are looked up. Both are kept in OUT.training until OUT is
    in place.
    """
    from compress.distill import AskTeacher, cached_teacher, distill, running_teacher
    from compress.finetune import objective_of
    from compress.heads import with_head_of

    if (student is None) == (not shape):
        raise ConfigError(
            "name either --student or --layers, --keep-layers, --hidden, --heads or --ffn, with which "
            "it is made of the teacher"
        )
    training = training or TrainingChoice()
    with training.place(out, run) as place:
        source = teacher.open()
        if student is not None:
            start = with_head_of(source, student.open(), run.seed)
        else:
            start = student_of(source, shape, data, run, pack)
        examples = None
        if generate is not None:
            examples = _generated(source, data, generate, place.kept("generations"), run)
        batches = data.batches(start, run.seed, True, objective_of(start, pack), examples, source)
        ask: AskTeacher = running_teacher
        if cache_teacher:
            batches = batches.numbered()
            ask = cached_teacher(batches, place.kept("teacher"), config.train)
        judge = training.judge(source, data.max_length)
        with run.progress("distill", config.train.total_steps(len(batches))) as advance:
            result = distill(
                source, start, batches, config, advance, ask, evaluate=judge, run=place.train_run
            )
        place.save(result.checkpoint)
    return {"stage": "distill", "path": str(out), **told(result.report, judge)}


def student_of(
    teacher: "Checkpoint", shape: "StudentShape", data: DataChoice, run: Run, pack: bool
) -> "Checkpoint":
    """Return a student in `shape`, its widths chosen on some rows of the data."""
    from compress.finetune import objective_of
    from compress.resize import CALIBRATION_BATCHES
    from compress.students import make_student

    if not shape.narrows:
        return make_student(teacher, shape)
    most = CALIBRATION_BATCHES * data.batch_size
    some = replace(data, limit=min(data.limit or most, most))
    batches = some.batches(teacher, run.seed, False, objective_of(teacher, pack))
    with run.progress("student", len(batches)) as advance:
        return make_student(teacher, shape, batches, run.seed, advance)


def _generated(
    teacher: "Checkpoint", data: DataChoice, settings: Mapping[str, Any], directory: Path, run: Run
) -> "Examples":
    """Return what the teacher makes of the data."""
    from compress.generations import GenerateConfig, generate_examples
    from compress.processes import agreed

    given = {"batch_size": data.batch_size, "max_length": data.max_length, "seed": run.seed}
    config = GenerateConfig.from_json({**given, **settings})
    with run.progress("generate", None) as advance:
        prompts = data.open(data.limit, run.seed)

        def generate() -> "Examples":
            return generate_examples(teacher, prompts, config, directory, advance)

        agreed(lambda: len(generate()))  # one process writes them, and all open them
        return generate()


def quantize_model(
    model: ModelChoice,
    config: "QuantizeConfig",
    out: Path,
    run: Run,
    choice: QuantizeChoice | None = None,
) -> dict[str, Any]:
    """Quantize a model and write it, the best there is even where a budget is missed."""
    from compress.checkpoint import save_checkpoint
    from compress.files import staged_directory

    choice = choice or QuantizeChoice()
    choice.check(config, run.overwrite)
    with (
        staged_directory(out, run.overwrite) as staging,
        calibration_state(out, run) as state,
    ):
        result = quantize_within(model.open(), config, choice, state, run)
        save_checkpoint(result.checkpoint, staging)
    report = {**result.report, "modules": len(result.report["modules"])}
    return {"stage": "quantize", "path": str(out), **report}


def finetune_model(
    start: StartChoice,
    data: DataChoice,
    pack: bool,
    config: "FinetuneConfig",
    out: Path,
    run: Run,
    training: TrainingChoice | None = None,
) -> dict[str, Any]:
    """Train a model on a task, whole or through an adapter, and write it."""
    from compress.finetune import finetune, objective_of

    training = training or TrainingChoice()
    with training.place(out, run) as place:
        examples = data.open()
        checkpoint, fresh = start.open(examples, run.seed)
        objective = objective_of(checkpoint, pack)
        batches = data.batches(checkpoint, run.seed, True, objective, examples)
        measured = None
        if training.eval is not None:
            columns = training.eval_columns or data.columns
            choice = replace(data, spec=training.eval, columns=columns, limit=None)
            measured = choice.batches(checkpoint, run.seed, False, objective)
        with run.progress("finetune", config.train.total_steps(len(batches))) as advance:
            result = finetune(
                checkpoint, batches, config, measured, advance, fresh, run=place.train_run
            )
        place.save(result.checkpoint)
    report = told(result.report, None)
    return {"stage": "finetune", "path": str(out), "task": checkpoint.task, **report}


def merge_model(model: ModelChoice, out: Path, run: Run) -> dict[str, Any]:
    """Make a model's adapter part of its weights and write it."""
    from compress.adapters import merge
    from compress.checkpoint import save_checkpoint
    from compress.files import staged_directory

    with staged_directory(out, run.overwrite) as staging:
        result = merge(model.open())
        save_checkpoint(result.checkpoint, staging)
    return {"stage": "merge", "path": str(out), **result.report}


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
        "exact_on": bundle.exact_on,
        "graphs": {
            name: {
                "bytes": graph.size_bytes,
                "inputs": list(graph.signature.names),
                "outputs": list(graph.signature.outputs),
            }
            for name, graph in bundle.graphs.items()
        },
        "parity": {"passed": report.passed, "checks": len(report.checks), "worst": vars(worst)},
        "witness": report.witness,
    }


def redraw_reports(files: Sequence[Path], title: str | None, out: Path, run: Run) -> dict[str, Any]:
    """Draw the newest of finished reports again, with the others as its past; measure nothing."""
    from benchmarks.render import write_report
    from benchmarks.report import read_reports
    from compress.files import staged_directory

    *earlier, last = read_reports(files)
    if title is not None:
        last = replace(last, title=title)
    with staged_directory(out, run.overwrite) as staging:
        write_report(last, staging, earlier)
    return {"stage": "report", "path": str(out)}


def _baselines(model: str, also: Sequence[str], folder: Path) -> "Iterator[Variant]":
    """Yield the forms of a model that others are compared with; graphs are written into `folder`."""
    import onnx_ir as ir

    from benchmarks.worker import Variant
    from compress.loading import open_checkpoint
    from export.graph import plain_graph

    yield Variant("PyTorch", model, "pytorch")
    if "compiled" in also:
        yield Variant("PyTorch, compiled", model, "compiled")
    if "plain" in also:
        path = folder / "plain.onnx"
        ir.save(plain_graph(open_checkpoint(model)), path, external_data="plain.onnx.data")
        yield Variant("plain ONNX", str(path), "onnx")


def report_bundles(choice: ReportChoice, out: Path, run: Run) -> dict[str, Any]:
    """Measure bundles against a baseline and write report.json, .md, .csv and .html.

    Reports made before, which `choice` may name, are drawn beside what is measured now.
    """
    from benchmarks.measure import benchmark
    from benchmarks.render import write_report
    from benchmarks.report import read_reports
    from benchmarks.worker import Variant
    from compress.files import staged_directory

    config = choice.benchmark(run.seed)
    earlier = read_reports(choice.earlier)
    journal = out.parent / f"{out.name}.measuring"  # until the report is whole
    variants = [Variant(name, path, "onnx") for name, path in choice.bundles]
    with staged_directory(out, run.overwrite) as staging, tempfile.TemporaryDirectory() as folder:
        if choice.baseline is not None:
            variants = [*_baselines(choice.baseline, choice.also, Path(folder)), *variants]
        with run.progress("benchmark", None) as advance:
            report = benchmark(
                variants,
                variants[0].name,
                config,
                title=choice.title,
                command=choice.command,
                progress=lambda what, done, total: advance(what, done, total),
                journal=journal,
            )
        write_report(report, staging, earlier)
    shutil.rmtree(journal)
    return {"stage": "report", "path": str(out)}
