"""Finding what can be removed: attention heads and feed-forward neurons, from the modules' names.

There is no branch per family. A transformer names its projections in one of a few ways; the tables
below list them, and a group of prunable units is described by where each unit lies along the rows or
columns of each weight. A family that names them differently needs one more row; a user's own module
says it itself (see `described`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from calib_data.errors import ModelError
from compress.described import (
    HINT,
    Heads,
    Neurons,
    described_heads,
    described_neurons,
    misfit,
)
from compress.int8 import DynamicInt8Linear
from compress.static_int8 import StaticInt8Linear
from compress.weight_only import WeightOnlyLinear

Kind = Literal["heads", "neurons", "queries"]

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
    """Units that can be removed: the heads of one attention, the neurons of one layer.

    With grouped key/value heads a unit of the kind `heads` is one key/value head with all its query
    heads; one of the kind `queries` is a query head, of which each key/value head keeps as many.
    """

    name: str  # of the module that holds the projections
    kind: Kind
    units: int
    parts: tuple[Part, ...]
    down: str  # the projection whose input features carry the units' results
    runs: int = 1  # so many equal runs of units must each keep the same number: key/value heads
    follow: tuple[str, ...] = ()  # attributes of the module that grow with the number of units

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
            f"{', '.join(down for _, down, _ in _FEED_FORWARD)}; {HINT}"
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


def query_groups(model: nn.Module) -> tuple[Group, ...]:
    """Return the query heads of each attention that shares key/value heads among them.

    They can be removed evenly, as many of each key/value head, which stays. Empty without any.
    """
    found = []
    for group in find_groups(model):
        if group.kind == "heads" and len(group.parts) == 4:
            query, key, _, down = group.parts
            shared = query.width // key.width
            if shared > 1:
                parts = tuple(replace(part, width=key.width) for part in (query, down))
                units = group.units * shared
                found.append(
                    replace(group, kind="queries", units=units, parts=parts, runs=group.units)
                )
    return tuple(found)


def _attention_of(model: nn.Module, name: str, module: nn.Module) -> Group | None:
    told = described_heads(name, module)
    names = told or _named_heads(model, name, module)
    if names is None:
        return None
    wrong = next((path for path in (*names.inputs, names.out) if not _has(model, path)), None)
    if wrong is not None:
        raise misfit(name, "heads", wrong)
    inputs, down = names.inputs, names.out
    sizes = [features(model.get_submodule(path))[1] for path in inputs]
    carried = features(model.get_submodule(down))[0]
    if len(inputs) == 1:
        units, rest = divmod(carried, names.width)
        fits = not rest and sizes[0] == 3 * carried and names.copies in (1, 3)
        each = [names.width * (3 // names.copies)] if fits else []
    else:
        units, rest = divmod(sizes[1], names.width)
        fits = bool(units) and not rest and sizes[1] == sizes[2] and sizes[0] == carried
        fits = fits and carried % (units * names.width) == 0
        each = [carried // units, names.width, names.width] if fits else []
    if not fits:
        if told:
            raise misfit(name, "heads", down)
        return None
    parts = [Part(path, True, width, names.copies) for path, width in zip(inputs, each)]
    parts.append(Part(down, False, carried // units))
    return Group(name, "heads", units, tuple(parts), down, follow=names.follow)


def _named_heads(model: nn.Module, name: str, module: nn.Module) -> Heads | None:
    """Return the attention that `module` is, if its projections have one of the usual names."""
    fused = next((n for n in _FUSED if is_linear(getattr(module, n, None))), None)
    separate = tuple(_child(module, names) for names in (_QUERY, _KEY, _VALUE))
    width = _head_width(module)
    if width is None or not (fused or all(separate)):
        return None
    prefix = f"{name}." if name else ""
    if fused:
        out, copies = _FUSED[fused]
        found = Heads((f"{prefix}{fused}",), f"{prefix}{out}", width, copies)
        return found if _has(module, out) else None
    inputs = tuple(f"{prefix}{path}" for path in separate)
    below = _child(module, _OUT)
    if below is not None:
        return Heads(inputs, f"{prefix}{below}", width)
    # BERT keeps the output projection in a sibling module
    parent_name, _, last = name.rpartition(".")
    sibling = f"{parent_name}.output.dense"
    return Heads(inputs, sibling, width) if last == "self" and _has(model, sibling) else None


def _feed_forward(name: str, module: nn.Module) -> Group | None:
    told = described_neurons(name, module)
    rows = [told] if told else [Neurons(*row) for row in _FEED_FORWARD]
    for row in rows:
        group = _feed_forward_of(name, module, row)
        if group is not None:
            return group
    if told:
        raise misfit(name, "neurons", told.down)
    return None


def _feed_forward_of(name: str, module: nn.Module, row: Neurons) -> Group | None:
    prefix = f"{name}." if name else ""
    if not all(_has(module, path) for path in (*row.ups, row.down)):
        return None
    units = features(module.get_submodule(row.down))[0]
    if any(features(module.get_submodule(up))[1] != units * row.copies for up in row.ups):
        return None
    parts = [Part(f"{prefix}{up}", True, 1, row.copies) for up in row.ups]
    parts.append(Part(f"{prefix}{row.down}", False, 1))
    return Group(name, "neurons", units, tuple(parts), f"{prefix}{row.down}")


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
