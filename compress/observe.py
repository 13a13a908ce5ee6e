"""What is seen of a model while it runs: its outputs, its layers' hidden states, its attention.

A teacher and a student are observed alike, and a loss compares what was seen. What is not asked for
is not recorded and costs nothing.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from calib_data.errors import ModelError, TrainingError
from compress.checkpoint import Checkpoint
from compress.stacks import layer_stack

Need = Literal["outputs", "embeddings", "layers", "attention"]


@dataclass(frozen=True)
class QKV:
    """What one self-attention compares, after its projections and, where there are any, rotations.

    Grouped key/value heads are as they are stored: H_kv of them serve H query heads.
    """

    query: Tensor  # (B, H, T, D)
    key: Tensor  # (B, H_kv, T, D)
    value: Tensor  # (B, H_kv, T, D_v)
    scaling: float = 1.0
    mask: Tensor | None = None  # True, or 0 added to the score, where a token is seen
    bias: Tensor | None = None  # added to the scores; both broadcast to (B, H, T, T)
    softcap: float | None = None  # scores are kept within ± this by a tanh
    causal: bool = False  # no token sees one after it, whatever the mask says

    def maps(self) -> Tensor:
        """Return the attention maps (B, H, T, T), each row of which sums to 1.

        A row that sees nothing, as padding may, is uniform.
        """
        groups = self.query.shape[1] // self.key.shape[1]
        key = self.key.repeat_interleave(groups, dim=1)  # (B, H, T, D)
        scores = self.query @ key.transpose(-1, -2) * self.scaling  # (B, H, T, T)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores if self.bias is None else scores + self.bias
        lowest = torch.finfo(scores.dtype).min  # not −inf: a row of those has no softmax
        if self.mask is not None and self.mask.dtype == torch.bool:
            scores = scores.masked_fill(~self.mask, lowest)
        elif self.mask is not None:
            scores = (scores + self.mask).clamp(min=lowest)
        if self.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, lowest)
        return scores.softmax(dim=-1)


@dataclass(frozen=True)
class Observed:
    """What was asked for of one run; the rest is empty.

    `layers` and `attention` have an entry per layer, the encoder's before the decoder's. The
    hidden states are (B, T, width), what each layer returns; `embeddings` is what the first layer
    is given, of a decoder too (one entry per stack).
    """

    outputs: dict[str, Tensor] = field(default_factory=dict)
    layers: list[Tensor] = field(default_factory=list)
    attention: list[QKV] = field(default_factory=list)
    embeddings: list[Tensor] = field(default_factory=list)


# How a teacher is asked: by running it, or by looking up what it once answered.
Observer = Callable[[Mapping[str, Tensor]], Observed]


@dataclass(frozen=True)
class Stack:
    """One stack of transformer layers, and the unit that its positions are counted in."""

    name: str
    layers: nn.ModuleList
    unit: Literal["tokens", "labels"]  # the source's tokens, or those of a decoder's target


def stacks(model: nn.Module) -> tuple[Stack, ...]:
    """Return the model's layer stacks: one, or an encoder's and a decoder's.

    Raises `ModelError` where they cannot be told.
    """
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return (Stack(*layer_stack(model), "tokens"),)
    whole: Any = model
    return (
        _outermost(model, whole.get_encoder(), "tokens"),
        _outermost(model, whole.get_decoder(), "labels"),
    )


def observe(
    checkpoint: Checkpoint, batch: Mapping[str, Tensor], needs: frozenset[Need]
) -> Observed:
    """Return what `needs` names of one run of `checkpoint` on `batch`, with gradients if enabled.

    An encoder–decoder is given its target, `labels` (B, T) with −100 for padding, one place on.
    Gradient checkpointing works in its non-reentrant form. Raises `ModelError` for layers or
    attention that cannot be seen, `TrainingError` where gradients would be lost.
    """
    with contextlib.ExitStack() as stack:
        seen = Observed()
        if needs & {"layers", "embeddings"}:
            stack.enter_context(_hidden_states(checkpoint.backbone, seen, needs))
        if "attention" in needs:
            stack.enter_context(_attention(checkpoint.backbone, seen))
        outputs = checkpoint.forward(_with_decoder_inputs(checkpoint, batch))
        if "outputs" in needs:
            seen.outputs.update(outputs)
    _check_gradients(checkpoint, seen)
    return seen


def _outermost(model: nn.Module, part: nn.Module, unit: Literal["tokens", "labels"]) -> Stack:
    name = next(name for name, module in model.named_modules() if module is part)
    for inner, module in part.named_modules():
        if isinstance(module, nn.ModuleList) and len({type(layer) for layer in module}) == 1:
            return Stack(".".join(filter(None, (name, inner))), module, unit)
    raise ModelError(f"{type(part).__name__} holds no list of layers that are alike")


def _with_decoder_inputs(
    checkpoint: Checkpoint, batch: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """Return the batch with the decoder's inputs made of its labels, where the model wants them."""
    name = "decoder_input_ids"
    if name not in checkpoint.signature.names or name in batch:
        return batch
    labels = batch.get("labels")
    shift = getattr(checkpoint.backbone, "prepare_decoder_input_ids_from_labels", None)
    if labels is None or labels.dim() != 2 or shift is None:
        raise ModelError(
            f"{type(checkpoint.backbone).__name__} is trained on pairs of texts, source and target; "
            "give --data with columns text and text_pair"
        )
    try:
        return {**batch, name: shift(labels=labels)}
    except (AttributeError, ValueError) as error:
        raise ModelError(
            "config.json names no decoder_start_token_id, with which a target begins; add it"
        ) from error


