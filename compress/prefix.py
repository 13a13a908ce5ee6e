"""Prefix tuning: learned keys and values before every text (Li and Liang 2021, arXiv:2101.00190).

The prefix belongs to the transformer, not to the cache that goes in and out of it: hooks put it
before the caller's cache on the way in, and hand the caller's own back on the way out. So a cache
is as long as the attention mask says, with a prefix or without, in generation and in exported graphs.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from calib_data.errors import ModelError
from compress.signature import forward_names

_SAMPLE = 4  # tokens that a prefix's shape is found with
NAME = "prefix_encoder"  # of the module that holds it, in the one that takes the cache


class _Recorder(Cache):
    """Keeps the keys and values of each layer, and changes nothing."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.found: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep keys and values, (batch, heads, tokens, width) each."""
        self.found[layer_idx] = (key_states, value_states)
        return key_states, value_states


class _Prefixed(Cache):
    """A cache with a prefix before it; `inner` is the caller's own, or None."""

    def __init__(self, prefix: Tensor, inner: Cache | None) -> None:
        super().__init__(layers=[])
        self.prefix, self.inner = prefix, inner  # (2 × layers, batch, heads, prefix, width)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return prefix, what was cached and what is new, (batch, heads, total, width) each."""
        joined = [key_states, value_states]
        if self.inner is not None:
            joined = [*self.inner.update(key_states, value_states, layer_idx, *args, **kwargs)]
        pair = self.prefix[2 * layer_idx : 2 * layer_idx + 2]
        keys, values = (torch.cat([p.to(x.dtype), x], dim=2) for p, x in zip(pair, joined))
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many positions there are before this call."""
        before = 0 if self.inner is None else self.inner.get_seq_length(layer_idx)
        return before + self.prefix.shape[3]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the length and offset of the keys."""
        length, offset = query_length, 0
        if self.inner is not None:
            length, offset = self.inner.get_mask_sizes(query_length, layer_idx)
        return length + self.prefix.shape[3], offset


def prefix_shape(model: Any) -> dict[str, int]:
    """Return the layers, heads and width of the keys that a prefix for `model` has.

    Raises `ModelError` for a model that reads no such prefix, or whose layers differ.
    """
    return _recorded(model, torch.ones((1, _SAMPLE), dtype=torch.long))[1]


def add_prefix_(model: Any, shape: dict[str, int], tokens: int) -> None:
    """Give `model` a prefix of `tokens` positions, as yet random, and the hooks that read it."""
    from peft import PrefixEncoder, PrefixTuningConfig

    reader = _reader(model)
    encoder: Any = PrefixEncoder(
        PrefixTuningConfig(
            num_virtual_tokens=tokens,
            num_layers=shape["layers"],
            token_dim=shape["heads"] * shape["width"],
            num_attention_heads=shape["heads"],
        )
    )
    encoder.shape = (tokens, 2 * shape["layers"], shape["heads"], shape["width"])
    reader.add_module(NAME, encoder.to(next(reader.parameters()).device))
    reader.register_forward_pre_hook(_put_before, with_kwargs=True)
    reader.register_forward_hook(_hand_back, with_kwargs=True)


def start_from_text_(model: Any, ids: Tensor) -> None:
    """Let the prefix begin as the keys and values of real tokens, `ids` (1, prefix).

    Li and Liang found that much better than a random beginning.
    """
    prefix = getattr(_reader(model), NAME)
    states = _recorded(model, ids)[0]  # (2 × layers, heads, prefix, width)
    with torch.no_grad():
        prefix.embedding.weight.copy_(states.permute(2, 0, 1, 3).flatten(1))


def _reader(model: nn.Module) -> Any:
    """Return the outermost module that takes a cache, which no call goes past; or None."""
    wanted = {"past_key_values", "attention_mask"}
    return next((m for m in model.modules() if wanted <= set(forward_names(m))), None)


def _recorded(model: Any, ids: Tensor) -> tuple[Tensor, dict[str, int]]:
    """Return keys and values of `ids` in all layers, (2 × layers, heads, tokens, width)."""
    refusal = f"{type(model).__name__} takes no prefix"
    cure = "use --method lora, ia3 or adapter"
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{refusal}: it is an encoder–decoder; {cure}")
    reader, recorder = _reader(model), _Recorder()
    if reader is None:
        raise ModelError(f"{refusal}: it reads no cache of keys and values; {cure}")
    hooks = reader._forward_pre_hooks, reader._forward_hooks
    reader._forward_pre_hooks, reader._forward_hooks = {}, {}  # the states of text alone
    try:
        with torch.no_grad():
            reader(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=recorder)
    finally:
        reader._forward_pre_hooks, reader._forward_hooks = hooks
    found = [state for index in sorted(recorder.found) for state in recorder.found[index]]
    if not found:
        raise ModelError(f"{refusal}: it reads no cache of keys and values; {cure}")
    if len({state.shape for state in found}) > 1:
        raise ModelError(f"{refusal}: its layers differ in their heads; {cure}")
    states = torch.stack(found)[:, 0]
    sizes = {"layers": len(found) // 2, "heads": states.shape[1], "width": states.shape[3]}
    return states, sizes


def _put_before(reader: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Put the prefix before the call's cache, its attention mask and its positions."""
    called = kwargs | dict(zip(forward_names(reader), args))
    prefix: Any = getattr(reader, NAME)
    ids = called["input_ids"] if called.get("input_ids") is not None else called["inputs_embeds"]
    batch, length = ids.shape[:2]
    tokens = prefix.shape[0]
    states = prefix(torch.arange(tokens, device=ids.device)).view(*prefix.shape)
    states = states.permute(1, 2, 0, 3).unsqueeze(1)  # (2 × layers, 1, heads, prefix, width)
    inner = called.get("past_key_values")
    if inner is None and called.get("use_cache"):
        inner = DynamicCache()
    past = 0 if inner is None else inner.get_seq_length()
    mask = called.get("attention_mask")
    if mask is None:
        mask = torch.ones((batch, past + length), dtype=torch.long, device=ids.device)
    ahead = torch.ones((batch, tokens), dtype=mask.dtype, device=mask.device)
    called["attention_mask"] = torch.cat([ahead, mask], dim=1)
    if called.get("position_ids") is not None:
        called["position_ids"] = called["position_ids"] + tokens
    called["past_key_values"] = _Prefixed(states.expand(-1, batch, -1, -1, -1), inner)
    return (), called


def _hand_back(_reader: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Give the caller its own cache again."""
    if getattr(output, "past_key_values", None) is not None:
        output.past_key_values = kwargs["past_key_values"].inner
    return output
