"""What a user's own module says of its blocks, where its names are not the usual ones.

The module that holds the projections says it in an attribute, of its class or its own:

    onnxpress_blocks = {
        "heads": {"query": "ask", "key": "offer", "value": "give", "out": "mix",
                  "width": 16, "follow": ["slots"]},
        "neurons": {"up": ["grow"], "down": "shrink"},
        "layers": ["blocks"],
    }

`width` is the features of a head, a number or the name of an attribute that holds it; `follow` names
attributes that grow with the number of heads (num_heads and the like follow anyway). One projection
for query, key and value is `"fused": "qkv", "copies": 3`, all heads' queries first, or 1 with each
head's three side by side. Projections up that hold a gate as well have `"copies": 2`. `layers` names
the lists of blocks each of which adds to the residual stream, so that whole ones can be dropped.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from calib_data.errors import ModelError

ATTRIBUTE = "onnxpress_blocks"
HINT = (
    f'describe them in an attribute of the module that holds them: {ATTRIBUTE} = {{"heads": '
    '{"query": …, "key": …, "value": …, "out": …, "width": …}, "neurons": {"up": […], "down": …}} '
    "(see the guide)"
)
_SEPARATE, _FUSED = {"query", "key", "value", "out", "width"}, {"fused", "copies", "out", "width"}


@dataclass(frozen=True)
class Heads:
    """An attention by the paths of its projections in the model."""

    inputs: tuple[str, ...]  # query, key and value, or one that holds all three
    out: str
    width: int  # features of a head
    copies: int = 1  # runs of all heads in a fused projection
    follow: tuple[str, ...] = ()  # attributes that grow with the number of heads


@dataclass(frozen=True)
class Neurons:
    """A feed-forward block by the names of its projections in its module."""

    ups: tuple[str, ...]
    down: str
    copies: int = 1  # runs of all neurons in each projection up


def described_heads(name: str, module: nn.Module) -> Heads | None:
    """Return the attention that `module`, called `name`, describes; a `ModelError` if it is wrong."""
    told = _part(name, module, "heads")
    if told is None:
        return None
    given = set(told) - {"follow"}
    if given not in (_SEPARATE, _FUSED):
        raise ModelError(
            f"{_place(name, 'heads')} has {', '.join(sorted(told))}; it needs query, key, value, out "
            "and width, or fused, copies, out and width"
        )
    width = told["width"]
    width = getattr(module, width, None) if isinstance(width, str) else width
    if type(width) is not int or width < 1:
        raise ModelError(
            f"{_place(name, 'heads')}: width {told['width']!r} is no number of features"
        )
    inputs = ("fused",) if given == _FUSED else ("query", "key", "value")
    prefix = f"{name}." if name else ""
    return Heads(
        tuple(f"{prefix}{told[key]}" for key in inputs),
        f"{prefix}{told['out']}",
        width,
        told.get("copies", 1),
        tuple(told.get("follow", ())),
    )


def described_neurons(name: str, module: nn.Module) -> Neurons | None:
    """Return the feed-forward block that `module` describes; a `ModelError` if it is wrong."""
    told = _part(name, module, "neurons")
    if told is None:
        return None
    if set(told) - {"copies"} != {"up", "down"} or isinstance(told["up"], str):
        raise ModelError(
            f"{_place(name, 'neurons')} has {', '.join(sorted(told))}; it needs a list up and a name "
            "down"
        )
    return Neurons(tuple(told["up"]), told["down"], told.get("copies", 1))


def described_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the lists of blocks that the modules of `model` say can be dropped one by one."""
    found = {}
    for name, module in model.named_modules():
        for child in _description(name, module).get("layers", ()):
            stack = getattr(module, child, None)
            path = f"{name}.{child}" if name else child
            if not isinstance(stack, nn.ModuleList):
                raise ModelError(f"{_place(name, 'layers')}: {child} is no ModuleList")
            found[path] = stack
    return found


def misfit(name: str, kind: str, projection: str) -> ModelError:
    """Return the error of a description whose sizes do not go together, or whose name is wrong."""
    return ModelError(
        f"{_place(name, kind)}: {projection} is no linear layer of the module, or not as wide as the "
        "others say; correct the name, the width or the copies"
    )


def _part(name: str, module: nn.Module, kind: str) -> Mapping[str, Any] | None:
    part = _description(name, module).get(kind)
    if part is not None and not isinstance(part, Mapping):
        raise ModelError(f"{_place(name, kind)} must be a dict, got {part!r:.60}")
    return part


def _description(name: str, module: nn.Module) -> Mapping[str, Any]:
    told = getattr(module, ATTRIBUTE, None)
    if told is None:
        return {}
    if not isinstance(told, Mapping) or set(told) - {"heads", "neurons", "layers"}:
        raise ModelError(
            f"{_place(name)} must be a dict with heads, neurons or layers, got {told!r:.80}"
        )
    return told


def _place(name: str, kind: str = "") -> str:
    """Return where a description stands, to begin an error with."""
    path = f"{name}.{ATTRIBUTE}" if name else ATTRIBUTE
    return f'{path}["{kind}"]' if kind else path
