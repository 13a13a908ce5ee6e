"""The prune stage as commands and recipes run it: to a checkpoint, or to a plan in a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib_data.errors import BudgetError, ConfigError, DestinationError
from onnxpress.prune_choice import PruneChoice
from onnxpress.prune_job import PruneJob
from onnxpress.rounds import Progressed
from onnxpress.training import TrainingChoice

if TYPE_CHECKING:
    from compress.prune import PruneConfig
    from onnxpress.stages import DataChoice, ModelChoice, Run


def prune_model(
    model: "ModelChoice",
    data: "DataChoice | None",
    config: "PruneConfig",
    out: Path,
    run: "Run",
    choice: PruneChoice | None = None,
    training: TrainingChoice | None = None,
) -> dict[str, Any]:
    """Prune a model and write it, whatever it was healed or measured to be."""
    choice, training = choice or PruneChoice(), training or TrainingChoice()
    choice.check(config, data)
    with training.place(out, run) as place:
        job = _job(model, data, config, choice, run, training)
        with job.aim():
            done = job.run_in(place)
        place.save(done.checkpoint)
        job.copy_log(place)
    return {"stage": "prune", "path": str(out), **job.report(done)}


def plan_model(
    model: "ModelChoice",
    data: "DataChoice | None",
    config: "PruneConfig",
    out: Path,
    run: "Run",
    choice: PruneChoice | None = None,
) -> dict[str, Any]:
    """Write the plan that `prune_model` would carry out in its first round, as JSON; prune nothing."""
    from compress.files import destination_errors, write_json

    choice = choice or PruneChoice()
    choice.check(config, data)
    if choice.heal or choice.plan or choice.rounds > 1 or choice.sparsity or choice.vocabulary:
        raise ConfigError(
            "--plan-only prunes nothing: leave out --plan, --heal, --schedule, --sparsity and "
            "--vocab-from"
        )
    if out.exists() and (out.is_dir() or not run.overwrite):
        raise DestinationError(f"{out} exists; name a new file, or pass --overwrite to replace one")
    job = _job(model, data, config, choice, run, TrainingChoice())
    with job.aim():
        made = job.plan(Progressed(job.source, [], []))
    with destination_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, made.plan.to_json())
    return {
        "stage": "plan",
        "path": str(out),
        "plan": made.plan.to_json(),
        **({"measured": made.measured} if made.measured else {}),
    }


def _job(
    model: "ModelChoice",
    data: "DataChoice | None",
    config: "PruneConfig",
    choice: PruneChoice,
    run: "Run",
    training: TrainingChoice,
) -> PruneJob:
    original = None if choice.original is None else choice.original.open()
    return PruneJob(model.open(), data, config, choice, run, training, original)


def require_target(result: Mapping[str, Any]) -> None:
    """Raise `BudgetError` where the finished graph misses its target."""
    measured = result.get("measured")
    if measured and not measured["held"]:
        raise BudgetError(
            f"{measured.get('note', 'the target is missed')}. {result['path']} is written"
        )
