"""What a model's blocks cost in ONNX Runtime: the table that a plan for a latency is chosen from.

One graph is timed for each of a few sizes that all blocks of a class are cut down to. A block's
milliseconds are linear between those sizes, and below the smallest in proportion to its units; a bend
that the noise of the timings can have made is taken for none. What is left of a layer's time when its
blocks are counted is the layer's own, the rest is fixed.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from benchmarks.report import Environment
from benchmarks.yardstick import Conditions, Progress, Timed, Yardstick
from calib_data.errors import DataError
from compress.allocate import Cost, layer_of
from compress.apply_plan import apply_plan
from compress.blocks import Group, features, find_groups
from compress.checkpoint import Checkpoint
from compress.files import destination_errors, write_json
from compress.plan import PrunePlan
from compress.stacks import droppable_stacks

SCHEMA = 2  # raised when tables of older versions would mislead
_LEVELS = (2 / 3, 1 / 4)  # of a block's units, at which it is timed
_STEP = 16  # numbers of neurons that are timed are multiples of it
_WHOLE = "whole"
_STALE = 0.07  # by which the graph's share of the reference's time may differ from the table's
_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "torch")  # that make the graph and run it

Curve = tuple[tuple[int, float], ...]  # (units, milliseconds of one block), ascending from (0, 0)


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of one call, part by part.

    `milliseconds` is that of the whole graph, `relative` as a share of the reference's that it was
    timed against, and `digest` tells what was measured where.
    """

    digest: str
    relative: float
    milliseconds: float
    fixed: float
    layers: Mapping[str, float]  # one layer's own, by stack
    blocks: Mapping[str, Curve]  # by class of blocks, see `block_classes`
    conditions: Mapping[str, Any]

    def cost(self, model: nn.Module) -> Cost:
        """Return what to pay for each part of `model`, whose table this is."""
        classes = block_classes(model)

        def milliseconds(group: Group, units: int) -> float:
            curve = self.blocks[classes[group.key]]
            return float(np.interp(units, [u for u, _ in curve], [ms for _, ms in curve]))

        depth = {stack: len(layers) for stack, layers in droppable_stacks(model).items()}
        return Cost(milliseconds, self.fixed, self.layers, depth)

    def to_json(self) -> dict[str, Any]:
        """Return the table as JSON-able values."""
        return {
            "schema": SCHEMA,
            "digest": self.digest,
            "relative": self.relative,
            "milliseconds": self.milliseconds,
            "fixed": self.fixed,
            "layers": dict(self.layers),
            "blocks": {name: [list(point) for point in curve] for name, curve in self.blocks.items()},
            "conditions": dict(self.conditions),
        }  # fmt: skip

    @classmethod
    def from_json(cls, values: Any) -> "LatencyTable":
        """Return the table that `to_json` gave; a `DataError` for one of another version."""
        schema = values.get("schema") if isinstance(values, Mapping) else None
        if schema != SCHEMA:
            raise DataError(f"the latency table has schema {schema}, not {SCHEMA}")
        curves = {
            name: tuple((int(units), float(ms)) for units, ms in curve)
            for name, curve in values["blocks"].items()
        }
        plain = ("digest", "relative", "milliseconds", "fixed", "layers", "conditions")
        return cls(blocks=curves, **{name: values[name] for name in plain})


def block_classes(model: nn.Module) -> dict[str, str]:
    """Return the class of each prunable group, by its key: blocks alike but for layer and size."""
    return {
        group.key: f"{re.sub(r'[0-9]+', '*', group.key)}"
        f" × {features(model.get_submodule(group.down))[1]}"
        for group in find_groups(model)
    }


def latency_table(
    checkpoint: Checkpoint,
    yardstick: Yardstick,
    folder: Path | None = None,
    progress: Progress = lambda what: None,
) -> LatencyTable:
    """Return the table of `checkpoint` under the yardstick's conditions, from `folder` if it is there.

    Without `folder` it is the user's cache. One that compares the graph with something else is
    believed only while that comparison still holds: a busy machine slows one kind of graph more than
    another. Raises what `Yardstick.time` raises.
    """
    described = describe(checkpoint, yardstick.conditions)
    if checkpoint is not yardstick.reference:
        described["reference"] = describe(yardstick.reference, yardstick.conditions)["model"]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    path = (folder or cache_folder()) / f"{digest[:32]}.json"
    whole = {}
    if checkpoint is not yardstick.reference or yardstick.conditions.over != "graph":
        whole = {_WHOLE: checkpoint}
    kept = _kept(path)
    if kept is not None:
        now = yardstick.time(whole, progress)[_WHOLE].relative if whole else kept.relative
        if abs(now / kept.relative - 1) <= _STALE:
            return kept
    plans = trials(checkpoint)
    made = {name: apply_plan(checkpoint, plan) for name, plan in plans.items()} | whole
    timed = yardstick.time(made, progress)
    table = replace(
        solve(checkpoint, plans, timed), digest=digest, conditions=described["conditions"]
    )
    with destination_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        write_json(partial, table.to_json())
        partial.replace(path)
    return table


def _kept(path: Path) -> LatencyTable | None:
    """Return the table in a file; None if it is not there, half a file, or of another version."""
    try:
        return LatencyTable.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None


def cache_folder() -> Path:
    """Return where tables are kept: below the folder that XDG calls the user's cache."""
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onnxpress" / "latency"
    )