@contextlib.contextmanager
def _hidden_states(model: nn.Module, seen: Observed, needs: frozenset[Need]) -> Iterator[None]:
    """Fill `seen.layers` and `seen.embeddings`, as needed, while `model` runs."""

    def keep_input(_module: nn.Module, inputs: Any, named: Any) -> None:
        seen.embeddings.append(inputs[0] if inputs else named["hidden_states"])

    def keep_output(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.layers.append(output if isinstance(output, Tensor) else output[0])

    handles = []
    for stack in stacks(model):
        if "embeddings" in needs:
            first = stack.layers[0]
            handles.append(first.register_forward_pre_hook(keep_input, with_kwargs=True))
        if "layers" in needs:
            handles += [layer.register_forward_hook(keep_output) for layer in stack.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _attention(model: nn.Module, seen: Observed) -> Iterator[None]:
    """Fill `seen.attention` with each layer's self-attention while `model` runs.

    Every family that looks its attention function up in transformers' attention interface is seen:
    for the time of one run the lookup returns a function that notes its arguments before it calls
    the one asked for, so that what is computed stays the same to the bit. It is not done by naming
    another implementation in the config: what gradient checkpointing computes again in the
    backward pass, when this is over, must be what was computed before.
    """
    from transformers.modeling_utils import AttentionInterface

    place = {
        id(module): (number, index)
        for number, stack in enumerate(stacks(model))
        for index, layer in enumerate(stack.layers)
        for module in layer.modules()
    }
    found: dict[tuple[int, int], QKV] = {}
    lookup = AttentionInterface.get_interface

    def get_interface(self: Any, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        function = lookup(self, name, default)

        def noting(module: nn.Module, *tensors: Any, **settings: Any) -> Any:
            # the first attention of a layer is its self-attention, a second one looks at an encoder
            if id(module) in place and place[id(module)] not in found:
                found[place[id(module)]] = _qkv(module, *tensors, **settings)
            return function(module, *tensors, **settings)

        return noting

    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        AttentionInterface.get_interface = lookup  # type: ignore[method-assign]
    if len(found) < len(set(place.values())):
        raise ModelError(
            f"{type(model).__name__} does not compute its attention through transformers' attention "
            "interface, so the losses attention and relations cannot see it; use hidden, "
            "hidden-cosine or those of the outputs"
        )
    seen.attention.extend(found[key] for key in sorted(found))


def _qkv(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **_others: Any,
) -> QKV:
    """Return the arguments of an attention function of transformers in one form."""
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if mask is not None and mask.dim() == 2:  # flash attention takes the padding mask itself
        mask = mask[:, None, None, :].bool()
    elif mask is not None:  # (B, 1 or H, T, T): it says all
        causal = False
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return QKV(query, key, value, scaling, mask, position_bias, softcap, causal)


def _check_gradients(checkpoint: Checkpoint, seen: Observed) -> None:
    tensors = [*seen.layers, *(item.query for item in seen.attention)]
    trained = any(p.requires_grad for p in checkpoint.backbone.parameters())
    if trained and torch.is_grad_enabled() and not all(t.requires_grad for t in tensors):
        raise TrainingError(
            "gradients do not reach what the losses see of the layers: re-entrant gradient "
            "checkpointing hides it; use use_reentrant=False, or the losses of the outputs alone"
        )
