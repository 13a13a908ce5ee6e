"""What dropping a whole layer costs, and what a channel of the residual stream is worth."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from calib_data.errors import DataError, ModelError
from compress.checkpoint import Checkpoint
from compress.criteria import Data, mask_importance
from compress.example_loss import log_probabilities, logits_among, real_positions
from compress.masks import Masks
from compress.processes import on_device


def layer_importance(
    checkpoint: Checkpoint,
    stacks: Mapping[str, nn.ModuleList],
    batches: Data,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Return what dropping each layer alone costs, by stack: (layers,), float64, at least 0.

    It is measured, by running the model without the layer: a layer does too much for a derivative
    to tell. The cost is twice the divergence of the model's distributions, or else the squared change
    of its output, per example, which is what `unit_importance` with `fisher` estimates for units.
    Raises `DataError` for no batches, `ModelError` for a change that is not finite.
    """
    totals = {name: torch.zeros(len(stack), dtype=torch.float64) for name, stack in stacks.items()}
    count = 0
    with on_device(checkpoint.module) as device, torch.no_grad():
        for batch in batches:
            moved = {name: value.to(device) for name, value in batch.items()}
            whole = checkpoint.forward(moved)
            for name, stack in stacks.items():
                for index, layer in enumerate(stack):
                    with _skipped(layer):
                        without = checkpoint.forward(moved)
                    totals[name][index] += _change(checkpoint, whole, without, moved)
            count += len(next(iter(batch.values())))
            progress()
    if not count:
        raise DataError("there is no calibration batch; give --data at least one row")
    if not all(bool(total.isfinite().all()) for total in totals.values()):
        raise ModelError("the model's output is not finite; check the weights and the data")
    return {name: total / count for name, total in totals.items()}


def hidden_importance(
    checkpoint: Checkpoint,
    stacks: Mapping[str, nn.ModuleList],
    batches: Data,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return what each channel of the residual stream is worth, (hidden,), float64, at least 0.

    The mean over examples of (∂L/∂mask)² with one mask on a channel wherever a layer of `stacks` takes
    the stream and where the last one leaves it. Raises what `unit_importance` raises.
    """
    masks = Masks()

    def given(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if inputs:
            return (_scaled(masks, inputs[0]), *inputs[1:]), named
        return inputs, {**named, "hidden_states": _scaled(masks, named["hidden_states"])}

    def left(_: nn.Module, inputs: Any, output: Any) -> Any:
        return _with_states(output, _scaled(masks, _states(output)))

    layers = list(itertools.chain.from_iterable(stacks.values()))
    handles = [layer.register_forward_pre_hook(given, with_kwargs=True) for layer in layers]
    handles += [stack[-1].register_forward_hook(left) for stack in stacks.values()]
    try:
        with on_device(checkpoint.module):
            return mask_importance(checkpoint, masks, batches, seed, progress)["hidden"]
    finally:
        for handle in handles:
            handle.remove()


def _scaled(masks: Masks, states: Tensor) -> Tensor:
    return masks.scale("hidden", states, states.shape[-1])


# --- layers -------------------------------------------------------------------------------------


@contextmanager
def _skipped(layer: nn.Module) -> Iterator[None]:
    """Let `layer` hand on what it is given, so that only the residual path is left of it."""

    def hand_on(_: nn.Module, inputs: Any, named: Mapping[str, Any], output: Any) -> Any:
        return _with_states(output, inputs[0] if inputs else named["hidden_states"])

    handle = layer.register_forward_hook(hand_on, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _states(output: Any) -> Tensor:
    """Return the hidden states among what a layer returns."""
    states: Tensor = output if isinstance(output, Tensor) else output[0]
    return states


def _with_states(output: Any, states: Tensor) -> Any:
    return states if isinstance(output, Tensor) else (states, *output[1:])


def _change(
    checkpoint: Checkpoint,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
) -> float:
    """Return by how much the outputs differ, summed over the batch's examples."""
    names = logits_among(checkpoint, before)
    if not names:
        one, other = before[checkpoint.output].float(), after[checkpoint.output].float()
        return float(((one - other) * real_positions(one, batch)).double().square().sum())
    total = 0.0
    for name in names:
        (log_p, real), (log_q, _) = (log_probabilities(x[name], batch) for x in (before, after))
        divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1, keepdim=True) * real
        total += 2 * float(divergence.double().sum())
    return max(total, 0.0)
