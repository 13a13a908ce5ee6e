"""Graph passes, one a file: each takes an `onnx_ir.Model` and returns how often it applied.

`PASSES` says which ones a target gets, in order.
"""

from collections.abc import Callable

import onnx_ir as ir

from export.passes.batched_rotary import batched_rotary_
from export.passes.cached_attention import cached_attention_
from export.passes.flat_attention import flat_attention_
from export.passes.grouped_heads import grouped_heads_
from export.passes.residual_as_sum import residual_as_sum_
from export.passes.split_heads import split_heads_

PASSES: dict[str, tuple[Callable[[ir.Model], int], ...]] = {
    "portable": (split_heads_, batched_rotary_, grouped_heads_),
    "cpu": (
        split_heads_,
        batched_rotary_,
        grouped_heads_,
        cached_attention_,
        flat_attention_,
        residual_as_sum_,
    ),
    "cuda": (split_heads_, batched_rotary_, grouped_heads_, cached_attention_, flat_attention_),
}
