"""How to quantize: the settings, and which of them each scheme has."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from compress.config import StageConfig, one_of, require

# scheme → its own settings → what each may be, the default first
SCHEME_SETTINGS: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "dynamic": {"per_channel": (True, False), "weight_range": ("exact", "full", "reduced")},
    "static": {
        "per_channel": (True, False),
        "weight_range": ("exact", "full", "reduced"),
        "activations": ("uint8", "int8"),
        "ranges": ("mse", "minmax", "percentile", "entropy"),
    },
    "weight-only": {"bits": (4, 8), "block_size": (32, 16, 64, 128, 256)},
}
ROUNDINGS = ("nearest", "gptq")
EMBEDDING_BITS = (8, 4)
EMBEDDING_BLOCK_SIZES = (32, 16, 64, 128)
# what a graph is shaped for → the schemes that are of use there
TARGET_SCHEMES: Mapping[str, tuple[str, ...]] = {
    "cpu": tuple(SCHEME_SETTINGS),
    "portable": tuple(SCHEME_SETTINGS),
    "cuda": ("weight-only",),
}


@dataclass(frozen=True)
class QuantizeConfig(StageConfig):
    """How to quantize. A setting that the scheme has and that is not given gets its default."""

    scheme: str = "dynamic"  # int8 weights, uint8 activations at run time
    skip: tuple[str, ...] = ()  # patterns of module names that stay float
    bits: int | None = None  # of each weight
    block_size: int | None = None  # weights that share a scale
    per_channel: bool | None = None  # a scale for each output of a layer, or one for all of it
    weight_range: str | None = None  # sums that no processor cuts off, or full 8 bits, or 7
    activations: str | None = None  # uint8 with a zero point, or int8 around zero
    ranges: str | None = None  # how an activation's range is chosen from what calibration saw
    percentile: float = 99.99  # share of the values in it, where `ranges` is percentile
    smooth: float = 0.0  # how much of the activations' outliers moves into the weights, 0 to 1
    bias_correction: bool = False  # take the mean error of a layer's weights out of its bias
    rounding: str = "nearest"  # or gptq: each weight makes up for the errors of those before it
    embedding_bits: int = 8  # of each number in an embedding table: 8, or 4 in blocks
    embedding_block_size: int | None = (
        None  # of 4 bits: numbers of a row that share a scale, at most
    )
    target: str = "cpu"  # where it is to run, which not every scheme can: cpu, cuda or portable

    def __post_init__(self) -> None:
        one_of("--scheme", self.scheme, tuple(SCHEME_SETTINGS))
        one_of("--target", self.target, tuple(TARGET_SCHEMES))
        check_target(self.scheme, self.target)
        every = dict.fromkeys(name for names in SCHEME_SETTINGS.values() for name in names)
        own = SCHEME_SETTINGS[self.scheme]
        for name in every:
            option, value = f"--{name.replace('_', '-')}", getattr(self, name)
            if value is not None:
                require(name in own, f"the scheme {self.scheme} has no {option}; leave it out")
                one_of(option, value, own[name])
            elif name in own:
                object.__setattr__(self, name, own[name][0])
        require(
            50 < self.percentile <= 100,
            f"--percentile must be above 50 and at most 100, got {self.percentile}",
        )
        require(0 <= self.smooth <= 1, f"--smooth must be in [0, 1], got {self.smooth}")
        one_of("--rounding", self.rounding, ROUNDINGS)
        one_of("--embedding-bits", self.embedding_bits, EMBEDDING_BITS)
        if self.embedding_block_size is not None:
            require(
                self.embedding_bits == 4,
                "--embedding-block-size is of tables of 4 bits; add --embedding-bits 4",
            )
            one_of("--embedding-block-size", self.embedding_block_size, EMBEDDING_BLOCK_SIZES)
        elif self.embedding_bits == 4:
            object.__setattr__(self, "embedding_block_size", EMBEDDING_BLOCK_SIZES[0])

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Make the settings from a dict, also from one of recipes that say `reduce_range`."""
        values = dict(values)
        before = values.pop("reduce_range", None)
        if before is not None:
            require(
                "weight_range" not in values,
                "reduce_range is the former name of weight_range; leave it out",
            )
            require(
                isinstance(before, bool),
                f"reduce_range is true or false, got {before!r}; say weight_range instead",
            )
            values["weight_range"] = "reduced" if before else "full"
        return super().from_json(values)

    @property
    def needs_data(self) -> bool:
        """Whether activations must be seen to quantize so."""
        learns = self.smooth > 0 or self.bias_correction or self.rounding != "nearest"
        return self.scheme == "static" or learns


def check_target(scheme: str, target: str) -> None:
    """Raise `ConfigError`, with what to do instead, for a scheme that `target` cannot run fast."""
    require(
        scheme in TARGET_SCHEMES[target],
        f"the scheme {scheme} cannot be fast with --target {target}: its execution provider has no "
        "DynamicQuantizeLinear, MatMulInteger or QLinearMatMul, which fall back to the CPU node by "
        "node. Quantize with --scheme weight-only and export with --target cuda --dtype fp16, or "
        "choose --target cpu",
    )
