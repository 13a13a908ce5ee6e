"""Graph passes, one a file: each takes an `onnx_ir.Model` and returns how often it applied.

`PASSES` says which ones a target gets, in order.
"""

from collections.abc import Callable

import onnx_ir as ir

from export.passes.batched_rotary import batched_rotary_
from export.passes.flat_attention import flat_attention_
from export.passes.residual_as_sum import residual_as_sum_

PASSES: dict[str, tuple[Callable[[ir.Model], int], ...]] = {
    "portable": (batched_rotary_,),
    "cpu": (batched_rotary_, flat_attention_, residual_as_sum_),
    "cuda": (
        batched_rotary_,
        flat_attention_,
    ),
}
