"""Finding what can be removed: attention heads and feed-forward neurons, from the modules' names.

There is no branch per family. A transformer names its projections in one of a few ways; the tables
below list them, and a group of prunable units is described by where each unit lies along the rows or
columns of each weight. A family that names them differently needs one more row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from calib_data.errors import ModelError
from compress.int8 import DynamicInt8Linear
from compress.static_int8 import StaticInt8Linear
from compress.weight_only import WeightOnlyLinear

Kind = Literal["heads", "neurons"]

# separate projections: one name each for query, key, value; then the names an output may have
_QUERY = ("query", "q_lin", "q", "q_proj", "query_proj")
_KEY = ("key", "k_lin", "k", "k_proj", "key_proj")
_VALUE = ("value", "v_lin", "v", "v_proj", "value_proj")
_OUT = ("out_lin", "o", "o_proj", "out_proj", "dense")
# fused projections: name → (output's name, how many copies of all heads lie one after another);
# with 1 copy each head's query, key and value lie side by side
_FUSED = {"c_attn": ("c_proj", 3), "Wqkv": ("Wo", 3), "query_key_value": ("dense", 1)}
# feed-forward: (names of the projections up, name of the one down, copies fused in each up)
_FEED_FORWARD = (
    (("gate_proj", "up_proj"), "down_proj", 1),
    (("wi_0", "wi_1"), "wo", 1),
    (("Wi",), "Wo", 2),
    (("fc1",), "fc2", 1),
    (("lin1",), "lin2", 1),
    (("wi",), "wo", 1),
    (("c_fc",), "c_proj", 1),
    (("ffn",), "ffn_output", 1),
    (("dense_h_to_4h",), "dense_4h_to_h", 1),
    (("intermediate.dense",), "output.dense", 1),
)
# an attention that holds one of these shares something per head with other layers
_SHARED_PER_HEAD = ("relative_attention_bias", "pos_key_proj", "relative_position_bias")


@dataclass(frozen=True)
class Part:
    """Where a group's units lie in one projection: `copies` runs of all units, `width` each."""

    module: str
    outputs: bool  # True: along the output features (and the bias), False: along the inputs
    width: int
    copies: int = 1


@dataclass(frozen=True)
class Group:
    """Units that are removed together: the heads of one attention, the neurons of one layer.

    With grouped key/value heads a unit is one key/value head with all its query heads.
    """

    name: str  # of the module that holds the projections
    kind: Kind
    units: int
    parts: tuple[Part, ...]
    down: str  # the projection whose input features carry the units' results

    @property
    def key(self) -> str:
        """The name under which plans and manifests hold this group."""
        return f"{self.name}.{self.kind}"


def is_linear(module: nn.Module | None) -> bool:
    """Whether `module` is a linear layer: `nn.Linear`, GPT-2's `Conv1D`, or a quantized one."""
    known = isinstance(module, nn.Linear | DynamicInt8Linear | StaticInt8Linear | WeightOnlyLinear)
    return known or type(module).__name__ == "Conv1D"


def features(module: Any) -> tuple[int, int]:
    """Return (inputs, outputs) of a linear layer."""
    if isinstance(module, WeightOnlyLinear):  # its weight is packed
        return module.in_features, module.out_features
    rows, columns = module.weight.shape
    # nn.Linear alone holds (outputs, inputs)
    return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)


def input_columns(module: Any, values: Tensor) -> Tensor:
    """Return `values`, shaped like the module's weight, as (outputs, inputs)."""
    return values if isinstance(module, nn.Linear) else values.t()


def find_groups(model: nn.Module) -> tuple[Group, ...]:
    """Return the model's prunable groups, in the order of its modules.

    Raises `ModelError` that says what was looked for where there are none.
    """
    found: dict[str, Group] = {}
    for name, module in model.named_modules():
        for group in (_attention(model, name, module), _feed_forward(name, module)):
            if group is not None:
                found.setdefault(group.key, group)
    if not found:
        raise ModelError(
            f"{type(model).__name__}: no attention or feed-forward block found; looked for "
            f"projections named like {', '.join(_QUERY)} or {', '.join(_FUSED)}, and "
            f"{', '.join(down for _, down, _ in _FEED_FORWARD)}; add a row to compress/blocks.py"
        )
    return tuple(found.values())


