"""Copies of a module's weights during training: the average over steps, and the best so far."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def trained_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return what training changes, by name: parameters with a gradient, and buffers."""
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    return parameters | dict(module.named_buffers())


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of what training changes."""
    return {name: value.detach().clone() for name, value in trained_weights(module).items()}


@torch.no_grad()
def restore_(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy the weights of a `snapshot` back into `module`."""
    own = trained_weights(module)
    for name, value in weights.items():
        own[name].copy_(value)


class AveragedWeights:
    """The exponential moving average of a module's trained parameters, in float32.

    Polyak and Juditsky 1992, SIAM J. Control Optim. 30(4). The decay rises with the step t as
    (1 + t) / (10 + t) up to the one asked for, so that a short run does not return its start.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {
            name: p.detach().float().clone()
            for name, p in module.named_parameters()
            if p.requires_grad
        }

    @torch.no_grad()
    def update_(self, module: nn.Module, step: int) -> None:
        """Take the weights after `step`, counted from 0, into the average."""
        decay = min(self.decay, (1 + step) / (10 + step))
        own = trained_weights(module)
        current = [own[name].float() for name in self.weights]
        torch._foreach_lerp_(list(self.weights.values()), current, 1 - decay)

    @contextmanager
    def in_place(self, module: nn.Module) -> Iterator[None]:
        """Let `module` hold the averaged weights within the block."""
        kept = snapshot(module)
        restore_(module, self.weights)
        try:
            yield
        finally:
            restore_(module, kept)


class Best:
    """The best evaluation so far, the weights that made it, and how long ago that was."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.value: float | None = None
        self.step = 0
        self.stale = 0  # evaluations since
        self.weights: dict[str, Tensor] = {}

    def take(self, value: float, step: int, module: nn.Module) -> None:
        """Compare an evaluation, higher is better, with the best; NaN never is."""
        if value == value and (self.value is None or value > self.value):
            self.value, self.step, self.stale = value, step, 0
            self.weights = snapshot(module)
        else:
            self.stale += 1

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return bool(self.patience) and self.stale >= self.patience
