"""Gradient checkpointing: less memory, for computing each layer's activations twice."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from calib_data.errors import ModelError


def recomputed_layers(module: nn.Module) -> Iterator[Any]:
    """Yield the layers that can compute their activations again."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return (m for m in module.modules() if isinstance(m, GradientCheckpointingLayer))


def recompute_layers_(module: nn.Module, dropout: bool) -> None:
    """Let every layer compute its activations again in the backward pass, with or without dropout.

    Chen et al. 2016, arXiv:1604.06174. Raises `ModelError` where the model's layers cannot.
    """
    layers = list(recomputed_layers(module))
    if not layers:
        raise ModelError(
            f"{type(module).__name__} has no layers that support --gradient-checkpointing; "
            "leave it out, and lower --batch-size and raise --accumulate instead"
        )
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(_run_again, dropout)


def _run_again(dropout: bool, call: partial[Any], *args: Any) -> Any:
    """Run a layer under checkpointing. transformers asks for training mode, dropout comes with it."""
    layer = call.args[0]

    def run(*args: Any) -> Any:
        layer.training = dropout
        try:
            return call(*args)
        finally:
            layer.training = True

    return checkpoint(run, *args, use_reentrant=False)
