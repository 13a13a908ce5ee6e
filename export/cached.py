"""Decoders with a key/value cache: one module, and so one graph, that serves prompt and step.

The cache's length is taken from the attention mask, never from the cache: a runtime may hand over a
buffer with room for more, and the same graph appends to it in place.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from calib_data.errors import ModelError
from compress.checkpoint import Checkpoint
from compress.signature import Input, forward_names
from compress.wrapper import Wrapper

KINDS = ("key", "value")
PROBED = 2  # tokens: enough to tell a cache of keys and values by its length
Shapes = list[tuple[tuple[int, int], ...]]  # (heads, width) of keys and of values, per layer


@torch.library.custom_op("onnxpress::append", mutates_args=())
def append(past: Tensor, new: Tensor, mask: Tensor) -> Tensor:
    """Return `past` (batch, heads, past, width) followed by `new`, as long as `mask` (batch, total).

    What `past` holds beyond total − new positions is room, and left out.
    """
    return torch.cat([past[:, :, : mask.shape[1] - new.shape[2]], new], dim=2)


@append.register_fake
def _(past: Tensor, new: Tensor, mask: Tensor) -> Tensor:
    return new.new_empty((*new.shape[:2], mask.shape[1], new.shape[3]))


class Layer(CacheLayerMixin):
    """One layer's keys and values: how many positions there are, and how new ones join them."""

    def __init__(
        self, keys: Tensor, values: Tensor, past: int, join: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.past, self.join = past, join
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the layer is made with its contents."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Join (batch, heads, sequence, width) to what is here and return all keys and values."""
        assert self.keys is not None  # for mypy: the layer is made with its contents
        assert self.values is not None
        self.keys = self.join(self.keys, key_states)
        self.values = self.join(self.values, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return how many positions there were before this call."""
        return self.past

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and offset of the keys."""
        return self.past + query_length, 0

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
        own = {name: v for name, v in inputs.items() if not name.startswith("past_key_values.")}
        length = mask.shape[1] - ids.shape[1]
        layers = [
            Layer(keys, values, length, lambda past, new: append(past, new, mask))
            for keys, values in zip(past[::2], past[1::2])
        ]
        result = self.backbone(**own, past_key_values=Cache(layers=[*layers]), use_cache=True)
        return {"logits": result.logits, **contents("present.{}.{}", layers)}


def contents(name: str, layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Return the layers' keys and values by `name`, which has places for the layer and the kind."""
    found = {}
    for index, layer in enumerate(layers):
        for kind, value in zip(KINDS, (layer.keys, layer.values)):
            assert value is not None
            found[name.format(index, kind)] = value
    return found


def past_input(name: str, shape: tuple[int, int], axis: str = "past_sequence") -> Input:
    """Return the input of one layer's keys or values, (batch, heads, axis, width)."""
    heads, width = shape
    return Input(name, "past", ((0, "batch"), (2, axis)), (2, heads, 0, width), "float32")


def with_cache(checkpoint: Checkpoint) -> dict[str, Checkpoint]:
    """Return the decoder with cache; nothing where the model's cache is not keys and values."""
    accepted = forward_names(checkpoint.backbone)
    if not {"past_key_values", "attention_mask"} <= set(accepted):
        return {}
    shapes = layer_shapes(probe(checkpoint), PROBED)
    if not shapes:
        return {}
    _refuse_more(checkpoint)
    tokens = ((0, "batch"), (1, "sequence"))
    inputs = [
        Input("input_ids", "ids", tokens, (2, 16)),
        Input("attention_mask", "mask", ((0, "batch"), (1, "total_sequence")), (2, 16)),
    ]
    if "position_ids" in accepted:
        inputs.append(Input("position_ids", "positions", tokens, (2, 16)))
    outputs = ["logits"]
    for index, pair in enumerate(shapes):
        for kind, shape in zip(KINDS, pair):
            inputs.append(past_input(f"past_key_values.{index}.{kind}", shape))
            outputs.append(f"present.{index}.{kind}")
    signature = replace(checkpoint.signature, inputs=tuple(inputs), outputs=tuple(outputs))
    module = CachedDecoder(checkpoint.backbone).eval()
    return {"model": replace(checkpoint, module=module, signature=signature)}


def _refuse_more(checkpoint: Checkpoint) -> None:
    """Raise `ModelError` for a decoder that is given more than its tokens, step by step."""
    known = {"input_ids", "attention_mask"}
    if getattr(checkpoint.config, "type_vocab_size", None) is not None:
        known.add("token_type_ids")  # zeros in a text alone, which is their default
    for name in checkpoint.signature.names:
        if name not in known:
            raise ModelError(
                f"the model's own tokenizer makes {name}, which {type(checkpoint.backbone).__name__} "
                "adds to its embeddings and a decoder with a cache does not take here; if it was "
                f"trained without, leave {name} out of model_input_names in tokenizer_config.json"
            )


def probe(checkpoint: Checkpoint) -> Any:
    """Return the cache that a run of the model on `PROBED` tokens leaves behind, or None."""
    sample = checkpoint.signature.sample(batch=1, sequence=PROBED)
    with torch.no_grad():
        return getattr(checkpoint.backbone(**sample, use_cache=True), "past_key_values", None)


def layer_shapes(cache: Any, length: int) -> Shapes:
    """Return (heads, width) of keys and of values per layer; nothing where it holds anything else."""
    shapes = []
    for layer in getattr(cache, "layers", []):
        pair = (getattr(layer, "keys", None), getattr(layer, "values", None))
        tensors = [x for x in pair if isinstance(x, Tensor) and x.dim() == 4]
        if [x.shape[2] for x in tensors] != [length, length]:
            return []
        shapes.append(tuple((int(x.shape[1]), int(x.shape[3])) for x in tensors))
    return shapes
