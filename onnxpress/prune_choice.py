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
    from compress.train_config import TrainConfig
    from onnxpress.stages import DataChoice, ModelChoice

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
    cache_teacher: bool = False  # keep its answers on disk for later epochs and rounds

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"--heal must be at least 1 step, got {self.steps}")
        self._training()  # raises now, not after the pruning

    def _training(self) -> "TrainConfig":
        from compress.train_config import TrainConfig

        return TrainConfig(**{"learning_rate": _RATE, **self.train, "steps": self.steps})

    def config(
        self, teacher: "Checkpoint", kept: "Mapping[str, tuple[int, ...]]"
    ) -> "DistillConfig":
        """Return the distillation from `teacher` to what keeps its layers in `kept`, by stack.

        A layer learns from the one that it was; classifiers learn hidden states besides logits.
        """
        from compress.distill_config import DistillConfig

        matching = dict(self.matching)
        if not matching.get("losses") and teacher.task_row.target == "class":
            matching["losses"] = ("logits", "hidden")
        if len(kept) == 1 and matching.get("layer_map", "uniform") == "uniform":
            pairs = (f"{mine}:{theirs}" for mine, theirs in enumerate(next(iter(kept.values()))))
            matching["layer_map"] = ",".join(pairs)
        return DistillConfig(**matching, train=self._training())


@dataclass(frozen=True)
class VocabularyChoice:
    """Which tokens stay: those of some texts, and those that a file lists."""

    spec: str
    columns: str | None = None
    keep: Path | None = None  # a token, or a text whose tokens stay, on each line
    min_count: int = 1  # a token occurs so often, or it goes

    def texts(self) -> list[str]:
        """Return the texts."""
        from calib_data.sources import open_data
        from compress.vocabulary import texts_of

        return texts_of(open_data(self.spec, self.columns))

    def listed(self) -> list[str]:
        """Return what the file lists."""
        if self.keep is None:
            return []
        try:
            lines = self.keep.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ConfigError(f"--keep-tokens {self.keep} cannot be read: {error}") from error
        return [line for line in lines if line.strip()]


@dataclass(frozen=True)
class PruneChoice:
    """What belongs to a run of the prune stage and not to its config."""

    target: Target | None = None
    plan: Path | None = None  # a plan made before
    original: "ModelChoice | None" = None  # what the model was pruned from before
    heal: HealChoice | None = None
    rounds: int = 1  # prune, heal, prune again
    calibrate: int = CALIBRATE
    sparsity: Mapping[str, Any] | None = None  # fields of `SparsityConfig`
    vocabulary: VocabularyChoice | None = None

    def cuts(self, config: "PruneConfig") -> bool:
        """Whether units, layers or channels go; otherwise it is single weights or tokens alone."""
        others = self.sparsity is not None or self.vocabulary is not None
        return bool(self.target or self.plan or _amounts(config)) or not others

    def check(self, config: "PruneConfig", data: "DataChoice | None") -> None:
        """Raise `ConfigError` for settings that do not go together, or data that is missing."""
        shares = [name for name in _amounts(config) if name != "hidden"]
        if self.target is not None and shares:
            raise ConfigError(
                f"--{next(iter(self.target.given))} decides how much goes; leave out "
                f"--{shares[0].replace('_', '-')}"
            )
        if self.plan is not None and (self.target or shares or config.hidden):
            raise ConfigError("--plan says what stays; leave out options that say how much goes")
        if self.original is not None and not (self.heal or self.target):
            raise ConfigError(
                "--original is what healing learns from and --speedup is relative to; add one of them"
            )
        if self.rounds < 1:
            raise ConfigError(f"--rounds must be at least 1, got {self.rounds}")
        if self.rounds > 1 and (self.heal is None or self.plan is not None):
            raise ConfigError(
                "--schedule iterative prunes again what was healed: it goes with --heal, and without "
                "--plan"
            )
        if self.calibrate < 1:
            raise ConfigError(f"--calibrate must be at least 1, got {self.calibrate}")
        if self.sparsity is not None:
            from compress.sparsity import SparsityConfig

            SparsityConfig.from_json(dict(self.sparsity))  # raises now, not after the pruning
        learns = self.cuts(config) and (self.plan is None or config.reconstruct)
        if data is None and (learns or self.sparsity is not None or self.heal):
            raise ConfigError(
                "importance, reconstruction, sparsity and healing need --data; only --vocab-from and "
                "--plan with --no-reconstruct do without"
            )


def config_of(settings: Mapping[str, Any], choice: PruneChoice, seed: int) -> "PruneConfig":
    """Return the config of what was set, with default shares where nothing says how much goes."""
    from compress.prune_config import PruneConfig

    says = {"heads", "ffn", "layers", "keep_layers", "hidden"} & set(settings)
    others = (choice.target, choice.plan, choice.sparsity, choice.vocabulary)
    share = 0.0 if says or any(other is not None for other in others) else SHARE
    return PruneConfig.from_json({"heads": share, "ffn": share, **settings, "seed": seed})


def sparsity_of(text: str | None, method: str | None = None) -> dict[str, Any] | None:
    """Return what `--sparsity` says: a share of the weights, or 2:4."""
    if text is None:
        if method is not None:
            raise ConfigError("--sparsity-method goes with --sparsity; add it")
        return None
    chosen = {} if method is None else {"method": method}
    if text == "2:4":
        return {"pattern": text, **chosen}
    try:
        return {"share": float(text), **chosen}
    except ValueError as error:
        raise ConfigError(f"--sparsity must be a share as 0.5, or 2:4, got {text}") from error


def _amounts(config: "PruneConfig") -> list[str]:
    """Return the settings that say how much goes, of those that are set."""
    names = ("heads", "ffn", "layers", "keep_layers", "hidden")
    return [name for name in names if getattr(config, name)]


def rounds_of(schedule: str, rounds: int | None) -> int:
    """Return how many rounds a schedule has."""
    if schedule not in ("one-shot", "iterative"):
        raise ConfigError(f"--schedule must be one-shot or iterative, got {schedule}")
    if rounds is not None and schedule != "iterative":
        raise ConfigError("--rounds goes with --schedule iterative")
    return (_ROUNDS if rounds is None else rounds) if schedule == "iterative" else 1
