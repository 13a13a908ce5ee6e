"""Recipes: a YAML list of stages, run in order, each only when something it depends on changed.

A step's key is the hash of its stage, settings, seed, the contents of what it reads and the code that
makes it. The key and the result's own hash are noted once the result is in place, so that a run
killed at any moment goes on where it was, and a result that was tampered with is made again.
"""

import hashlib
import inspect
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from calib_data.errors import ConfigError, DestinationError
from compress.files import destination_errors, sha256_directory, sha256_file, write_json
from compress.train_log import LOG
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

SOURCE = "model"  # what steps call the recipe's own model
_STATE = ".onnxpress"
_LAYERS = ("calib_data", "compress", "export", "benchmarks", "onnxpress")


@dataclass(frozen=True)
class Step:
    """One stage of a recipe: its name, which is also its directory, and its settings."""

    name: str
    stage: str
    settings: Mapping[str, Any]
    inputs: tuple[str, ...]  # names of earlier steps, or SOURCE


@dataclass(frozen=True)
class Recipe:
    """A model and the steps made from it."""

    model: str
    seed: int
    steps: tuple[Step, ...]
    command: str


@dataclass(frozen=True)
class _Stage:
    """How a stage of a recipe is run: the settings that name inputs, and the layers of code it uses."""

    run: Callable[[Mapping[str, Any], Path, Run, "Recipe"], dict[str, Any]]
    inputs: tuple[str, ...]
    layers: int  # how many of _LAYERS it depends on


def read_recipe(path: Path) -> Recipe:
    """Return the recipe in a YAML file.

    Raises `ConfigError` for a file that cannot be read, an unknown stage or setting, or a step that
    names none before it.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such recipe") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not a YAML recipe: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(content.get("steps"), list):
        raise ConfigError(f"{path}: a recipe has `model` and a list of `steps`")
    unknown = sorted(set(content) - {"title", "model", "seed", "steps"})
    if unknown or "model" not in content:
        raise ConfigError(f"{path}: {f'unknown key {unknown[0]!r}' if unknown else 'no `model`'}")
    steps: list[Step] = []
    for entry in content["steps"]:
        steps.append(_read_step(path, entry, {step.name for step in steps}))
    return Recipe(
        model=str(content["model"]),
        seed=int(content.get("seed", 0)),
        steps=tuple(steps),
        command=f"onnxpress run {path if not path.is_absolute() else path.name} -o DIR",
    )


def _read_step(path: Path, entry: Any, earlier: set[str]) -> Step:
    if not isinstance(entry, dict) or not {"name", "stage"} <= set(entry):
        raise ConfigError(f"{path}: every step has a `name` and a `stage`, got {entry}")
    name, stage = str(entry["name"]), str(entry["stage"])
    if stage not in _STAGES:
        raise ConfigError(
            f"{path}: step {name}: no stage {stage!r}; there are {', '.join(_STAGES)}"
        )
    if name in earlier or name == SOURCE or name.startswith(".") or "/" in name or "\\" in name:
        raise ConfigError(f"{path}: {name!r} cannot be a step's name here, or is taken")
    settings = {k: v for k, v in entry.items() if k not in ("name", "stage")}
    inputs: list[str] = []
    for key in _STAGES[stage].inputs:
        value = settings.get(key)
        inputs += value if isinstance(value, list) else [value] if value is not None else []
    for needed in inputs:
        if needed != SOURCE and needed not in earlier:
            raise ConfigError(f"{path}: step {name} needs {needed!r}, which is no earlier step")
    if stage != "report" and "from" not in settings:
        raise ConfigError(f"{path}: step {name} does not say `from` which step, or `{SOURCE}`")
    return Step(name, stage, settings, tuple(inputs))


def run_recipe(
    recipe: Recipe, out: Path, run: Run, tell: Callable[[str], None] = lambda line: None
) -> tuple[Step, ...]:
    """Run the steps that need it, in order, each into out/NAME; return all steps.

    `tell` gets one line per step. With `run.overwrite` nothing counts as unchanged. Raises
    `DestinationError` where another run is at work in `out`.
    """
    from filelock import FileLock, Timeout

    run = replace(run, seed=run.seed or recipe.seed)
    state = out / _STATE
    with destination_errors(out):
        state.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(state / "lock", timeout=0):
            hashes = {SOURCE: _hash_model(recipe.model)}
            for step in recipe.steps:
                hashes[step.name] = _run_step(recipe, step, out, run, hashes, tell)
    except Timeout as error:
        raise DestinationError(f"another run is at work in {out}; wait for it") from error
    return recipe.steps


def _run_step(
    recipe: Recipe,
    step: Step,
    out: Path,
    run: Run,
    hashes: Mapping[str, str],
    tell: Callable[[str], None],
) -> str:
    """Make a step's result unless it is there already; return the result's hash."""
    stage = _STAGES[step.stage]
    key = _key(step, stage, run.seed, [hashes[name] for name in step.inputs])
    record, result = out / _STATE / f"{step.name}.json", out / step.name
    if not run.overwrite and record.is_file() and result.is_dir():
        try:
            noted = json.loads(record.read_text(encoding="utf-8"))
        except ValueError:
            noted = {}
        if noted.get("key") == key and noted.get("sha256") == _hash_result(result):
            tell(f"{step.name}: unchanged")
            return str(noted["sha256"])
    started = time.monotonic()
    # Training that was killed goes on where it was, unless all is to be made again.
    own = replace(run, overwrite=True, resume=not run.overwrite)
    stage.run(_resolve(recipe, step, out), result, own, recipe)
    sha256 = _hash_result(result)
    with destination_errors(out):
        partial = record.with_suffix(".partial")
        write_json(partial, {"key": key, "sha256": sha256})
        partial.replace(record)
    tell(f"{step.name}: {step.stage} done in {time.monotonic() - started:.0f} s")
    return sha256


def _resolve(recipe: Recipe, step: Step, out: Path) -> dict[str, Any]:
    """Return the step's settings with inputs replaced by the paths they stand for."""

    def place(name: str) -> str:
        return recipe.model if name == SOURCE else str(out / name)

    settings = dict(step.settings)
    for key in _STAGES[step.stage].inputs:
        value = settings.get(key)
        if isinstance(value, list):
            settings[key] = [(name, place(name)) for name in value]
        elif value is not None:
            settings[key] = place(value)
    return settings


