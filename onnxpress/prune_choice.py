"""What belongs to a run of the prune stage and not to its config."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib_data.errors import ConfigError
from onnxpress.target import Target

if TYPE_CHECKING:
    from compress.checkpoint import Checkpoint
    from compress.distill_config import DistillConfig
    from compress.prune import PruneConfig
    from onnxpress.stages import DataChoice

CALIBRATE = 512  # examples that importance and reconstruction look at
SHARE = 0.25  # of heads and neurons to remove, where nothing says how much goes
_ROUNDS = 3  # of an iterative schedule
_RATE = 3e-4  # of healing: higher than a student's, as what stays was trained already


@dataclass(frozen=True)
class HealChoice:
    """How a pruned model learns from the unpruned one."""

    steps: int  # in every round
    matching: Mapping[str, Any] = field(default_factory=dict)  # fields of `DistillConfig`
    train: Mapping[str, Any] = field(default_factory=dict)  # fields of `TrainConfig`
    pack: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"--heal must be at least 1 step, got {self.steps}")

    def config(
        self, source: "Checkpoint", kept: "Mapping[str, tuple[int, ...]]"
    ) -> "DistillConfig":
        """Return the distillation from `source` to what keeps the layers in `kept`, by stack.

        A layer learns from the one that it was; classifiers learn hidden states besides logits.
        """
        from compress.distill_config import DistillConfig
        from compress.train_config import TrainConfig

        train = TrainConfig(**{"learning_rate": _RATE, **self.train, "steps": self.steps})
        matching = dict(self.matching)
        if not matching.get("losses") and source.task_row.target == "class":
            matching["losses"] = ("logits", "hidden")
        if len(kept) == 1 and matching.get("layer_map", "uniform") == "uniform":
            pairs = (f"{mine}:{theirs}" for mine, theirs in enumerate(next(iter(kept.values()))))
            matching["layer_map"] = ",".join(pairs)
        return DistillConfig(**matching, train=train)


@dataclass(frozen=True)
class PruneChoice:
    """What belongs to a run of the prune stage and not to its config."""

    target: Target | None = None
    plan: Path | None = None  # a plan made before
    heal: HealChoice | None = None
    rounds: int = 1  # prune, heal, prune again
    calibrate: int = CALIBRATE

    def check(self, config: "PruneConfig", data: "DataChoice | None") -> None:
        """Raise `ConfigError` for settings that do not go together, or data that is missing."""
        shares = [n for n in ("heads", "ffn", "layers", "keep_layers") if getattr(config, n)]
        if self.target is not None and shares:
            raise ConfigError(
                f"--{next(iter(self.target.given))} decides how much goes; leave out "
                f"--{shares[0].replace('_', '-')}"
            )
        if self.plan is not None and (self.target or shares or config.hidden):
            raise ConfigError("--plan says what stays; leave out options that say how much goes")
        if self.rounds < 1:
            raise ConfigError(f"--rounds must be at least 1, got {self.rounds}")
        if self.rounds > 1 and (self.heal is None or self.plan is not None):
            raise ConfigError(
                "--schedule iterative prunes again what was healed: it goes with --heal, and without "
                "--plan"
            )
        if self.calibrate < 1:
            raise ConfigError(f"--calibrate must be at least 1, got {self.calibrate}")
        if data is None and (self.plan is None or self.heal or config.reconstruct):
            raise ConfigError(
                "importance, reconstruction and healing need --data; only --plan with "
                "--no-reconstruct does without"
            )


def config_of(settings: Mapping[str, Any], choice: PruneChoice, seed: int) -> "PruneConfig":
    """Return the config of what was set, with default shares where nothing says how much goes."""
    from compress.prune_config import PruneConfig

    says = {"heads", "ffn", "layers", "keep_layers", "hidden"} & set(settings)
    share = 0.0 if says or choice.target or choice.plan else SHARE
    return PruneConfig.from_json({"heads": share, "ffn": share, **settings, "seed": seed})


def rounds_of(schedule: str, rounds: int | None) -> int:
    """Return how many rounds a schedule has."""
    if schedule not in ("one-shot", "iterative"):
        raise ConfigError(f"--schedule must be one-shot or iterative, got {schedule}")
    if rounds is not None and schedule != "iterative":
        raise ConfigError("--rounds goes with --schedule iterative")
    return (_ROUNDS if rounds is None else rounds) if schedule == "iterative" else 1
