"""How much to remove, of what, and what decides: the settings of the pruning stage."""

from dataclasses import dataclass

from compress.allocate import RANKINGS, Limits
from compress.config import StageConfig, one_of, require
from compress.criteria import CRITERIA


@dataclass(frozen=True)
class PruneConfig(StageConfig):
    """How much to remove, and what decides. A target takes the place of the shares."""

    heads: float = 0.25  # share of all attention heads to remove
    ffn: float = 0.25  # share of all feed-forward neurons to remove
    layers: float = 0.0  # share of each stack's layers to remove
    keep_layers: tuple[int, ...] = ()  # or: the layers that stay, the same of every stack
    hidden: int | None = None  # channels of the residual stream that stay
    criterion: str = "fisher"
    ranking: str = "global"  # uniform: every layer keeps the same share
    min_heads: int = 1  # that every attention keeps
    min_ffn: int = 1  # neurons that every feed-forward block keeps
    round_to: int = 16  # what is kept of neurons is a multiple of it, so that kernels stay full
    reconstruct: bool = True  # fit what stays to the unpruned blocks' outputs
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("heads", "ffn", "layers"):
            value = getattr(self, name)
            require(0 <= value < 1, f"--{name} must be at least 0 and below 1, got {value}")
        for option, count in (
            ("--min-heads", self.min_heads),
            ("--min-ffn", self.min_ffn),
            ("--round-to", self.round_to),
            ("--hidden", 1 if self.hidden is None else self.hidden),
        ):
            require(count >= 1, f"{option} must be at least 1, got {count}")
        ascending = list(self.keep_layers) == sorted({n for n in self.keep_layers if n >= 0})
        require(
            ascending,
            f"--keep-layers must be ascending, each layer once, got {_list(self.keep_layers)}",
        )
        require(
            not (self.layers and self.keep_layers),
            "--layers and --keep-layers say the same thing; pass one of them",
        )
        one_of("--criterion", self.criterion, CRITERIA)
        one_of("--ranking", self.ranking, RANKINGS)

    @property
    def limits(self) -> Limits:
        """What every block keeps at least, and in which steps."""
        return Limits(
            {"heads": self.min_heads, "neurons": self.min_ffn},
            {"neurons": self.round_to},
            self.ranking,
        )


def _list(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))