def _key(step: Step, stage: _Stage, seed: int, inputs: list[str]) -> str:
    content = {
        "stage": step.stage,
        "settings": step.settings,
        "seed": seed,
        "inputs": inputs,
        "data": [
            _hash_data(str(step.settings[k]))
            for k in ("data", "eval", "plan", "vocab_from", "keep_tokens")
            if k in step.settings
        ],
        "code": _code_version(stage.layers),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _code_version(layers: int) -> str:
    """Return a hash of the source of the lowest `layers` packages and of what they build on."""
    import compress
    from compress.versions import versions

    root = Path(inspect.getfile(compress)).parent.parent
    digest = hashlib.sha256(json.dumps(versions(), sort_keys=True).encode())
    for package in _LAYERS[:layers]:
        for path in sorted((root / package).rglob("*")):
            if path.suffix in (".py", ".j2"):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _hash_model(model: str) -> str:
    path = Path(model)
    return _hash_result(path) if path.is_dir() else hashlib.sha256(model.encode()).hexdigest()


def _hash_result(directory: Path) -> str:
    """Return the hash of what a stage wrote, but for its log: the same run takes other times."""
    return sha256_directory(directory, without=(LOG,))


def _hash_data(spec: str) -> str:
    from calib_data.readers import data_files, parts_of

    return ",".join("+".join(map(sha256_file, data_files(x))) or x for x in parts_of(spec))


# --- the stages, as recipes call them -----------------------------------------------------------


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


def _distill(settings: Mapping[str, Any], out: Path, run: Run, recipe: Recipe) -> dict[str, Any]:
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
    teacher = ModelChoice(settings.get("teacher", recipe.model))
    student = None if shape else ModelChoice(settings["from"])
    return stages.distill_model(
        teacher if student else ModelChoice(settings["from"]),
        student, shape, _data(settings), config, out, run, _training(settings),
        pack=settings.get("pack", False), generate=generate if "new_tokens" in generate else None,
        cache_teacher=settings.get("cache_teacher", False),
    )  # fmt: skip


def _finetune(settings: Mapping[str, Any], out: Path, run: Run, recipe: Recipe) -> dict[str, Any]:
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
    return stages.finetune_model(
        start, _data(settings), pack, config, out, run, _training(settings)
    )


# settings of a pruning step that are not of a config: what is aimed at, and how it is healed
_TARGET = {
    "speedup", "latency", "size", "provider", "shape", "threads", "scheme", "tables", "whole_layers"
}  # fmt: skip
_HEAL = {"heal", "schedule", "rounds", "pack"}
_BESIDES = {
    "sparsity", "sparsity_method", "vocab_from", "vocab_columns", "vocab_min_count", "keep_tokens"
}  # fmt: skip


def _prune(settings: Mapping[str, Any], out: Path, run: Run, recipe: Recipe) -> dict[str, Any]:
    from compress.distill_config import DistillConfig
    from compress.prune_config import PruneConfig
    from compress.train_config import TrainConfig

    matching, train = _names(DistillConfig) - {"train"}, _names(TrainConfig) - {"steps", "schedule"}
    own = {"data", "plan", "calibrate"} | _BESIDES | _TARGET | _HEAL | _TRAINING | matching | train
    _check_settings(settings, own, _names(DataChoice), _names(PruneConfig))
    heal = None
    if "heal" in settings:
        heal = HealChoice(
            settings["heal"],
            _pick(settings, matching),
            {**_pick(settings, train), "seed": run.seed},
            settings.get("pack", False),
        )
    choice = PruneChoice(
        target_of(settings),
        Path(settings["plan"]) if "plan" in settings else None,
        heal,
        rounds_of(settings.get("schedule", "one-shot"), settings.get("rounds")),
        settings.get("calibrate", CALIBRATE),
        sparsity_of(_text(settings.get("sparsity")), settings.get("sparsity_method")),
        _vocabulary(settings),
    )
    config = config_of(_pick(settings, _names(PruneConfig)), choice, run.seed)
    data = _data(settings) if "data" in settings else None
    result = prune_model(
        ModelChoice(settings["from"]), data, config, out, run, choice, _training(settings)
    )
    require_target(result)
    return result


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


def _quantize(settings: Mapping[str, Any], out: Path, run: Run, recipe: Recipe) -> dict[str, Any]:
    from compress.quantize_config import QuantizeConfig

    own = {"data", "eval", "eval_columns", "metric", "max_drop"}
    _check_settings(settings, own, _names(DataChoice) - {"spec"}, _names(QuantizeConfig))
    config = QuantizeConfig.from_json(_take(settings, QuantizeConfig))
    read = {"limit": LIMIT, **_take(settings, DataChoice)}
    data = DataChoice(spec=settings["data"], **read) if "data" in settings else None
    choice = QuantizeChoice(data, _budget(settings))
    result = stages.quantize_model(ModelChoice(settings["from"]), config, out, run, choice)
    require_budget(result)
    return result


def _budget(settings: Mapping[str, Any]) -> Budget | None:
    if ("max_drop" in settings) != ("eval" in settings):
        raise ConfigError("`max_drop` and `eval` go together; name both or none")
    if "max_drop" not in settings:
        return None
    read = _take(settings, DataChoice) | {"limit": None, "columns": settings.get("eval_columns")}
    held_out = DataChoice(**{**read, "spec": settings["eval"]})
    return Budget(settings["max_drop"], held_out, settings.get("metric"))


def _export(settings: Mapping[str, Any], out: Path, run: Run, recipe: Recipe) -> dict[str, Any]:
    from export.graph import ExportConfig

    _check_settings(settings, {"provider"}, _names(ExportConfig))
    config = ExportConfig.from_json(_take(settings, ExportConfig))
    provider = settings.get("provider", "cpu")
    return stages.export_model(ModelChoice(settings["from"]), config, provider, out, run)


def _report(settings: Mapping[str, Any], out: Path, run: Run, recipe: Recipe) -> dict[str, Any]:
    from benchmarks.config import BenchmarkConfig

    _check_settings(settings, {"bundles", "baseline", "also", "title"}, _names(BenchmarkConfig))
    if not settings.get("bundles"):
        raise ConfigError("a report needs `bundles`, a list of export steps")
    choice = ReportChoice(
        bundles=tuple(settings["bundles"]),
        baseline=settings.get("baseline"),
        also=tuple(settings.get("also", ())),
        title=settings.get("title"),
        command=recipe.command,
        config=_take(settings, BenchmarkConfig),
    )
    return stages.report_bundles(choice, out, run)


_STAGES = {
    "distill": _Stage(_distill, ("from", "teacher"), 2),
    "finetune": _Stage(_finetune, ("from",), 2),
    "prune": _Stage(_prune, ("from",), 4),
    "quantize": _Stage(_quantize, ("from",), 2),
    "export": _Stage(_export, ("from",), 3),
    "report": _Stage(_report, ("bundles", "baseline"), 4),
}
