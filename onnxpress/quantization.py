"""What the quantize stage does besides quantizing: sensitivity, the budget, calibration's state."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib_data.errors import BudgetError, ConfigError, DestinationError

if TYPE_CHECKING:
    from calib_data.batches import Batches
    from compress.checkpoint import Checkpoint, StageResult
    from compress.mixture import Mixture
    from compress.quantize import Prepared
    from compress.quantize_config import QuantizeConfig
    from compress.sensitivity import Cost
    from onnxpress.judge import Judge
    from onnxpress.stages import DataChoice, Run

LIMIT = 512  # examples that calibrate, unless another number is asked for
_SENSED, _SENSED_AT_ONCE = 64, 16  # examples that sensitivity is measured on, and in a batch
_DRAWN = 4  # batches drawn at random, where there is no data
_DRIFTED = 8  # examples in the batch that drift is seen on


@dataclass(frozen=True)
class Budget:
    """How much quality may drop, and what it is measured on."""

    max_drop: float  # see `calib_data.metrics.drop`
    eval: "DataChoice"
    metric: str | None = None  # the first that fits, unless one is named

    def __post_init__(self) -> None:
        if not 0 <= self.max_drop < 1:
            raise ConfigError(f"--max-drop must be at least 0 and below 1, got {self.max_drop}")


@dataclass(frozen=True)
class QuantizeChoice:
    """What belongs to a run of the quantize stage and not to its config."""

    data: "DataChoice | None" = None  # that calibrates
    budget: Budget | None = None
    report: Path | None = None  # where to write what each layer costs

    @property
    def seen(self) -> "DataChoice | None":
        """The data that a model of the stage is looked at on: what calibrates, or what judges."""
        return self.data or (self.budget.eval if self.budget else None)

    def check(self, config: "QuantizeConfig", overwrite: bool) -> None:
        """Raise `ConfigError` for data that nothing uses, or that is missing; the report is new."""
        if self.report is not None and self.report.exists() and not overwrite:
            raise DestinationError(f"{self.report} exists; pass --overwrite to replace it")
        if self.data is None and config.needs_data:
            raise ConfigError(
                f"the scheme {config.scheme} with these settings learns from data; give --data"
            )
        if self.data is not None and not (config.needs_data or self.budget or self.report):
            raise ConfigError(
                f"the scheme {config.scheme} with these settings uses no --data; leave it out, or "
                "add --scheme static, --smooth, --bias-correction, --rounding gptq, "
                "--report-sensitivity or --max-drop"
            )


@contextlib.contextmanager
def calibration_state(out: Path, run: "Run") -> Iterator[Path]:
    """Yield where calibration keeps what it has seen: OUT.calibration, which goes when OUT is there.

    Raises `DestinationError` for one that a run left, without leave to go on from it or to replace it.
    """
    path = out.with_name(f"{out.name}.calibration")
    if path.exists() and not run.resume:
        if not run.overwrite:
            raise DestinationError(
                f"{path} holds an unfinished calibration; go on with --resume, or start anew with "
                "--overwrite"
            )
        shutil.rmtree(path)
    yield path / "inputs"
    shutil.rmtree(path, ignore_errors=True)


def _prepared(
    checkpoint: "Checkpoint",
    config: "QuantizeConfig",
    choice: QuantizeChoice,
    state: Path,
    run: "Run",
) -> "Prepared":
    """Return the checkpoint calibrated; a state of another run is replaced where that is allowed."""
    from compress.quantize import prepare

    calibrates = choice.data if config.needs_data else None
    batches = _batches(checkpoint, calibrates, run.seed) if calibrates else None
    with run.progress("calibrate", None) as advance:
        try:
            return prepare(checkpoint, config, batches, advance, state)
        except ConfigError:
            if not (run.overwrite and state.parent.exists()):
                raise
            shutil.rmtree(state.parent)
            return prepare(checkpoint, config, batches, advance, state)


def quantize_within(
    checkpoint: "Checkpoint",
    config: "QuantizeConfig",
    choice: QuantizeChoice,
    state: Path,
    run: "Run",
) -> "StageResult":
    """Quantize a checkpoint, as much of it as the budget lets; report what it costs and what drifts."""
    from compress.invariance import drift
    from compress.mixture import Mixture
    from compress.quantize import as_result, quantize_only

    judge = _judge(checkpoint, choice.budget)
    prepared = _prepared(checkpoint, config, choice, state, run)
    with run.progress("quantize", len(prepared.names)) as advance:
        mixture = Mixture(prepared, config, advance)
    found: dict[str, Any] = {}
    costs: tuple[Cost, ...] = ()
    if choice.report or (judge and choice.budget):
        costs, told = _costs(mixture, choice, run)
        if choice.report:
            _write_report(choice.report, config, told, costs)
        found["sensitivity"] = {**told, "modules": [cost.to_json() for cost in costs[:10]]}
    kept: Sequence[str] = ()
    if judge is not None and choice.budget is not None:
        kept, found["budget"] = _search(checkpoint, mixture, costs, judge, choice.budget, run)
        found["kept_float"] = list(kept)
    names = [name for name in prepared.names if name not in kept]
    made = mixture.with_quantized_(names)
    if kept:
        del mixture  # its memory: what stays float is a copy of its own
        made = quantize_only(prepared, names, config)
    found |= drift(made, _sample(checkpoint, choice, run.seed))
    return as_result(checkpoint, prepared, made, config, **found)


def require_budget(result: Mapping[str, Any]) -> None:
    """Raise `BudgetError` where the result of the stage does not hold its budget."""
    budget = result.get("budget")
    if budget and not budget["held"]:
        raise BudgetError(
            f"{budget['metric']} drops by {budget['drop']:.4f}, more than {budget['max_drop']:g}, with "
            f"{len(result['kept_float'])} layers in float; {result['path']} holds the best that was "
            "found. Raise --max-drop, or use another scheme or --rounding gptq"
        )


def _batches(checkpoint: "Checkpoint", data: "DataChoice", seed: int) -> "Batches":
    from compress.finetune import objective_of

    # a decoder's inputs are made of the second text; other objectives are for training alone
    pairs = checkpoint.task_row.target == "translation"
    objective = objective_of(checkpoint, pack=False) if pairs else None
    return data.batches(checkpoint, seed, shuffle=False, objective=objective)


def _judge(checkpoint: "Checkpoint", budget: Budget | None) -> "Judge | None":
    from onnxpress.judge import judge_of

    if budget is None:
        return None
    data = budget.eval
    return judge_of(
        checkpoint,
        data.open(data.limit),
        budget.metric,
        batch_size=data.batch_size,
        max_length=data.max_length,
    )


def _costs(
    mixture: "Mixture", choice: QuantizeChoice, run: "Run"
) -> "tuple[tuple[Cost, ...], dict[str, Any]]":
    """Return what each layer costs, and what it was measured on."""
    from compress.sensitivity import passes, sensitivity

    source = mixture.with_quantized_(())
    data = choice.seen
    if data is None:
        told = {"data": "random inputs", "samples": 0}
        batches: list[Any] = [
            source.signature.sample(batch=4, sequence=16, seed=run.seed + i, ragged=True)
            for i in range(_DRAWN)
        ]
    else:
        some = replace(data, limit=_SENSED, batch_size=_SENSED_AT_ONCE)
        encoded = _batches(source, some, run.seed)
        told = {"data": data.spec, "samples": len(encoded.examples)}
        batches = list(encoded)
    with run.progress("sensitivity", passes(mixture, batches)) as advance:
        return sensitivity(mixture, batches, advance), told


def _search(
    checkpoint: "Checkpoint",
    mixture: "Mixture",
    costs: "Sequence[Cost]",
    judge: "Judge",
    budget: Budget,
    run: "Run",
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the layers to keep in float, and what there is to tell of the search."""
    from calib_data.metrics import Measured, drop
    from compress.budget import keep_costliest

    measured: dict[tuple[str, ...], Measured] = {}
    with run.progress(f"search by {judge.metric}", None) as advance:
        before = judge.measure(checkpoint)

        def drop_of(kept: Any) -> float:
            chosen = [name for name in mixture.names if name not in kept]
            found = judge.measure(mixture.with_quantized_(chosen))
            measured[tuple(kept)] = found
            advance()
            return drop(before, found)

        found = keep_costliest([cost.module for cost in costs], drop_of, budget.max_drop)
    return found.kept, {
        "metric": judge.metric,
        "float": before.value,
        "quantized": measured[()].value,
        "value": measured[found.kept].value,
        "drop": found.drop,
        "max_drop": budget.max_drop,
        "held": found.held,
        "data": budget.eval.spec,
        "evaluations": found.evaluations,
        "drops": {str(count): share for count, share in found.drops.items()},
    }


def _sample(checkpoint: "Checkpoint", choice: QuantizeChoice, seed: int) -> Any:
    """Return a batch of the data at hand, to see drift on; None where there is none."""
    if choice.seen is None:
        return None
    some = replace(choice.seen, limit=_DRIFTED, batch_size=_DRIFTED)
    return next(iter(_batches(checkpoint, some, seed)))


def _write_report(
    path: Path, config: "QuantizeConfig", told: Mapping[str, Any], costs: "Sequence[Cost]"
) -> None:
    from compress.files import destination_errors, write_json

    modules = [cost.to_json() for cost in costs]
    with destination_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"settings": config.to_json(), **told, "modules": modules})
