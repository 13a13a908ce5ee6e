"""What a student matches of its teacher, and how it is trained: the settings of distillation."""

from dataclasses import dataclass, field

from calib_data.errors import ConfigError
from compress.config import StageConfig, require
from compress.layer_map import NAMED, is_layer_map
from compress.loss_table import LOSSES, SOFT
from compress.training import TrainConfig

ALPHA = 0.7  # where nothing else is said and the data have labels


@dataclass(frozen=True)
class DistillConfig(StageConfig):
    """What the student matches, and how it is trained."""

    losses: tuple[str, ...] = ()  # name or name=weight; empty: the task's default
    temperature: float = 3.0  # of the softened logits
    alpha: float | None = None  # weight of soft losses, 1 − alpha that of the labels; None: 0.7,
    # and 1 where the data have none
    beta: float = 0.5  # of jsd: the teacher's share in the mixture
    layer_map: str = "uniform"  # or last, or pairs student:teacher as in 0:1,2:5
    relation_map: str = "last"  # the same for the loss relations; last: the last layers meet
    relation_heads: int = 0  # 0: as many as fit, up to the teacher's heads
    contrast_temperature: float = 0.05  # of the cosines in the loss contrastive
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if isinstance(self.train, dict):
            object.__setattr__(self, "train", TrainConfig.from_json(self.train))
        require(self.temperature > 0, f"--temperature must be above 0, got {self.temperature}")
        alpha = self.alpha
        require(alpha is None or 0 <= alpha <= 1, f"--alpha must be in [0, 1], got {alpha}")
        require(0 < self.beta < 1, f"--beta must be between 0 and 1, got {self.beta}")
        require(
            self.contrast_temperature > 0,
            f"--contrast-temperature must be above 0, got {self.contrast_temperature}",
        )
        require(
            self.relation_heads >= 0,
            f"--relation-heads must be at least 1, or 0 for as many as fit, got {self.relation_heads}",
        )
        for option, text in (
            ("--layer-map", self.layer_map),
            ("--relation-map", self.relation_map),
        ):
            require(
                is_layer_map(text),
                f"{option} must be {', '.join(NAMED)} or pairs of layers student:teacher as in "
                f"0:1,2:5, got {text!r}",
            )
        require(
            "-1" not in self.relation_map,
            f"--relation-map pairs layers that attend, from 0 on, got {self.relation_map}",
        )
        self.weights(())

    def weights(self, default: tuple[str, ...]) -> dict[str, float]:
        """Return the losses' weights by name, `default` where none are set."""
        weights = {}
        for text in self.losses or default:
            name, _, value = text.partition("=")
            require(name in LOSSES, f"unknown loss {name!r}; there are {', '.join(LOSSES)}")
            require(name not in weights, f"the loss {name} is named twice; keep one of them")
            try:
                weights[name] = float(value) if value else LOSSES[name].weight
            except ValueError as error:
                raise ConfigError(
                    f"the weight of the loss {name} is no number: {value!r}"
                ) from error
            require(
                0 <= weights[name] < float("inf"),
                f"the weight of the loss {name} must be at least 0, got {value}",
            )
        return weights

    def mixed(self, weights: dict[str, float], labelled: bool) -> dict[str, float]:
        """Return the weights with each soft loss mixed with the labels' by alpha, without zeros.

        Raises `ConfigError` where alpha is set and there is no soft loss to mix, or nothing is left.
        """
        soft = {name: weight for name, weight in weights.items() if name in SOFT}
        require(
            bool(soft) or self.alpha in (None, 1.0),
            f"--alpha mixes soft losses with the labels' and none is chosen; add one of "
            f"{', '.join(SOFT)}, or leave it out and weigh with --losses hard=…",
        )
        default = ALPHA if labelled else 1.0
        alpha = default if self.alpha is None else self.alpha
        mixed = weights | {name: alpha * weight for name, weight in soft.items()}
        mixed["hard"] = weights.get("hard", 0.0) + (1 - alpha) * sum(soft.values())
        mixed = {name: weight for name, weight in mixed.items() if weight > 0}
        require(bool(mixed), "every loss has the weight 0; give one of --losses a larger one")
        return mixed