def all_groups(model: nn.Module) -> tuple[Group, ...]:
    """Return every attention and feed-forward block, those that cannot be pruned too."""
    found: dict[str, Group] = {}
    for name, module in model.named_modules():
        for group in (_attention_of(model, name, module), _feed_forward(name, module)):
            if group is not None:
                found.setdefault(group.key, group)
    return tuple(found.values())


def locked_attentions(model: nn.Module) -> Iterator[str]:
    """Yield the names of attentions whose heads stay, because other layers share something per head."""
    for name, module in model.named_modules():
        if _child(module, _QUERY) and _shared_per_head(model, name):
            yield name


def _attention(model: nn.Module, name: str, module: nn.Module) -> Group | None:
    """Return the attention in `module` unless its heads are locked to another's."""
    found = _attention_of(model, name, module)
    return None if found is None or _shared_per_head(model, name) else found


def _attention_of(model: nn.Module, name: str, module: nn.Module) -> Group | None:
    fused = next((n for n in _FUSED if is_linear(getattr(module, n, None))), None)
    query, key, value = (_child(module, names) for names in (_QUERY, _KEY, _VALUE))
    if not fused and not (query and key and value):
        return None
    if fused:
        out_name, copies = _FUSED[fused]
        down, out = f"{name}.{out_name}", getattr(module, out_name)
    else:
        below = _child(module, _OUT)
        # BERT keeps the output projection in a sibling module
        parent_name, _, last = name.rpartition(".")
        sibling = f"{parent_name}.output.dense"
        if below is not None:
            down = f"{name}.{below}"
        elif last == "self" and _has(model, sibling):
            down = sibling
        else:
            return None
        out = model.get_submodule(down)
    width = _head_width(module)
    if width is None or features(out)[0] % width:
        return None
    if fused:
        units = features(out)[0] // width
        parts = [Part(f"{name}.{fused}", True, width * (3 // copies), copies)]
        return Group(name, "heads", units, (*parts, Part(down, False, width)), down)
    units = features(getattr(module, str(key)))[1] // width
    per_unit = features(getattr(module, str(query)))[1] // units
    return Group(
        name,
        "heads",
        units,
        (
            Part(f"{name}.{query}", True, per_unit),
            Part(f"{name}.{key}", True, width),
            Part(f"{name}.{value}", True, width),
            Part(down, False, per_unit),
        ),
        down,
    )


def _feed_forward(name: str, module: nn.Module) -> Group | None:
    prefix = f"{name}." if name else ""
    for ups, down, copies in _FEED_FORWARD:
        if not all(_has(module, path) for path in (*ups, down)):
            continue
        units = features(module.get_submodule(down))[0]
        if any(features(module.get_submodule(up))[1] != units * copies for up in ups):
            continue
        parts = [Part(f"{prefix}{up}", True, 1, copies) for up in ups]
        parts.append(Part(f"{prefix}{down}", False, 1))
        return Group(name, "neurons", units, tuple(parts), f"{prefix}{down}")
    return None


def _child(module: nn.Module, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if is_linear(getattr(module, name, None))), None)


def _has(module: nn.Module, path: str) -> bool:
    try:
        return is_linear(module.get_submodule(path))
    except AttributeError:
        return False


def _shared_per_head(model: nn.Module, name: str) -> bool:
    """Whether an attention, or one beside it that it shares a bias with, holds weights per head."""
    stack = name.partition(".")[0]
    return any(
        part.rpartition(".")[2].startswith(_SHARED_PER_HEAD) and part.partition(".")[0] == stack
        for part, _ in _named_tensors_and_modules(model)
    )


def _named_tensors_and_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from model.named_modules()
    yield from model.named_parameters()


def _head_width(module: Any) -> int | None:
    for name in ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    heads = next((getattr(module, n) for n in ("num_heads", "n_heads") if hasattr(module, n)), None)
    query = _child(module, _QUERY)
    if isinstance(heads, int) and heads and query:
        return features(getattr(module, query))[1] // heads
    return None
