"""Decoders with a key/value cache: one module, and so one graph, that serves prompt and step.

The cache's length is taken from the attention mask, never from the cache: a runtime may hand over a
buffer with room for more, and the same graph appends to it in place.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from compress.checkpoint import Checkpoint
from compress.signature import Input, forward_names
from compress.wrapper import Wrapper


@torch.library.custom_op("onnxpress::append", mutates_args=())
def append(past: Tensor, new: Tensor, mask: Tensor) -> Tensor:
    """Return `past` (batch, heads, past, width) followed by `new`, as long as `mask` (batch, total).

    What `past` holds beyond total − new positions is room, and left out.
    """
    return torch.cat([past[:, :, : mask.shape[1] - new.shape[2]], new], dim=2)


@append.register_fake
def _(past: Tensor, new: Tensor, mask: Tensor) -> Tensor:
    return new.new_empty((*new.shape[:2], mask.shape[1], new.shape[3]))


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values, their length given by the mask."""

    def __init__(self, keys: Tensor, values: Tensor, mask: Tensor, sequence: int) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.mask, self.sequence = mask, sequence
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the layer is made with its contents."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (batch, heads, sequence, width) and return all keys and values."""
        self.keys = append(self.keys, key_states, self.mask)
        self.values = append(self.values, value_states, self.mask)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return how many positions there were before this call."""
        return self.mask.shape[1] - self.sequence

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and offset of the keys."""
        return self.mask.shape[1], 0

    def get_max_length(self) -> int:
        """Return −1: no limit."""
        return -1


class CachedDecoder(Wrapper):
    """A causal language model that takes and returns its cache as named tensors."""

    def forward(self, **inputs: Tensor) -> Mapping[str, Tensor]:
        """Return logits (batch, sequence, vocabulary) and present.N.key and .value.

        Keys and values have shape (batch, heads, total, width); `attention_mask` (batch, total)
        covers the cache too.
        """
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        past = [value for name, value in inputs.items() if name.startswith("past_key_values.")]
        cache = Cache(
            layers=[_Layer(k, v, mask, ids.shape[1]) for k, v in zip(past[::2], past[1::2])]
        )
        own = {name: v for name, v in inputs.items() if not name.startswith("past_key_values.")}
        result = self.backbone(**own, past_key_values=cache, use_cache=True)
        outputs = {"logits": result.logits}
        for index, layer in enumerate(cache.layers):
            outputs[f"present.{index}.key"] = layer.keys
            outputs[f"present.{index}.value"] = layer.values
        return outputs


def with_cache(checkpoint: Checkpoint) -> Checkpoint | None:
    """Return `checkpoint` as a decoder with cache, or None where its cache is not keys and values."""
    shapes = _cache_shapes(checkpoint)
    if not shapes:
        return None
    base = checkpoint.signature
    tokens = ((0, "batch"), (1, "sequence"))
    inputs = [
        Input("input_ids", "ids", tokens, (2, 16)),
        Input("attention_mask", "mask", ((0, "batch"), (1, "total_sequence")), (2, 16)),
    ]
    if "position_ids" in forward_names(checkpoint.backbone):
        inputs.append(Input("position_ids", "positions", tokens, (2, 16)))
    for index, pair in enumerate(shapes):
        for kind, (heads, width) in zip(("key", "value"), pair):
            inputs.append(
                Input(
                    f"past_key_values.{index}.{kind}",
                    "past",
                    ((0, "batch"), (2, "past_sequence")),
                    (2, heads, 0, width),
                    "float32",
                )
            )
    outputs = tuple(
        f"present.{index}.{kind}" for index in range(len(shapes)) for kind in ("key", "value")
    )
    signature = replace(base, inputs=tuple(inputs), outputs=("logits", *outputs))
    return replace(
        checkpoint, module=CachedDecoder(checkpoint.backbone).eval(), signature=signature
    )


def _cache_shapes(checkpoint: Checkpoint) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return (heads, width) of keys and of values per layer, as a run of the model shows them."""
    accepted = forward_names(checkpoint.backbone)
    if "past_key_values" not in accepted or "attention_mask" not in accepted:
        return []
    sample = checkpoint.signature.sample(batch=1, sequence=2)
    with torch.no_grad():
        cache = getattr(checkpoint.backbone(**sample, use_cache=True), "past_key_values", None)
    layers = getattr(cache, "layers", [])
    shapes = []
    for layer in layers:
        pair = (getattr(layer, "keys", None), getattr(layer, "values", None))
        if not all(isinstance(x, Tensor) and x.dim() == 4 and x.shape[2] == 2 for x in pair):
            return []
        shapes.append(tuple((int(x.shape[1]), int(x.shape[3])) for x in pair))
    return shapes  # type: ignore[return-value]
