"""Running a module without changing it: some change themselves, and then answer otherwise.

BigBird drops its sparse attention for good at the first short text; scaled rotary embeddings keep the
frequencies of the longest text so far. What a user's fresh model answers is what counts.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from calib_data.errors import ModelError

_SMALL = 1 << 20  # numbers of a buffer that is copied in case a forward writes into it
_TABLES = ("_parameters", "_buffers", "_modules")


@contextlib.contextmanager
def unchanged(module: nn.Module) -> Iterator[list[str]]:
    """Put the module back as it was after the block; the list that is given names what had changed.

    Attributes, submodules, buffers and config are put back. Raises `ModelError` for a large buffer or
    a parameter that was written into.
    """
    changed: list[str] = []
    before = [(name, part, _state(part)) for name, part in module.named_modules()]
    versions = [
        (name, tensor, _version(tensor))
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    ]
    copies = {id(b): b.detach().clone() for b in module.buffers() if b.numel() <= _SMALL}
    configs = {id(c): (c, _plain(vars(c))) for c in _configs(module)}
    failed = True
    try:
        yield changed
        failed = False
    finally:
        for name, part, state in before:
            changed += _restore(name, part, state)
        for config, values in configs.values():
            if _plain(vars(config)) != values:
                changed.append("config")
                vars(config).clear()
                vars(config).update(values)
        for name, tensor, version in versions:
            if _version(tensor) == version:
                continue
            changed.append(name)
            if id(tensor) not in copies:
                if failed:  # which says more than that the weights are not as they were
                    continue
                raise ModelError(
                    f"running the model writes into {name}, so no two runs of it are alike; "
                    "make it leave its weights as they are in eval mode"
                )
            with torch.no_grad():
                tensor.copy_(copies[id(tensor)])


def _configs(module: nn.Module) -> list[Any]:
    found = {
        id(c): c for m in module.modules() if hasattr(c := getattr(m, "config", None), "__dict__")
    }
    return list(found.values())


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return a copy in which lists and dictionaries are copies too."""
    return {
        name: copy.copy(value) if isinstance(value, (list, dict, set)) else value
        for name, value in values.items()
    }


def _state(part: nn.Module) -> dict[str, Any]:
    return _plain(part.__dict__)


def _restore(name: str, part: nn.Module, state: dict[str, Any]) -> list[str]:
    """Give a module its attributes back; return the names of those that differed."""
    now = part.__dict__
    changed = []
    for key in {*now, *state}:
        if key in now and key in state and _same(now[key], state[key]):
            continue
        if key in _TABLES:
            table = now[key]
            inner = [k for k in {*table, *state[key]} if table.get(k) is not state[key].get(k)]
            changed += [f"{name}.{k}".lstrip(".") for k in inner]
            table.clear()
            table.update(state[key])
        elif key in state:
            now[key] = state[key]
            changed.append(f"{name}.{key}".lstrip("."))
        else:
            del now[key]
            changed.append(f"{name}.{key}".lstrip("."))
    return changed


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)) and type(one) is type(other):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other))
    simple = (str, bytes, int, float, bool, set, frozenset, type(None), torch.dtype)
    return isinstance(one, simple) and isinstance(other, simple) and one == other
