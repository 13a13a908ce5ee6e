"""What the stages' settings have in common: frozen, checked, stored as JSON."""

import dataclasses
import json
from typing import Any, Self, TypeVar

from calib_data.errors import ConfigError

T = TypeVar("T")


class StageConfig:
    """Mixin for frozen dataclasses of settings: to and from plain JSON values."""

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON gives them back: lists for tuples."""
        values = dataclasses.asdict(self)  # type: ignore[call-overload]
        return dict(json.loads(json.dumps(values)))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Make the settings from a dict; a `ConfigError` names what does not exist, or is no list."""
        fields = {field.name: field.default for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise ConfigError(
                f"unknown setting {unknown[0]!r}; there are {', '.join(sorted(fields))}"
            )
        for name, value in values.items():
            if isinstance(fields[name], tuple) and not isinstance(value, list | tuple):
                raise ConfigError(f"{name} is a list, as in [{value}]; got {value!r}")
        frozen = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        try:
            return cls(**frozen)
        except TypeError as error:
            raise ConfigError(f"{cls.__name__}: {error}") from error


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def one_of(name: str, value: T, allowed: tuple[T, ...]) -> None:
    """Raise `ConfigError` unless `value` is among `allowed`."""
    require(value in allowed, f"{name} must be one of {', '.join(map(str, allowed))}, got {value}")
