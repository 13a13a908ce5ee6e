"""What calibration takes gradients of: a loss for each example, with labels or without."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from calib_data.errors import ModelError
from compress.checkpoint import Checkpoint
from compress.losses import hard_targets

_LEAST = -1e4  # of a logit: no chance, and still finite when summed


def example_loss(
    checkpoint: Checkpoint, batch: Mapping[str, Tensor], random: torch.Generator
) -> Tensor:
    """Return the sum over the batch's examples of each one's loss, a scalar.

    With labels it is the task's cross entropy, summed over what an example has to predict. Without,
    the model's own behaviour is the target. For logits that is a label drawn from the model's own
    distribution: the mean square of the loss's derivatives is then the Fisher information, twice the
    divergence that a small change makes. For anything else it is the output times random signs: the
    mean square is the expected squared change of the output. Padding does not count.

    Raises `ModelError` for a loss that is not finite.
    """
    outputs = checkpoint.forward(batch)
    found = hard_targets(checkpoint.task_row.target, outputs, batch)
    if found is not None:
        return _finite(F.cross_entropy(found[0].float(), found[1], reduction="sum"))
    names = logits_among(checkpoint, outputs)
    if not names:
        output = outputs[checkpoint.output]
        signs = torch.randint(0, 2, output.shape, generator=random).to(output) * 2 - 1
        return _finite((output * signs * real_positions(output, batch)).sum())
    losses = [_own_label_loss(outputs[name], batch, random) for name in names]
    return torch.stack(losses).sum()


def logits_among(checkpoint: Checkpoint, outputs: Mapping[str, Tensor]) -> list[str]:
    """Return the outputs that are logits of a distribution, where the task looks at such ones."""
    if "logits" not in checkpoint.output or outputs[checkpoint.output].shape[-1] < 2:
        return []  # a single number is a prediction, not a distribution
    # both ends of an answer; an encoder's states beside them are no behaviour
    return [name for name in outputs if name.endswith("logits")] or [checkpoint.output]


def log_probabilities(logits: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return log p (…, classes) in float32, and which of (…, 1) count as 1 and 0.

    Logits over tokens (B, T), as of where an answer starts, give padding no probability.
    """
    logits = logits.float()
    mask = _mask(batch)
    if mask is not None and logits.shape == mask.shape:
        logits = logits.masked_fill(mask == 0, _LEAST)
    return logits.log_softmax(dim=-1), real_positions(logits, batch)


def real_positions(output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Return 1 where `output` belongs to a real token and 0 for padding, to be multiplied with it."""
    mask = _mask(batch)
    if mask is None or output.dim() != 3 or output.shape[:2] != mask.shape:
        return output.new_ones(())
    return mask.unsqueeze(-1).to(output)


def _own_label_loss(logits: Tensor, batch: Mapping[str, Tensor], random: torch.Generator) -> Tensor:
    chances, real = log_probabilities(logits, batch)
    _finite(chances.detach().sum())
    table = chances.detach().exp().flatten(0, -2).cpu()  # (positions, classes)
    labels = torch.multinomial(table, 1, generator=random).to(chances.device)
    chosen = chances.gather(-1, labels.reshape(*chances.shape[:-1], 1))
    return -(chosen * real).sum()


def _mask(batch: Mapping[str, Tensor]) -> Tensor | None:
    name = "decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask"
    return batch.get(name)


def _finite(loss: Tensor) -> Tensor:
    if not bool(torch.isfinite(loss)):
        raise ModelError("the calibration loss is not finite; check the weights and the data")
    return loss
