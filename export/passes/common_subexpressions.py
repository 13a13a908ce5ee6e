"""Compute once what several layers need."""

import onnx_ir as ir
from onnx_ir.passes import common

from export.passes.nodes import remove_unused_

_LONGEST = 1024  # of the constants that are compared; a target, a scale, a rotary frequency table


def common_subexpressions_(model: ir.Model) -> int:
    """Merge nodes that compute the same of the same; return how many are gone.

    The other passes write what they need where they need it: masks, rotary tables, reshape targets.
    """
    remove_unused_(model)
    before = len(model.graph)
    common.CommonSubexpressionEliminationPass(size_limit=_LONGEST)(model)
    return before - len(model.graph)
