"""One run of the prune stage: calibrate, plan, prune and heal, in rounds."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib_data.errors import ConfigError
from onnxpress.aim import Aim
from onnxpress.prune_choice import HealChoice, PruneChoice
from onnxpress.rounds import Progressed, RoundStates
from onnxpress.training import Place, TrainingChoice

if TYPE_CHECKING:
    from calib_data.batches import Batches
    from compress.checkpoint import Checkpoint
    from compress.moments import Moment
    from compress.plan import PrunePlan
    from compress.prune import PruneConfig
    from onnxpress.stages import DataChoice, Run


@dataclass(frozen=True)
class Planned:
    """What a round takes away, what was measured for it, and what its reconstruction fits to."""

    plan: "PrunePlan"
    measured: dict[str, Any]
    seen: "Mapping[str, Moment] | None"


class PruneJob:
    """One run of the stage: the model, what it is calibrated and healed on, and what is aimed at."""

    def __init__(
        self,
        source: "Checkpoint",
        data: "DataChoice | None",
        config: "PruneConfig",
        choice: PruneChoice,
        run: "Run",
        training: TrainingChoice,
        original: "Checkpoint | None" = None,
    ) -> None:
        """`original` is what speed is relative to and healing learns from: `source` without one."""
        from compress.prune import refuse_pruning

        refuse_pruning(source, choice.cuts(config) and config.reconstruct)
        self.source, self.data, self.config, self.choice = source, data, config, choice
        self.original = original or source
        self.run, self.training = run, training
        self.calibration = self._calibration()
        self._aim: Aim | None = None

    @contextlib.contextmanager
    def aim(self) -> Iterator[None]:
        """Hold what graphs are timed against, for as long as plans are made."""
        with contextlib.ExitStack() as stack:
            if self.choice.target is not None:
                self._aim = stack.enter_context(Aim(self.original, self.choice.target))
            yield

    def run_in(self, place: Place) -> Progressed:
        """Prune, and heal, in as many rounds as were asked for; go on where an earlier run was."""
        workspace = None
        if self.choice.heal is not None:
            assert place.train_run.workspace is not None
            workspace = replace(place.train_run.workspace, path=place.kept("pruning"))
        states = RoundStates(workspace, self._settings())
        done = states.load(self.source)
        while done.healed < self.choice.rounds:
            if len(done.plans) == done.healed:
                self._prune(done)
                states.save(done)
            if self.choice.heal is not None:
                self._heal(done, self.choice.heal, place)
            done.healed += 1
            states.save(done)
        self._cut_vocabulary(done)
        return done

    def plan(self, done: Progressed) -> Planned:
        """Return the plan of the next round."""
        from compress.prune import fitted_to, kept_channels, plan_by_shares, study

        target, current = self.choice.target, done.checkpoint
        left = self.choice.rounds - done.healed
        config = self._config_of(done)
        with self.run.progress("importance", None) as advance:
            seen = fitted_to(current, self.calibration, config, advance)
            if self.choice.plan is not None:
                return Planned(read_plan(self.choice.plan), {}, seen)
            assert self.calibration is not None  # or `PruneChoice.check` has raised
            found = study(
                current, self.calibration, config, seen, advance,
                **({"units": True, "layers": target.whole_layers} if target else {}),
            )  # fmt: skip
        if self._aim is None:
            return Planned(plan_by_shares(current, found, config), {}, seen)
        with self.run.progress("latency", None) as advance:
            plan, measured = self._aim.plan(
                current,
                found,
                config.limits,
                share=1 / left,
                hidden=kept_channels(found, config),
                tell=lambda what: advance(what, 0, None),
            )
        return Planned(plan, measured, seen)

    def report(self, done: Progressed) -> dict[str, Any]:
        """Return what there is to tell of a finished run."""
        from compress.checkpoint import parameter_count
        from compress.kept import kept_units

        measured = done.told[-1].get("measured")
        healed = [told["healing"] for told in done.told if "healing" in told]
        fits = done.told[-1].get("reconstruction", {})
        return {
            "parameters_before": parameter_count(self.source.backbone),
            "parameters_after": parameter_count(done.checkpoint.backbone),
            "layers": kept_units(done.checkpoint),
            **({"measured": measured} if measured else {}),
            **({"reconstruction": _mean_fit(fits)} if fits else {}),
            **{k: v for k, v in done.told[-1].items() if k in ("sparsity", "vocabulary")},
            **({"healing": healed[-1], "rounds": len(healed)} if healed else {}),
        }

    def copy_log(self, place: Place) -> None:
        """Put what the rounds of healing logged beside the result, one after another."""
        from compress.train_log import LOG

        if self.choice.heal is None:
            return
        logs = sorted(place.kept("pruning").glob(f"round-*/{LOG}"))
        text = "".join(path.read_text(encoding="utf-8") for path in logs)
        (place.staging / LOG).write_text(text, encoding="utf-8")

    def _prune(self, done: Progressed) -> None:
        from compress.plan import PrunePlan
        from compress.prune import carry_out

        if not self.choice.cuts(self.config):
            done.plans.append(PrunePlan())
            done.told.append({})
            self._sparsify(done)
            return
        made, target = self.plan(done), self.choice.target
        details = {"target": target.to_json(), "measured": made.measured} if target else {}
        result = carry_out(
            done.checkpoint,
            made.plan,
            self._config_of(done),
            self.calibration,
            made.seen,
            **details,
        )
        done.checkpoint = result.checkpoint
        done.plans.append(made.plan)
        told = {"measured": made.measured} if made.measured else {}
        done.told.append(
            {**told, **{k: v for k, v in result.report.items() if k == "reconstruction"}}
        )
        self._sparsify(done)

    def _sparsify(self, done: Progressed) -> None:
        """In the last round, make single weights zero; healing keeps them so."""
        from compress.sparsity import SparsityConfig, sparsify

        if self.choice.sparsity is None or done.healed + 1 < self.choice.rounds:
            return
        config = SparsityConfig.from_json(dict(self.choice.sparsity))
        with self.run.progress("sparsify", None) as advance:
            assert self.calibration is not None  # or `PruneChoice.check` has raised
            result = sparsify(done.checkpoint, self.calibration, config, advance)
        done.checkpoint = result.checkpoint
        done.told[-1]["sparsity"] = {"zeros": result.report["zeros"], **config.to_json()}

    def _cut_vocabulary(self, done: Progressed) -> None:
        """At the end, as healing compares with a model that knows all tokens."""
        from compress.vocabulary import prune_vocabulary

        choice = self.choice.vocabulary
        if choice is not None:
            result = prune_vocabulary(
                done.checkpoint, choice.texts(), choice.listed(), choice.min_count
            )
            done.checkpoint = result.checkpoint
            done.told[-1]["vocabulary"] = result.report

    def _heal(self, done: Progressed, heal: HealChoice, place: Place) -> None:
        """Train what was pruned to behave like the original."""
        from compress.distill import AskTeacher, cached_teacher, distill, running_teacher
        from compress.finetune import objective_of
        from compress.kept import layers_left
        from compress.training import TrainRun
        from onnxpress.training import told

        assert self.data is not None
        assert place.train_run.workspace is not None
        folder = place.kept("pruning") / f"round-{done.healed + 1}"
        workspace = replace(place.train_run.workspace, path=folder)
        objective = objective_of(self.source, heal.pack)
        batches = self.data.batches(
            done.checkpoint, self.run.seed, True, objective, teacher=self.original
        )
        ask: AskTeacher = running_teacher
        config = heal.config(self.original, layers_left(self.original, done.checkpoint))
        if heal.cache_teacher:
            batches = batches.numbered()
            ask = cached_teacher(batches, place.kept("teacher"), config.train)
        judge = self.training.judge(self.original, self.data.max_length)
        label = f"heal {done.healed + 1} of {self.choice.rounds}"
        with self.run.progress(label, config.train.total_steps(len(batches))) as advance:
            result = distill(
                self.original,
                done.checkpoint,
                batches,
                config,
                advance,
                ask,
                evaluate=judge,
                run=TrainRun(workspace, self.training.tensorboard),
            )
        done.checkpoint = result.checkpoint
        report = told(result.report, judge)
        done.told[-1]["healing"] = {
            k: v for k, v in report.items() if not k.startswith("parameters")
        }

    def _config_of(self, done: Progressed) -> "PruneConfig":
        """Return the settings of the next round, which goes its part of the way."""
        from onnxpress.prune_shares import next_shares

        if self.choice.rounds == 1:
            return self.config
        share = (done.healed + 1) / self.choice.rounds
        return next_shares(self.config, self.source, done.checkpoint, share)

    def _calibration(self) -> "Batches | None":
        """Return some of the data, in order, as importance and reconstruction see it."""
        from compress.finetune import objective_of

        if self.data is None:
            return None
        limit = min(self.data.limit or self.choice.calibrate, self.choice.calibrate)
        pack = self.choice.heal is not None and self.choice.heal.pack
        # a decoder's inputs are made of the second text; other objectives are for training alone
        made_of_pairs = self.source.task_row.target == "translation"
        objective = objective_of(self.source, pack) if pack or made_of_pairs else None
        some = replace(self.data, limit=limit)
        return some.batches(self.source, self.run.seed, False, objective)

    def _settings(self) -> dict[str, Any]:
        """Return all that a run must have in common with the one that it goes on from."""
        from compress.checkpoint import weights_sha256

        choice = self.choice
        heal = choice.heal and {
            "steps": choice.heal.steps, "matching": dict(choice.heal.matching),
            "train": dict(choice.heal.train), "pack": choice.heal.pack,
        }  # fmt: skip
        settings = {
            "prune": self.config.to_json(),
            "target": choice.target and choice.target.to_json(),
            "plan": choice.plan and read_plan(choice.plan).to_json(),
            "heal": heal,
            "sparsity": choice.sparsity and dict(choice.sparsity),
            "rounds": choice.rounds,
            "data": self.calibration and self.calibration.fingerprint,
            "model": weights_sha256(self.source.module),
            "original": weights_sha256(self.original.module),
        }
        return dict(json.loads(json.dumps(settings)))


def read_plan(path: Path) -> "PrunePlan":
    """Return the plan in a JSON file; a `ConfigError` says what is wrong with it."""
    from compress.plan import PrunePlan

    try:
        return PrunePlan.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as a plan: {error}") from error


def _mean_fit(fits: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the blocks' mean error, before and after what stays was fitted."""
    return {k: sum(fit[k] for fit in fits.values()) / len(fits) for k in ("before", "after")}
