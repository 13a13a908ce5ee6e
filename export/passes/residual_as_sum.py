"""Write the residual addition before a LayerNormalization as `Sum`."""

import onnx_ir as ir


def residual_as_sum_(model: ir.Model) -> int:
    """Replace `Add` by `Sum` where two computed values meet before a LayerNormalization.

    ONNX Runtime fuses `Add → LayerNormalization` into `SkipLayerNormalization` at its default level,
    and on the CPU provider that is several times slower than the two apart (docs/decisions/0003).
    `Sum` computes the same and keeps the pattern from matching.
    """
    count = 0
    for node in model.graph:
        if node.op_type != "LayerNormalization":
            continue
        value = node.inputs[0]
        source = value.producer() if value is not None else None
        if source is None or source.op_type != "Add" or source.domain:
            continue
        if all(v is not None and v.const_value is None for v in source.inputs):
            source.op_type = "Sum"
            count += 1
    return count
