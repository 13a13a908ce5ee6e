"""Half precision: the source model in fp16 or bf16, from which the graph is traced as it is.

What must stay in float32 stays there by the model's own code and by the operators' definitions:
normalisation and softmax accumulate in float32 (ONNX LayerNormalization's `stash_type`, Attention's
`softmax_precision`), and rotary angles are computed in float32 before they are rounded.
"""

import copy
from dataclasses import replace

import torch
from torch import nn

from calib_data.errors import ConfigError
from compress.checkpoint import Checkpoint

WEIGHT_ONLY = "weight-only"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def in_precision(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    """Return `checkpoint` with weights and float inputs in `dtype`, a row of `DTYPES`.

    Block-wise weights keep their bits, and their scales are in `dtype`. Raises `ConfigError` for another
    quantized checkpoint, whose products have a precision of their own, and for weights beyond `dtype`.
    """
    if dtype == "fp32":
        return checkpoint
    scheme = (checkpoint.quantization or {}).get("scheme", WEIGHT_ONLY)
    if scheme != WEIGHT_ONLY:
        raise ConfigError(
            f"--dtype {dtype} is for float models and those quantized with --scheme {WEIGHT_ONLY}; "
            f"this one is quantized with {scheme}, which takes its activations in float32"
        )
    most = torch.finfo(DTYPES[dtype]).max
    for name, value in checkpoint.module.state_dict().items():
        if value.is_floating_point() and value.numel():
            peak = float(torch.where(value.isfinite(), value, 0).abs().amax())
            if peak > most:
                raise ConfigError(
                    f"{name} holds {peak:,.0f}, and {dtype} ends at {most:,.0f}: it would overflow; "
                    "use --dtype bf16, or leave the model in float32"
                )
    return typed(replace(checkpoint, module=copy.deepcopy(checkpoint.module).to(DTYPES[dtype])))


def typed(checkpoint: Checkpoint) -> Checkpoint:
    """Return `checkpoint` with a signature that says the precision of its float inputs."""
    dtype = precision(checkpoint.module)
    if dtype == torch.float32:
        return checkpoint
    signature = checkpoint.signature
    name = str(dtype).removeprefix("torch.")
    inputs = tuple(
        replace(item, dtype=name) if item.dtype == "float32" else item for item in signature.inputs
    )
    examples = tuple(v.to(dtype) if v.is_floating_point() else v for v in signature.examples)
    return replace(checkpoint, signature=replace(signature, inputs=inputs, examples=examples))


def precision(module: nn.Module) -> torch.dtype:
    """Return the least precise float that the module's parameters have."""
    kinds = {p.dtype for p in module.parameters() if p.is_floating_point()}
    return max(kinds, key=lambda kind: torch.finfo(kind).eps, default=torch.float32)
