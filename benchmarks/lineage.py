"""Where variants come from: their stages as one tree, of which they are the leaves."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.report import VariantReport


@dataclass
class Made:
    """One stage, the variants that it ended in, and the stages that went on from it."""

    stage: str
    settings: str
    variants: list[str] = field(default_factory=list)
    then: list["Made"] = field(default_factory=list)


def tree(variants: Sequence[VariantReport]) -> list[Made]:
    """Return the first stages of all lineages, each with what came of it; equal ones are one."""
    root = Made("", "")
    known: dict[tuple[int, str], Made] = {}
    for variant in variants:
        place = root
        for entry in variant.lineage or [{"stage": "not recorded"}]:
            key = id(place), json.dumps(entry, sort_keys=True)
            if key not in known:
                known[key] = Made(str(entry.get("stage", "stage")), settings(entry))
                place.then.append(known[key])
            place = known[key]
        place.variants.append(variant.name)
    return root.then


def settings(entry: Mapping[str, Any]) -> str:
    """Return what a reader asks of a stage, its model or its settings, in a line; JSON has the rest."""
    given = {"model": entry.get("model"), **(entry.get("settings") or {})}
    return " · ".join(_scalars(given))[:160]


def _scalars(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _scalars(value)
        elif isinstance(value, str | int | float) and value != "":
            text = value.rsplit("/", 1)[-1] if isinstance(value, str) else f"{value:g}"
            yield f"{name.replace('_', ' ')} {text}"
