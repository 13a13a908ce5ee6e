"""Running a recipe: each step only when something it depends on changed.

A step's key is the hash of its stage, settings, seed, the contents of what it reads and the code that
makes it. The key and the result's own hash are noted once the result is in place, so that a run
killed at any moment goes on where it was, and a result that was tampered with is made again.
"""

import hashlib
import inspect
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from calib_data.errors import ConfigError, DestinationError, OnnxPressError
from compress.files import destination_errors, sha256_directory, sha256_file, write_json
from compress.train_log import LOG
from onnxpress.recipe import SOURCE, Recipe, Step
from onnxpress.recipe_stages import STAGES, Job, Stage
from onnxpress.stages import Run

_STATE = ".onnxpress"
# settings that name what is read: data sets, and other files
_DATA, _FILES = ("data", "eval", "traffic", "vocab_from"), ("plan", "keep_tokens")
_LAYERS = ("calib_data", "compress", "export", "benchmarks", "onnxpress")


def run_recipe(
    recipe: Recipe, out: Path, run: Run, tell: Callable[[str], None] = lambda line: None
) -> tuple[Step, ...]:
    """Run the steps that need it, in order, each into out/NAME; return all steps.

    `tell` gets one line per step. With `run.overwrite` nothing counts as unchanged. Raises
    `ConfigError` for settings and `DataError` for missing files of any step before the first one
    runs, and `DestinationError` where another run is at work in `out`.
    """
    from filelock import FileLock, Timeout

    run = replace(run, seed=run.seed or recipe.seed)
    # Training that was killed goes on where it was, unless all is to be made again.
    own = replace(run, overwrite=True, resume=not run.overwrite)
    jobs = [_prepared(recipe, step, out, own) for step in recipe.steps]
    state = out / _STATE
    with destination_errors(out):
        state.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(state / "lock", timeout=0):
            hashes = {SOURCE: _hash_model(recipe.origin.model)}
            for step, job in zip(recipe.steps, jobs):
                hashes[step.name] = _run_step(step, job, out, run, hashes, tell)
    except Timeout as error:
        raise DestinationError(f"another run is at work in {out}; wait for it") from error
    return recipe.steps


def _prepared(recipe: Recipe, step: Step, out: Path, run: Run) -> Job:
    """Return what makes a step's result, all that can be checked beforehand being checked."""
    from calib_data.readers import require_files

    try:
        for spec in _specs(step, _DATA):
            require_files(spec)
        for name in _specs(step, _FILES):
            if not Path(name).is_file():
                raise ConfigError(f"{name} is not a file; check the path (now in {Path.cwd()})")
        return STAGES[step.stage].prepare(_resolve(recipe, step, out), run, recipe.origin)
    except OnnxPressError as error:
        raise type(error)(f"step {step.name}: {error}") from error


def _run_step(
    step: Step,
    job: Job,
    out: Path,
    run: Run,
    hashes: Mapping[str, str],
    tell: Callable[[str], None],
) -> str:
    """Make a step's result unless it is there already; return the result's hash."""
    key = _key(step, STAGES[step.stage], run.seed, [hashes[name] for name in step.inputs])
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
    job(result)
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
        return recipe.origin.model if name == SOURCE else str(out / name)

    settings = dict(step.settings)
    for key in STAGES[step.stage].inputs:
        value = settings.get(key)
        if isinstance(value, list):
            settings[key] = [(name, place(name)) for name in value]
        elif value is not None:
            settings[key] = place(value)
    return settings


def _key(step: Step, stage: Stage, seed: int, inputs: list[str]) -> str:
    content = {
        "stage": step.stage,
        "settings": step.settings,
        "seed": seed,
        "inputs": inputs,
        "data": [_hash_data(spec) for spec in _specs(step, _DATA + _FILES)],
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


def _specs(step: Step, names: Sequence[str]) -> list[str]:
    return [str(step.settings[k]) for k in names if step.settings.get(k) is not None]


def _hash_data(spec: str) -> str:
    from calib_data.readers import data_files, parts_of

    return ",".join(
        f"{part.times}*{'+'.join(map(sha256_file, data_files(part.spec))) or part.spec}"
        for part in parts_of(spec)
    )
