"""The stages as recipes call them: a step's settings become a stage's configs and choices.

That is done for every step before the first one runs, so a mistake in the last costs no hour.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from calib_data.errors import ConfigError
from onnxpress import stages
from onnxpress.prune_choice import (
    CALIBRATE,
    HealChoice,
    PruneChoice,
    VocabularyChoice,
    config_of,
    rounds_of,
    sparsity_of,
)
from onnxpress.pruning import prune_model, require_target
from onnxpress.quantization import LIMIT, Budget, QuantizeChoice, require_budget
from onnxpress.stages import DataChoice, ModelChoice, ReportChoice, Run, StartChoice
from onnxpress.target import target_of
from onnxpress.training import TrainingChoice


@dataclass(frozen=True)
class Origin:
    """What all steps of a recipe share: its own model, and the command that runs it."""

    model: str
    command: str


Job = Callable[[Path], object]  # writes a step's result to a folder


@dataclass(frozen=True)
class Stage:
    """A stage of a recipe: its jobs, the settings that name inputs, and the layers of code it uses.

    `prepare` reads and checks a step's settings and raises `ConfigError`; it opens no input.
    """

    prepare: Callable[[Mapping[str, Any], Run, Origin], Job]
    inputs: tuple[str, ...]
    layers: int  # how many of the packages, from the lowest on, it depends on


def _take(
    settings: Mapping[str, Any], kind: type, renamed: Mapping[str, str] = {}
) -> dict[str, Any]:
    """Return the settings that are fields of a dataclass, by the fields' names."""
    names = {field.name for field in fields(kind)}
    found = {renamed.get(k, k): v for k, v in settings.items()}
    return {k: v for k, v in found.items() if k in names}


def _check_settings(settings: Mapping[str, Any], *used: Mapping[str, Any] | set[str]) -> None:
    known = {"from"}.union(*used)
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ConfigError(f"unknown setting {unknown[0]!r}; there are {', '.join(sorted(known))}")


def _data(settings: Mapping[str, Any]) -> DataChoice:
    if "data" not in settings:
        raise ConfigError("the step needs `data`")
    return DataChoice(**_take(settings, DataChoice, {"data": "spec"}))


_TRAINING = {"eval", "eval_columns", "save_every"}


def _training(settings: Mapping[str, Any]) -> TrainingChoice:
    return TrainingChoice(**{k: v for k, v in settings.items() if k in _TRAINING})


def _pick(settings: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """Return the settings called so, tuples for lists."""
    found = {name: settings[name] for name in names if name in settings}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}


def _names(kind: type) -> set[str]:
    return {field.name for field in fields(kind)} - {"seed"}


# settings of a distillation step → fields of GenerateConfig
_GENERATE = {
    "generate": "new_tokens",
    "prompt_tokens": "prompt_tokens",
    "generate_temperature": "temperature",
}


def _distill(settings: Mapping[str, Any], run: Run, origin: Origin) -> Job:
    from compress.distill import DistillConfig
    from compress.sizes import StudentShape
    from compress.training import TrainConfig

    shape = StudentShape.from_json(_take(settings, StudentShape))
    own = (
        {"data", "teacher", "cache_teacher", "pack", *_GENERATE} | _names(StudentShape) | _TRAINING
    )
    _check_settings(settings, own, _names(DataChoice), _names(DistillConfig), _names(TrainConfig))
    train = TrainConfig.from_json({**_take(settings, TrainConfig), "seed": run.seed})
    config = DistillConfig.from_json({**_take(settings, DistillConfig), "train": train})
    generate = {name: settings[key] for key, name in _GENERATE.items() if key in settings}
    teacher = ModelChoice(settings.get("teacher", origin.model))
    student = None if shape else ModelChoice(settings["from"])
    data, training = _data(settings), _training(settings)
    return lambda out: stages.distill_model(
        teacher if student else ModelChoice(settings["from"]),
        student, shape, data, config, out, run, training,
        pack=settings.get("pack", False), generate=generate if "new_tokens" in generate else None,
        cache_teacher=settings.get("cache_teacher", False),
    )  # fmt: skip


def _finetune(settings: Mapping[str, Any], run: Run, origin: Origin) -> Job:
    from compress.adapter_plan import AdapterConfig
    from compress.finetune import finetune_config
    from compress.training import TrainConfig

    own = {"data", "pack", "task", "new_head", "merge"} | _TRAINING
    kinds = (DataChoice, AdapterConfig, TrainConfig)
    _check_settings(settings, own, *map(_names, kinds))
    config = finetune_config(
        settings.get("method", "full"),
        {k: v for k, v in _take(settings, AdapterConfig).items() if k != "method"},
        {**_take(settings, TrainConfig), "seed": run.seed},
        merge=settings.get("merge", False),
    )
    start = StartChoice(
        settings["from"], task=settings.get("task"), new_head=settings.get("new_head", False)
    )
    pack = settings.get("pack", False)
    data, training = _data(settings), _training(settings)
    return lambda out: stages.finetune_model(start, data, pack, config, out, run, training)