def describe(checkpoint: Checkpoint, conditions: Conditions) -> dict[str, Any]:
    """Return all that times depend on: the shapes of the model, and where and how it is run."""
    here = Environment.here(conditions.provider, conditions.used_threads)
    shapes = {name: list(value.shape) for name, value in checkpoint.backbone.state_dict().items()}
    config = checkpoint.config.to_dict() if hasattr(checkpoint.config, "to_dict") else {}
    config = {k: v for k, v in config.items() if not k.startswith("_")}  # such as where it lay
    content = [type(checkpoint.backbone).__name__, checkpoint.task, shapes, config]
    model = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
    return {
        "schema": SCHEMA,
        "model": model,
        "conditions": {
            **conditions.to_json(),
            "threads": conditions.used_threads,
            "cpu": here.cpu,
            "gpu": here.gpu,
            "versions": {n: here.versions[n] for n in _PACKAGES if n in here.versions},
        },
    }


def trials(checkpoint: Checkpoint) -> dict[str, PrunePlan]:
    """Return the plans whose graphs are timed: each class of blocks at some sizes, half of a stack."""
    plans: dict[str, PrunePlan] = {}
    for name, members in _members(checkpoint.backbone).items():
        for units in _sizes(members):
            keep = {g.key: tuple(range(units)) for g in members if units < g.units}
            plans[_trial(name, units)] = PrunePlan(keep)
    for stack, layers in droppable_stacks(checkpoint.backbone).items():
        if len(layers) > 1:
            half = len(layers) // 2
            plans[_trial(stack, half)] = PrunePlan({}, {stack: tuple(range(half))})
    return plans


def solve(
    checkpoint: Checkpoint, plans: Mapping[str, PrunePlan], timed: Mapping[str, Timed]
) -> LatencyTable:
    """Return the table that explains the times of the trials, and of the whole if it was timed."""
    model, groups = checkpoint.backbone, find_groups(checkpoint.backbone)
    # one reference for all, of which each has its share: milliseconds by themselves drift
    reference = float(np.median([found.reference_milliseconds for found in timed.values()]))
    relative = timed[_WHOLE].relative if _WHOLE in timed else 1.0
    times = {name: found.relative * reference for name, found in timed.items()}
    whole, curves = relative * reference, {}
    for name, members in _members(model).items():
        sizes = _sizes(members)
        points = [(n, times[_trial(name, n)]) for n in sizes]
        noise = [reference * _noise(timed[_trial(name, n)]) for n in sizes]
        points = _straightened(members, points, noise, whole)
        curves[name] = _curve(members, [*points, (max(g.units for g in members), whole)])
    table = LatencyTable("", relative, whole, 0.0, {}, curves, {})
    cost, layers = table.cost(model), {}
    for stack, depth in cost.depth.items():
        half = depth // 2
        if _trial(stack, half) in plans:
            dropped = [g for g in groups if (layer_of(g, [stack]) or ("", -1))[1] >= half]
            blocks = sum(cost.group(g, g.units) for g in dropped)
            layers[stack] = max(0.0, whole - times[_trial(stack, half)] - blocks) / (depth - half)
    spent = sum(cost.group(g, g.units) for g in groups)
    spent += sum(ms * cost.depth[stack] for stack, ms in layers.items())
    return replace(table, fixed=max(0.0, whole - spent), layers=layers)


def _straightened(
    members: list[Group], points: list[tuple[int, float]], noise: list[float], whole: float
) -> list[tuple[int, float]]:
    """Return the points moved onto the line through the whole where all lie within their noise of it.

    The line is that of least squares in the units that the graphs have lost.
    """
    lost = [float(sum(max(0, g.units - n) for g in members)) for n, _ in points]
    saved = [whole - ms for _, ms in points]
    slope = sum(u * ms for u, ms in zip(lost, saved)) / (sum(u * u for u in lost) or 1.0)
    off = (abs(ms - slope * u) for u, ms in zip(lost, saved))
    if slope > 0 and all(far <= near for far, near in zip(off, noise)):
        return [(n, whole - slope * u) for (n, _), u in zip(points, lost)]
    return points


def _noise(timed: Timed) -> float:
    """Return by how much a graph's share of the reference's time may be wrong."""
    return (timed.interval[1] - timed.interval[0]) / 2


def _curve(members: list[Group], points: list[tuple[int, float]]) -> Curve:
    """Return milliseconds of one block by its units from the graph's, all cut down to so many.

    Between two sizes a unit costs the difference in time over that in units, of which blocks that are
    smaller already lost none. Noise that makes fewer units slower counts as no difference.
    """
    slopes = []
    for (fewer, fast), (more, slow) in itertools.pairwise(points):
        units = sum(min(more, g.units) - min(fewer, g.units) for g in members)
        slopes.append(max(0.0, slow - fast) / units)
    curve = [(0, 0.0)]
    for (units, _), slope in zip(points, [slopes[0], *slopes] if slopes else [0.0]):
        curve.append((units, curve[-1][1] + slope * (units - curve[-1][0])))
    return tuple(curve)


def _members(model: nn.Module) -> dict[str, list[Group]]:
    """Return the groups of each class."""
    classes = block_classes(model)
    found: dict[str, list[Group]] = {}
    for group in find_groups(model):
        found.setdefault(classes[group.key], []).append(group)
    return found


def _sizes(members: list[Group]) -> list[int]:
    """Return the numbers of units that blocks of a class are timed with, ascending."""
    most, step = max(g.units for g in members), 1 if members[0].kind == "heads" else _STEP
    sizes = {max(1, round(most * level / step)) * step for level in _LEVELS}
    return sorted(size for size in sizes if size < most)


def _trial(name: str, size: int) -> str:
    """Return what a trial is called, which a file may be as well."""
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', name)}-{size}"
