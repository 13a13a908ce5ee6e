"""The config of a smaller model of the same family: what its fields are called, and what fits."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from calib_data.errors import ConfigError, ModelError
from compress.blocks import all_groups
from compress.config import StageConfig, require
from compress.stacks import LAYERS

# what configs call each size; one that does not hold the teacher's value means something else
_HIDDEN = ("hidden_size", "embedding_size", "word_embed_proj_dim", "pooler_output_size")
_HEADS = ("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads")
_GROUPED = ("num_key_value_heads",)
_NEURONS = ("intermediate_size", "n_inner", "d_ff", "ffn_dim", "hidden_dim", "encoder_ffn_dim",
            "decoder_ffn_dim")  # fmt: skip
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")  # lists with an entry a layer


@dataclass(frozen=True)
class StudentShape(StageConfig):
    """How a student is smaller than its teacher; what is None or empty stays as it is."""

    layers: int | None = None  # so many, evenly spaced
    keep_layers: tuple[int, ...] = ()  # or these
    hidden: int | None = None  # width of the residual stream
    heads: int | None = None  # query heads of each attention
    ffn: int | None = None  # neurons of each feed-forward block

    def __post_init__(self) -> None:
        require(
            self.layers is None or not self.keep_layers,
            "--layers and --keep-layers say the same thing; pass one of them",
        )
        for name in ("layers", "hidden", "heads", "ffn"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name} must be at least 1, got {value}")
        require(
            list(self.keep_layers) == sorted(set(self.keep_layers)),
            f"--keep-layers must be ascending, each layer once, got {_list(self.keep_layers)}",
        )

    @property
    def narrows(self) -> bool:
        """Whether a width is given."""
        return any((self.hidden, self.heads, self.ffn))

    def __bool__(self) -> bool:
        return self.narrows or bool(self.layers or self.keep_layers)


@dataclass(frozen=True)
class _Widths:
    """The widths of a uniform model."""

    hidden: int
    heads: int  # of queries
    units: int  # of an attention: its key/value heads
    carried: int  # features that one unit hands on: head width × query heads of a unit
    ffn: frozenset[int]  # one number in most families; several where stacks differ

    @property
    def shared(self) -> int:
        """How many query heads share a key/value head."""
        return self.heads // self.units

    @property
    def width(self) -> int:
        """Features of a head."""
        return self.carried // self.shared


def build(model: Any, config: Any, device: str = "cpu") -> Any:
    """Return a fresh float32 model of the class of `model` with the sizes in `config`."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        return type(model)._from_config(copy.deepcopy(config), dtype=torch.float32)