# settings of a pruning step that are not of a config: what is aimed at, and how it is healed
_TARGET = {
    "speedup", "latency", "size", "provider", "shape", "threads", "scheme", "over", "tables",
    "whole_layers",
}  # fmt: skip
_HEAL = {"heal", "schedule", "rounds", "pack", "cache_teacher"}
_BESIDES = {
    "sparsity", "sparsity_method", "vocab_from", "vocab_columns", "vocab_min_count", "keep_tokens"
}  # fmt: skip


def _prune(settings: Mapping[str, Any], run: Run, origin: Origin) -> Job:
    from compress.distill_config import DistillConfig
    from compress.prune_config import PruneConfig
    from compress.train_config import TrainConfig

    matching, train = _names(DistillConfig) - {"train"}, _names(TrainConfig) - {"steps", "schedule"}
    own = (
        {"data", "plan", "original", "calibrate"}
        | _BESIDES
        | _TARGET
        | _HEAL
        | _TRAINING
        | matching
        | train
    )
    _check_settings(settings, own, _names(DataChoice), _names(PruneConfig))
    heal = None
    if "heal" in settings:
        heal = HealChoice(
            settings["heal"],
            _pick(settings, matching),
            {**_pick(settings, train), "seed": run.seed},
            settings.get("pack", False),
            settings.get("cache_teacher", False),
        )
    choice = PruneChoice(
        target_of(settings),
        Path(settings["plan"]) if "plan" in settings else None,
        ModelChoice(settings["original"]) if "original" in settings else None,
        heal,
        rounds_of(settings.get("schedule", "one-shot"), settings.get("rounds")),
        settings.get("calibrate", CALIBRATE),
        sparsity_of(_text(settings.get("sparsity")), settings.get("sparsity_method")),
        _vocabulary(settings),
    )
    config = config_of(_pick(settings, _names(PruneConfig)), choice, run.seed)
    data = _data(settings) if "data" in settings else None
    choice.check(config, data)
    model, training = ModelChoice(settings["from"]), _training(settings)

    def job(out: Path) -> None:
        require_target(prune_model(model, data, config, out, run, choice, training))

    return job


def _text(value: Any) -> str | None:
    if value == 124:  # what YAML makes of 2:4 without quotes: minutes and seconds
        return "2:4"
    return None if value is None else str(value)


def _vocabulary(settings: Mapping[str, Any]) -> VocabularyChoice | None:
    if "vocab_from" not in settings:
        return None
    keep = settings.get("keep_tokens")
    return VocabularyChoice(
        settings["vocab_from"],
        settings.get("vocab_columns"),
        None if keep is None else Path(keep),
        settings.get("vocab_min_count", 1),
    )


def _quantize(settings: Mapping[str, Any], run: Run, origin: Origin) -> Job:
    from compress.quantize_config import QuantizeConfig

    own = {"data", "eval", "eval_columns", "metric", "max_drop"}
    _check_settings(settings, own, _names(DataChoice) - {"spec"}, _names(QuantizeConfig))
    config = QuantizeConfig.from_json(_take(settings, QuantizeConfig))
    read = {"limit": LIMIT, **_take(settings, DataChoice)}
    data = DataChoice(spec=settings["data"], **read) if "data" in settings else None
    choice = QuantizeChoice(data, _budget(settings))
    choice.check(config, run.overwrite)
    model = ModelChoice(settings["from"])

    def job(out: Path) -> None:
        require_budget(stages.quantize_model(model, config, out, run, choice))

    return job


def _budget(settings: Mapping[str, Any]) -> Budget | None:
    if ("max_drop" in settings) != ("eval" in settings):
        raise ConfigError("`max_drop` and `eval` go together; name both or none")
    if "max_drop" not in settings:
        return None
    read = _take(settings, DataChoice) | {"limit": None, "columns": settings.get("eval_columns")}
    held_out = DataChoice(**{**read, "spec": settings["eval"]})
    return Budget(settings["max_drop"], held_out, settings.get("metric"))


def _export(settings: Mapping[str, Any], run: Run, origin: Origin) -> Job:
    from export.graph import ExportConfig

    _check_settings(settings, {"provider"}, _names(ExportConfig))
    config = ExportConfig.from_json(_take(settings, ExportConfig))
    provider = settings.get("provider", "cpu")
    model = ModelChoice(settings["from"])
    return lambda out: stages.export_model(model, config, provider, out, run)


def _report(settings: Mapping[str, Any], run: Run, origin: Origin) -> Job:
    from benchmarks.config import BenchmarkConfig

    _check_settings(settings, {"bundles", "baseline", "also", "title"}, _names(BenchmarkConfig))
    if not settings.get("bundles"):
        raise ConfigError("a report needs `bundles`, a list of export steps")
    choice = ReportChoice(
        bundles=tuple(settings["bundles"]),
        baseline=settings.get("baseline"),
        also=tuple(settings.get("also", ())),
        title=settings.get("title"),
        command=origin.command,
        config=_take(settings, BenchmarkConfig),
    )
    choice.benchmark(run.seed)  # raises now what is wrong with it
    return lambda out: stages.report_bundles(choice, out, run)


STAGES = {
    "distill": Stage(_distill, ("from", "teacher"), 2),
    "finetune": Stage(_finetune, ("from",), 2),
    "prune": Stage(_prune, ("from", "original"), 4),
    "quantize": Stage(_quantize, ("from",), 2),
    "export": Stage(_export, ("from",), 3),
    "report": Stage(_report, ("bundles", "baseline"), 4),
}
