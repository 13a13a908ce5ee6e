"""The one training loop: distillation, healing and fine-tuning hand it a loss and batches."""

import hashlib
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib_data.batches import Batches
from calib_data.errors import ConfigError, DataError, TrainingError
from compress.averaging import AveragedWeights, Best, restore_
from compress.checkpoint import weights_sha256
from compress.processes import agreed, is_main, training_device
from compress.stepping import Batch, LossOf, Outcome, Stepper, memory_errors, units
from compress.train_config import TrainConfig, learning_rate
from compress.train_log import LogWriter, TrainLog, check_tensorboard, read_records
from compress.training_state import restore_state_, state_of
from compress.workspace import Workspace

__all__ = [
    "LossOf",
    "TrainConfig",
    "TrainLog",
    "TrainRun",
    "Workspace",
    "train_",
    "training_device",
    "units",
]


@dataclass(frozen=True)
class TrainRun:
    """What belongs to one run and not to its result: where its state is kept, and who is told.

    `workspace` None: nothing is written. `identity` is what, beside the config, the weights and the
    data, must be the same for a run to be continued: the teacher's hash, the loss's settings.
    """

    workspace: Workspace | None = None
    tensorboard: Path | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)


def train_(
    module: nn.Module,
    loss_of: LossOf,
    batches: Batches,
    config: TrainConfig,
    progress: Callable[[float], None] = lambda loss: None,
    *,
    evaluate: Callable[[], float] | None = None,
    run: TrainRun | None = None,
) -> TrainLog:
    """Train `module` in place on the sum of `loss_of`'s terms and leave it in eval mode.

    `module` holds all weights that are trained. `loss_of` draws random numbers from torch only. With
    `evaluate`, a figure of the module's (higher is better) taken every `config.eval_every` steps and
    at the end, the weights with the best are what remains; with `config.ema` averaged ones, which are
    evaluated as well. `progress` is told each step's loss, of a continued run the earlier ones too.

    Under a launcher every process calls this alike. Raises `TrainingError` for a loss or a gradient
    that is not finite or a batch that does not fit in memory, `DataError` for no batches,
    `ConfigError` for settings that the machine or a saved state does not allow, `DestinationError`
    where state cannot be saved.
    """
    if len(batches) == 0:
        raise DataError("there is no batch to train on; give --data at least one row")
    loop = _Loop(module, loss_of, batches, config, progress, evaluate, run or TrainRun())
    with memory_errors(batches.batch_size, config.accumulate):
        return loop.train()


