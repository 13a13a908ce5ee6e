"""Models that overflow in their own precision: what does, and what to do about it."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compress.checkpoint import Checkpoint
from compress.fresh import unchanged
from compress.signature import named_outputs
from export.precision import precision


def not_finite(checkpoint: Checkpoint, case: Mapping[str, Tensor], told: str, output: str) -> str:
    """Return one line on a model that gives infinities or NaN where float64 gives numbers.

    `told` is the name of the case. The first module that does so is named, and the cure.
    """
    kind = precision(checkpoint.module)
    name = str(kind).removeprefix("torch.")
    module = _first(checkpoint.module, case)
    where = f": first in {module.removeprefix('backbone.')}" if module else ""
    most = torch.finfo(kind).max
    bound = f"{most:,.0f}" if most < 1e6 else f"{most:.3g}"
    cure = (
        "use --dtype bf16, whose numbers reach as far as float32's, or leave it in float32"
        if kind == torch.float16
        else "divide what grows so large, or look at the weights"
    )
    return (
        f"the model itself overflows in {name}, which ends at {bound}: {output} at {told} is not "
        f"finite, and in float64 it is{where}; {cure}"
    )


def _first(module: nn.Module, case: Mapping[str, Tensor]) -> str:
    """Return the path of the first submodule that gives what is not finite; "" where none does."""
    found: list[str] = []

    def hook(name: str) -> Any:
        def look(_module: nn.Module, given: Any, output: Any) -> None:
            tensors = [output] if isinstance(output, Tensor) else list(_tensors(output))
            if not found and any(t.is_floating_point() and _bad(t) for t in tensors):
                found.append(name)

        return look

    handles = [m.register_forward_hook(hook(n)) for n, m in module.named_modules() if n]
    try:
        with torch.inference_mode(), unchanged(module):
            named_outputs(module, case)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


def _bad(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and not math.isfinite(float(tensor.float().abs().amax()))


def _tensors(output: Any) -> list[Tensor]:
    listed = output.values() if isinstance(output, Mapping) else output
    return [v for v in listed if isinstance(v, Tensor)] if isinstance(listed, (list, tuple)) else []
