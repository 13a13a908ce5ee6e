"""Graph passes, one a file: each takes an `onnx_ir.Model` and returns how often it applied.

`PASSES` says which ones a target gets, in order.
"""

from collections.abc import Callable

import onnx_ir as ir

from export.passes.batched_rotary import batched_rotary_
from export.passes.cached_attention import cached_attention_
from export.passes.common_subexpressions import common_subexpressions_
from export.passes.constant_reshape import constant_reshape_
from export.passes.finite_masks import finite_masks_
from export.passes.flat_attention import flat_attention_
from export.passes.folded_vectors import folded_vectors_
from export.passes.gelu import gelu_, quick_gelu_
from export.passes.grouped_heads import grouped_heads_
from export.passes.identities import identities_
from export.passes.open_masks import open_masks_
from export.passes.packed_projections import packed_projections_
from export.passes.plain_padding_mask import plain_padding_mask_
from export.passes.residual_apart import residual_apart_
from export.passes.rotary import rotary_
from export.passes.shared_weights import shared_weights_
from export.passes.softmax_attention import softmax_attention_
from export.passes.split_heads import split_heads_
from export.passes.standard_blocks import standard_blocks_
from export.passes.unfolded_axis import unfolded_axis_
from export.passes.unsigned_activations import unsigned_activations_

Pass = Callable[[ir.Model], int]

# what every runtime gains from: the model's own operators, written plainly
_PLAIN: tuple[Pass, ...] = (
    identities_,
    plain_padding_mask_,
    unfolded_axis_,
    softmax_attention_,
    open_masks_,
    finite_masks_,
    gelu_,
    packed_projections_,
    split_heads_,
    rotary_,
    batched_rotary_,
    grouped_heads_,
)
_FUSED: tuple[Pass, ...] = (cached_attention_, flat_attention_, quick_gelu_)
_LAST: tuple[Pass, ...] = (
    folded_vectors_,
    constant_reshape_,
    shared_weights_,
    common_subexpressions_,
)

PASSES: dict[str, tuple[Pass, ...]] = {
    "portable": (*_PLAIN, standard_blocks_, *_LAST),
    "cpu": (*_PLAIN, *_FUSED, residual_apart_, unsigned_activations_, *_LAST),
    "cuda": (*_PLAIN, *_FUSED, *_LAST),
}
