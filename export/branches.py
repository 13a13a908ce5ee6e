"""Lengths at which a model begins to compute otherwise, which a traced graph may not.

BigBird attends fully to short texts and by blocks to long ones; scaled rotary embeddings take other
frequencies beyond the trained length. The model is run at several lengths, and the operators it calls
are counted; between two lengths where they differ the switch is searched by halving. Products and
attention give zeros there, without being computed: what they hold rarely decides what is called.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from compress.checkpoint import Checkpoint
from compress.fresh import unchanged
from compress.signature import named_outputs
from compress.tokens import typed

_MOST = 2  # switches that are looked for: a mixture of experts calls others at each length
_NUMBERS = 1 << 26  # in the cache of the longest text that is tried
_HEAVY = frozenset(
    (
        *("mm", "bmm", "addmm", "baddbmm", "convolution", "_softmax", "native_layer_norm"),
        *("gelu", "silu", "_scaled_dot_product_flash_attention_for_cpu"),
    )
)


class _Counting(TorchDispatchMode):
    """Count the operators, and do not compute the heavy ones."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__
        if name == "where" and args[0].numel() == 1:
            name = f"where {bool(args[0])}"  # a choice for all, by a length for instance
        self.calls[name] += not func.is_view
        if name not in _HEAVY:
            return func(*args, **kwargs)
        made = func(*tree_map(_meta, args), **tree_map(_meta, kwargs))
        device = next(x.device for x in tree_leaves(args) if isinstance(x, Tensor))
        return tree_map(lambda x: _zeros(x, device), made)


def _meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _zeros(value: Any, device: torch.device) -> Any:
    return torch.zeros_like(value, device=device) if isinstance(value, Tensor) else value


def switches(part: Checkpoint, longest: int) -> list[int]:
    """Return the lengths L at which it calls other operators than at L − 1 tokens.

    Texts of up to `longest` tokens are tried; with a cache, where the lengths are those of past and
    present together, of as many as the model has positions for. At most the first few are returned;
    that of one token, where attention is simpler, is none.
    """
    signature = part.signature
    if signature.has_past:
        shapes = [item.shape for item in signature.inputs if item.kind == "past"]
        held = sum(shape[1] * shape[3] for shape in shapes)
        longest = max(longest, min(signature.longest or 0, _NUMBERS // held))
    if longest < 2:
        return []
    lengths = [*_powers(longest), longest]
    found: list[int] = []
    calls = {n: _calls(part, n) for n in lengths[:1]}
    for low, high in itertools.pairwise(lengths):
        calls[high] = _calls(part, high)
        if calls[low] == calls[high] or len(found) == _MOST:
            continue
        below, above = low, high
        while above - below > 1:
            middle = (below + above) // 2
            calls[middle] = _calls(part, middle)
            below, above = (middle, above) if calls[middle] == calls[low] else (below, middle)
        found.append(above)
    return found


def told(length: int) -> str:
    """Return one clause on a graph that has one side of the switch at `length`."""
    return (
        f"from {length} tokens on the source computes otherwise than for shorter texts, and the graph "
        "has one branch for both; choose in its config what does not switch on the length (attention "
        "type, rope scaling), or fewer positions"
    )


def _powers(longest: int) -> Iterator[int]:
    length = 2
    while length < longest:
        yield length
        length *= 2


def _calls(part: Checkpoint, length: int) -> Counter[str]:
    signature = part.signature
    if signature.has_past:
        sample = signature.sample(1, 1, past=length - 1)
    else:
        sample = signature.sample(1, length)
    counting = _Counting()
    with torch.inference_mode(), unchanged(part.module), counting:
        named_outputs(part.module, typed(part, sample))
    return counting.calls