def student_config(model: Any, kept: Mapping[str, Sequence[int]], shape: StudentShape) -> Any:
    """Return a copy of the config of `model` with the layers in `kept` and the widths of `shape`.

    Heads keep their width. In a family without a width of heads of its own, hidden = heads × width:
    `--hidden` then sets the number of heads too. Raises `ConfigError` for widths that the family
    cannot have, naming some that it can.
    """
    config = copy.deepcopy(model.config)
    keep_layers_(config, kept)
    if not shape.narrows:
        return config
    old = _widths(model, config)
    if shape.ffn and len(old.ffn) > 1:
        raise ModelError(
            f"feed-forward widths differ within the model ({_list(sorted(old.ffn))}), so one --ffn "
            "cannot say what each becomes"
        )
    for name, most in (("hidden", old.hidden), ("heads", old.heads), ("ffn", max(old.ffn))):
        value = getattr(shape, name)
        require(
            value is None or value <= most,
            f"--{name} must be from 1 to the teacher's {most}, got {value}",
        )
    heads = shape.heads or old.heads
    _check_shared(heads, old)
    found = _fitting(model, config, old, shape, heads)
    if found is not None:
        return found
    hidden, width = shape.hidden or old.hidden, old.width
    step = width * old.shared
    if hidden % step:
        near = [n for n in (hidden // step * step, (hidden // step + 1) * step) if n]
        raise ConfigError(
            f"in {config.model_type} hidden is heads × {width}, so --hidden {hidden} cannot be; "
            f"pass --hidden {' or '.join(map(str, near))}"
        )
    if shape.heads not in (None, hidden // width):
        raise ConfigError(
            f"in {config.model_type} hidden is heads × {width}, so {heads} heads and hidden "
            f"{hidden} do not go together; pass --hidden {heads * width}, or --heads {hidden // width}"
        )
    found = _fitting(model, config, old, shape, hidden // width)
    if found is None:
        raise ModelError(
            f"the config of {config.model_type} does not set the widths of its blocks alone; "
            "make the student by hand and pass --student"
        )
    return found


def wider_config(model: Any) -> Any:
    """Return a copy of the config of `model` with twice the hidden size, heads of the same width.

    Raises `ModelError` where the family ties its sizes together in another way.
    """
    old = _widths(model, model.config)
    shape = StudentShape(hidden=2 * old.hidden)
    for heads in (old.heads, 2 * old.heads):
        found = _fitting(model, model.config, old, shape, heads)
        if found is not None:
            return found
    raise ModelError(
        f"the config of {model.config.model_type} does not set the hidden size of its blocks alone; "
        "leave hidden whole"
    )


def keep_layers_(config: Any, kept: Mapping[str, Sequence[int]]) -> None:
    """Let `config` describe a model of the layers in `kept` alone, by stack."""
    for stack, layers in kept.items():
        for name in _PER_LAYER:
            listed = getattr(config, name, None)
            if isinstance(listed, list) and len(listed) > max(layers):
                setattr(config, name, [listed[i] for i in layers])
        for name in LAYERS:
            same = not config.is_encoder_decoder or ("decoder" in name) == ("decoder" in stack)
            if same and isinstance(getattr(config, name, None), int):
                setattr(config, name, len(layers))


def _widths(model: Any, config: Any) -> _Widths:
    """Return the widths that `config` gives a model: the teacher's own, as it was before pruning."""
    groups = all_groups(build(model, config, "meta"))
    heads = [g for g in groups if g.kind == "heads"]
    geometry = {(g.units, _carried(g)) for g in heads}
    hidden = getattr(config, "hidden_size", None)
    count = getattr(config, "num_attention_heads", None)
    if len(geometry) != 1 or not isinstance(hidden, int) or not isinstance(count, int):
        raise ModelError(
            f"{type(model).__name__} has no one number of heads and width for all its layers, so "
            "--hidden, --heads and --ffn cannot be chosen; --layers may"
        )
    ffn = frozenset(g.units for g in groups if g.kind == "neurons")
    units, carried = next(iter(geometry))
    return _Widths(hidden, count, units, carried, ffn or frozenset({0}))


def _carried(group: Any) -> int:
    return next(part.width for part in group.parts if part.module == group.down)


def _check_shared(heads: int, old: _Widths) -> None:
    if heads % old.shared:
        possible = [str(n) for n in range(old.shared, old.heads + 1, old.shared)]
        raise ConfigError(
            f"{old.shared} query heads share one key/value head, so --heads must be one of "
            f"{', '.join(possible)}; got {heads}"
        )


def _fitting(model: Any, base: Any, old: _Widths, shape: StudentShape, heads: int) -> Any | None:
    """Return `base` with the widths of `shape` and so many heads, or None where they do not fit."""
    config = copy.deepcopy(base)
    hidden = shape.hidden or old.hidden
    wanted = frozenset({shape.ffn}) if shape.ffn else old.ffn
    _set_(config, _HEADS, old.heads, heads)
    _set_(config, _GROUPED, old.units, heads // old.shared)
    _set_(config, _HIDDEN, old.hidden, hidden)
    if len(wanted) == 1:
        (before,), (ffn,) = old.ffn, wanted
        _set_(config, _NEURONS, before, ffn)
        if getattr(config, "n_inner", 0) is None and ffn != 4 * hidden:  # None means that in GPT-2
            config.n_inner = ffn
    if heads * old.width != hidden and getattr(config, "head_dim", None) != old.width:
        config.head_dim = old.width
    try:
        groups = all_groups(build(model, config, "meta"))
    except Exception:  # configs and models refuse sizes with errors of many types
        return None
    fits = all(
        (g.units, _carried(g)) == (heads // old.shared, old.carried)
        if g.kind == "heads"
        else g.units in wanted
        for g in groups
    )
    return config if fits else None


def _set_(config: Any, names: Sequence[str], old: int, new: int) -> None:
    for name in names:
        if getattr(config, name, None) == old:
            setattr(config, name, new)


def _list(values: Sequence[int]) -> str:
    return ",".join(map(str, values))
