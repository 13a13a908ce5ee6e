"""Recipes: a YAML list of stages, with variables that a user sets from outside."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib_data.errors import ConfigError
from onnxpress.recipe_stages import STAGES, Origin

SOURCE = "model"  # what steps call the recipe's own model
_KEYS = {"title", "model", "seed", "variables", "steps"}
_VARIABLE = re.compile(r"\$\{([^}]*)\}")


@dataclass(frozen=True)
class Step:
    """One stage of a recipe: its name, which is also its directory, and its settings."""

    name: str
    stage: str
    settings: Mapping[str, Any]
    inputs: tuple[str, ...]  # names of earlier steps, or SOURCE


@dataclass(frozen=True)
class Recipe:
    """The steps made from a model."""

    origin: Origin
    seed: int
    steps: tuple[Step, ...]


def read_recipe(path: Path, given: Mapping[str, str] | None = None) -> Recipe:
    """Return the recipe in a YAML file; `given` replaces values of its `variables`.

    `${name}` stands for a variable in any setting; one that is all of a setting keeps its type. Raises
    `ConfigError` for a file that cannot be read, an unknown stage, setting or variable, or a step that
    names none before it.
    """
    import yaml

    given = given or {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such recipe") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not a YAML recipe: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(content.get("steps"), list):
        raise ConfigError(f"{path}: a recipe has `model` and a list of `steps`")
    unknown = sorted(set(content) - _KEYS)
    if unknown or "model" not in content:
        raise ConfigError(f"{path}: {f'unknown key {unknown[0]!r}' if unknown else 'no `model`'}")
    variables = _variables(path, content.pop("variables", {}), given)
    content = _filled(path, content, variables)
    steps: list[Step] = []
    for entry in content["steps"]:
        steps.append(_read_step(path, entry, {step.name for step in steps}))
    words = [str(path if not path.is_absolute() else path.name)]
    words += [word for name, value in given.items() for word in ("--set", f"{name}={value}")]
    return Recipe(
        Origin(str(content["model"]), f"onnxpress run {shlex.join(words)} -o DIR"),
        int(content.get("seed", 0)),
        tuple(steps),
    )


def _variables(path: Path, defaults: Any, given: Mapping[str, str]) -> dict[str, Any]:
    """Return the variables' values; given ones are numbers or truth values where YAML says so."""
    import yaml

    if not isinstance(defaults, dict):
        raise ConfigError(f"{path}: `variables` are names with values, got {defaults}")
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        known = ", ".join(defaults) or "none"
        raise ConfigError(f"{path} has no variable {unknown[0]!r}; there are {known}")
    values = dict(defaults)
    for name, text in given.items():
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        values[name] = value if isinstance(value, bool | int | float) else text
    return values


def _filled(path: Path, content: Any, variables: Mapping[str, Any]) -> Any:
    """Return what YAML made of the file with variables in place."""
    if isinstance(content, dict):
        return {name: _filled(path, value, variables) for name, value in content.items()}
    if isinstance(content, list):
        return [_filled(path, value, variables) for value in content]
    if not isinstance(content, str):
        return content
    names = _VARIABLE.findall(content)
    unknown = [name for name in names if name not in variables]
    if unknown:
        raise ConfigError(f"{path}: ${{{unknown[0]}}} is not among its `variables`; add it there")
    if names and _VARIABLE.fullmatch(content):
        return variables[names[0]]
    return _VARIABLE.sub(lambda match: str(variables[match[1]]), content)


def _read_step(path: Path, entry: Any, earlier: set[str]) -> Step:
    if not isinstance(entry, dict) or not {"name", "stage"} <= set(entry):
        raise ConfigError(f"{path}: every step has a `name` and a `stage`, got {entry}")
    name, stage = str(entry["name"]), str(entry["stage"])
    if stage not in STAGES:
        raise ConfigError(f"{path}: step {name}: no stage {stage!r}; there are {', '.join(STAGES)}")
    if name in earlier or name == SOURCE or name.startswith(".") or "/" in name or "\\" in name:
        raise ConfigError(f"{path}: {name!r} cannot be a step's name here, or is taken")
    settings = {k: v for k, v in entry.items() if k not in ("name", "stage")}
    inputs: list[str] = []
    for key in STAGES[stage].inputs:
        value = settings.get(key)
        inputs += value if isinstance(value, list) else [value] if value is not None else []
    for needed in inputs:
        if needed != SOURCE and needed not in earlier:
            raise ConfigError(f"{path}: step {name} needs {needed!r}, which is no earlier step")
    if stage != "report" and "from" not in settings:
        raise ConfigError(f"{path}: step {name} does not say `from` which step, or `{SOURCE}`")
    return Step(name, stage, settings, tuple(inputs))
