"""Where a graph first disagrees with its source: module by module, in the order they run."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from compress.checkpoint import Checkpoint
from compress.signature import named_outputs
from export.graph import MODULE
from export.sessions import open_session, run
from export.tolerance import allowed_errors, errors


def first_divergence(
    checkpoint: Checkpoint,
    double: nn.Module,
    model: Path,
    case: Mapping[str, Tensor],
    factor: float,
) -> str | None:
    """Return the first module whose output in the graph is off, with its operator and statistics.

    Each module's output, hooked in float64 and float32, is held against the last value that the
    graph computes inside that module; the same rule as the gate's decides. None where no module's
    output can be told apart in the graph.
    """
    graph = ir.load(model)
    last: dict[str, ir.Node] = {}
    for node in graph.graph:
        scope = node.metadata_props.get(MODULE, "")
        while scope:
            last[scope] = node
            scope = scope.rpartition(".")[0]
    exact, own = (_hooked(m, case) for m in (double, checkpoint.module))
    names = [name for name in exact if name in last and name in own]
    values = {name: last[name].outputs[0] for name in names}
    known = {value.name for value in graph.graph.outputs}
    for value in dict.fromkeys(values.values()):
        if value.name not in known:
            value.dtype = value.dtype or ir.DataType.FLOAT
            graph.graph.outputs.append(value)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probed.onnx"
        ir.save(graph, path, external_data="probed.onnx.data")
        found = run(open_session(path, optimize=False), case)
    for name in names:
        array = found[str(values[name].name)]
        if array.shape != exact[name].shape:
            continue  # a module whose result the graph holds in another layout
        error, allowed = errors(array, exact[name]), allowed_errors(exact[name], own[name], factor)
        if error[0] > allowed[0] or error[1] > allowed[1]:
            return (
                f"{name} ({last[name].op_type}): graph mean {array.mean():.4g}, spread "
                f"{array.std():.4g}; source mean {exact[name].mean():.4g}, spread "
                f"{exact[name].std():.4g}"
            )
    return None


def _hooked(module: nn.Module, case: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return each submodule's tensor output by name, in the order in which they finish."""
    outputs: dict[str, np.ndarray] = {}

    def hook(name: str) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, Tensor):
                outputs.setdefault(name, first.numpy())

        return keep

    handles = [m.register_forward_hook(hook(n)) for n, m in module.named_modules() if n]
    double = next((p.dtype for p in module.parameters()), torch.float32) == torch.float64
    inputs = {k: v.double() if double and v.is_floating_point() else v for k, v in case.items()}
    try:
        with torch.inference_mode():
            named_outputs(module, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return outputs