class _Loop:
    """A training run: the stepper, and what is counted, averaged, evaluated and saved around it."""

    def __init__(
        self,
        module: nn.Module,
        loss_of: LossOf,
        batches: Batches,
        config: TrainConfig,
        progress: Callable[[float], None],
        evaluate: Callable[[], float] | None,
        run: TrainRun,
    ) -> None:
        if run.tensorboard is not None:
            check_tensorboard()
        self.module, self.batches, self.config, self.run = module, batches, config, run
        self.progress, self.evaluate = progress, evaluate
        self.steps = config.total_steps(len(batches))
        self.settings = {
            "train": {**config.to_json(), "total_steps": self.steps},
            "data": batches.fingerprint,
            "weights": weights_sha256(module),
            "evaluation": evaluate is not None,
            **run.identity,
        }
        self.stepper = Stepper(module, loss_of, config, batches.batch_size)
        self.settings["processes"] = self.stepper.processes
        if evaluate is not None and self.stepper.sharded:
            raise ConfigError(
                "--eval needs whole weights in each process, FSDP and DeepSpeed shard them; "
                "leave it out and evaluate the result"
            )
        self.average = AveragedWeights(module, config.ema) if config.ema else None
        self.best = Best(config.patience)
        self.counted: Counter[str] = Counter()
        self.losses: list[float] = []
        self.rates: list[float] = []  # tokens per second
        self.evaluations: list[tuple[int, float]] = []

    def train(self) -> TrainLog:
        """Go through the steps, from a saved state on if there is one; return what happened."""
        try:
            with ExitStack() as stack:
                self._continue()
                workspace, main = self.run.workspace, is_main()
                log = LogWriter(
                    workspace.log if workspace and main else None,
                    self.run.tensorboard if main else None,
                    len(self.losses),
                )
                stack.enter_context(log)
                self._go_on(log)
            if self.best.weights:
                restore_(self.module, self.best.weights)
            elif self.average is not None:
                restore_(self.module, self.average.weights)
        finally:
            self.stepper.close()
        return self._log()

    def _go_on(self, log: LogWriter) -> None:
        stream = _stream(self.batches, len(self.losses) * self.config.accumulate)
        for step in range(len(self.losses), self.steps):
            if self.best.exhausted:
                break
            started = time.perf_counter()
            parts = [next(stream) for _ in range(self.config.accumulate)]
            rate = learning_rate(step, self.steps, self.config)
            outcome = self.stepper.step(parts, rate)
            if not outcome.sound:
                agreed(lambda: self._stop(step, parts, outcome))  # noqa: B023  called at once
            if self.average is not None:
                self.average.update_(self.module, step)
            tokens = self._count(parts)
            record = {
                "step": step + 1,
                "loss": outcome.loss,
                "terms": outcome.total(),
                "rate": rate,
                "gradient_norm": outcome.norm,
                "tokens_per_second": tokens / (time.perf_counter() - started),
            }
            if self._due(step, self.config.eval_every, last=True):
                record["evaluation"] = self._evaluate(step)
            self._note(record)
            log.write(record)
            workspace = self.run.workspace
            if workspace is not None and self._due(step, workspace.save_every, last=False):
                log.sync()
                self._save(workspace, step + 1)
            self.progress(outcome.loss)

    def _due(self, step: int, every: int, last: bool) -> bool:
        return bool(every) and ((step + 1) % every == 0 or (last and step + 1 == self.steps))

    def _count(self, parts: list[Batch]) -> float:
        """Count the parts' tokens and the places for them; return the tokens."""
        before = self.counted["tokens"]
        for part in parts:
            self.counted["tokens"] += int(units(part)["tokens"])
            if "attention_mask" in part:
                self.counted["places"] += part["attention_mask"].numel()
        return self.counted["tokens"] - before

    def _note(self, record: Mapping[str, Any]) -> None:
        self.losses.append(record["loss"])
        self.rates.append(record["tokens_per_second"])
        if record.get("evaluation") is not None:
            self.evaluations.append((record["step"], record["evaluation"]))

    def _evaluate(self, step: int) -> float | None:
        """Return the figure for the weights that would be returned, and compare it with the best."""
        if self.evaluate is None:
            return None
        with self.average.in_place(self.module) if self.average else nullcontext():
            self.module.eval()
            own = float(self.evaluate())
            value = agreed(lambda: own)  # on all: they stop at the same step
            self.best.take(value, step + 1, self.module)
        self.stepper.to_training_mode_()
        return value

    def _continue(self) -> None:
        """Take up the state that the workspace holds, if it holds one of this run."""
        workspace = self.run.workspace
        if workspace is None or not agreed(lambda: workspace.claim(self.settings)):
            return
        state = workspace.load()
        records = agreed(lambda: read_records(workspace.log, state.step))
        restore_state_(state, self.stepper, self.average, self.best)
        self.counted = Counter(state.plain["counted"])
        for record in records:
            self._note(record)
            self.progress(record["loss"])

    def _save(self, workspace: Workspace, step: int) -> None:
        partial = agreed(workspace.begin)
        tensors, plain = state_of(self.stepper, self.average, self.best, partial)
        plain["counted"] = dict(self.counted)
        agreed(lambda: workspace.commit(step, tensors, plain))

    def _stop(self, step: int, parts: list[Batch], outcome: Outcome) -> None:
        """Say which batches made the loss or the gradient not finite, and keep them."""
        bad = outcome.unsound_parts()
        digest = _digest([parts[i] for i in bad])
        what = f"the loss is {outcome.loss}"
        if abs(outcome.loss) < float("inf"):
            what = f"the gradient's norm is {outcome.norm}"
        kept = ""
        if self.run.workspace is not None:
            kept = f", kept in {self.run.workspace.keep_batches(step, {i: parts[i] for i in bad})}"
        raise TrainingError(
            f"{what} at step {step}; lower --lr (now {self.config.learning_rate}) or look at the "
            f"batch (fingerprint {digest[:12]}{kept})"
        )

    def _log(self) -> TrainLog:
        places = self.counted["places"]
        tokens = self.counted["tokens"]
        return TrainLog(
            losses=tuple(self.losses),
            epochs=len(self.losses) * self.config.accumulate / len(self.batches),
            padding=1 - tokens / places if places else None,
            tokens_per_second=statistics.median(self.rates) if places else None,
            evaluations=tuple(self.evaluations),
            best_step=self.best.step if self.best.weights else None,
        )


def _stream(batches: Batches, start: int) -> Iterator[Batch]:
    """Yield batches epoch after epoch, from the `start`-th of all on."""
    first, skipped = divmod(start, len(batches))
    for epoch in itertools.count(first):
        yield from itertools.islice(batches.iterate(epoch), skipped, None)
        skipped = 0


def _digest(batches: list[Batch]) -> str:
    """Return the hex sha256 of the batches' names, shapes and values."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            tensor: Tensor = value.detach().cpu().contiguous()
            digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
