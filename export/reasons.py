"""Why a model cannot be exported, in one line: what PyTorch says at length, in the model's own names."""

import re

import torch

from compress.checkpoint import Checkpoint
from compress.signature import Signature

_FIXED = re.compile(
    r"static shape of (\d+) for dimension inputs\['inputs'\]\[(\d+)\]\.shape\[(\d+)\]"
)


def reason(checkpoint: Checkpoint, error: BaseException) -> str:
    """Return what was wrong when tracing or translating `checkpoint` raised `error`."""
    while error.__cause__ is not None:
        error = error.__cause__
    fixed = _FIXED.search(str(error))
    if fixed is not None:
        size, index, axis = (int(number) for number in fixed.groups())
        return _fixed(checkpoint.signature, index, axis, size)
    if checkpoint.signature.examples:
        found = _fixed_by_trial(checkpoint)
        if found is not None:
            return found
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0][:300] if lines else ""
    if "data-dependent" in first:
        told = first.split(" (")[0]
        return f"what it does depends on the values of its inputs, not on their shapes: {told}"
    return f"{type(error).__name__}: {first}"


def _fixed(signature: Signature, index: int, axis: int, size: int) -> str:
    item = signature.inputs[index]
    return (
        f"axis {axis} ({dict(item.axes)[axis]}) of {item.name} is asked to be dynamic, and the model "
        f"fixes it at {size}"
    )


def _fixed_by_trial(checkpoint: Checkpoint) -> str | None:
    """Return which axis of a factory's examples cannot be one longer, or None where all can."""
    signature = checkpoint.signature
    places = {
        name: (index, axis, item.shape[axis])
        for index, item in reversed(list(enumerate(signature.inputs)))
        for axis, name in item.axes
        if name in ("batch", "sequence")
    }
    sizes = {name: size for name, (_, _, size) in places.items()}
    for name, place in places.items():
        tried = {"batch": 1, "sequence": 1} | sizes | {name: sizes[name] + 1}
        try:
            with torch.inference_mode():
                checkpoint.forward(signature.sample(tried["batch"], tried["sequence"]))
        except Exception:  # the user's own code
            return _fixed(signature, *place)
    return None
