"""Where a graph first disagrees with its source: from the whole model down to one module."""

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from compress.checkpoint import Checkpoint
from compress.fresh import unchanged
from compress.signature import named_outputs
from export.graph import MODULE
from export.precision import precision
from export.rounding import Rounded, exactly
from export.sessions import open_session, run
from export.tolerance import DRAWS, NOISE, deviation, finding, pooled_errors, scale_for

Calls = list[
    tuple[str, list[np.ndarray]]
]  # (module, its outputs), in the order in which they finish

Judge = Callable[[np.ndarray, np.ndarray, list[np.ndarray]], bool]  # found, y, what PyTorch gives


def first_divergence(
    checkpoint: Checkpoint,
    model: Path,
    case: Mapping[str, Tensor],
    provider: str = "cpu",
    rounded: Checkpoint | None = None,
) -> str | None:
    """Return the innermost module whose output in the graph is off, with operator and statistics.

    From the whole model downwards: of the modules called inside the last one found, the first whose
    output is off is looked into next. A module's outputs, hooked in float64 and in runs that round at
    random, are held against the values that leave it in the graph, under the gate's own rule; where
    none has their size, the modules inside it stand for it. What the graph fused away is seen only if
    the module around it is off. With `rounded`, the same model as it rounds in int8, its noise is what
    counts. None where no module can be told to be off.
    """
    graph = ir.load(model)
    exits = _exits(graph)
    names = (name for name, _ in _calls(checkpoint.module, case, None))
    called = [name for name in dict.fromkeys(names) if name in exits]
    mask = _mask(checkpoint, case)
    with tempfile.TemporaryDirectory() as folder:
        session = _probed(graph, exits, Path(folder), provider)
        scope, found = "", None
        while inside := set(_inside(called, scope)):
            asked = list(dict.fromkeys(str(v.name) for name in inside for v in exits[name]))
            values = run(session, case, asked)
            with exactly():
                exact = _calls(checkpoint.module, case, inside)
            runs = _runs(checkpoint, rounded, case, inside)
            candidates = {name: [(v, values[str(v.name)]) for v in exits[name]] for name in inside}
            seen = {n for n, listed in exact if any(_comparable(candidates[n], y) for y in listed)}
            if seen < inside:
                called = [name for name in called if name not in inside - seen]
                continue
            judge = (
                _noise if rounded else functools.partial(_rounding, precision(checkpoint.module))
            )
            told = (
                (name, _off(candidates[name], y, own, mask, judge))
                for index, (name, listed) in enumerate(exact)
                for y, *own in zip(listed, *(run_[index][1] for run_ in runs))
            )
            first = next(((name, off) for name, off in told if off is not None), None)
            if first is None:
                break
            scope, (operator, statistics) = first
            found = f"{scope.removeprefix('backbone.')} ({operator}): {statistics}"
        return found


def _exits(graph: ir.Model) -> dict[str, list[ir.Value]]:
    """Return, for each module, the values made inside it that are used outside, or are outputs."""
    exits: dict[str, list[ir.Value]] = {}
    for node in graph.graph:
        scope = node.metadata_props.get(MODULE, "")
        while scope:
            for value in node.outputs:
                users = [use.node.metadata_props.get(MODULE, "") for use in value.uses()]
                outside = [user for user in users if not f"{user}.".startswith(f"{scope}.")]
                if outside or value.is_graph_output():
                    exits.setdefault(scope, []).append(value)
            scope = scope.rpartition(".")[0]
    return exits


def _probed(
    graph: ir.Model, exits: Mapping[str, list[ir.Value]], folder: Path, provider: str
) -> Any:
    """Return a session in which all those values can be asked for."""
    known = set(graph.graph.outputs)
    values = dict.fromkeys(value for listed in exits.values() for value in listed)
    graph.graph.outputs.extend(value for value in values if value not in known)
    ir.save(graph, folder / "probed.onnx", external_data="probed.onnx.data")
    return open_session(folder / "probed.onnx", provider, optimize=False, tf32=False)


def _inside(called: list[str], scope: str) -> Iterator[str]:
    """Yield the modules called directly inside `scope`, not inside another one there."""
    inner = {name for name in called if name.startswith(f"{scope}.") or not scope}
    for name in inner:
        if not any(name[:i] in inner for i, letter in enumerate(name) if letter == "."):
            yield name


def _mask(checkpoint: Checkpoint, case: Mapping[str, Tensor]) -> np.ndarray | None:
    """Return which (batch, sequence) tokens are real, where the model takes a mask over them."""
    ids, mask = case.get("input_ids"), case.get("attention_mask")
    if ids is None or mask is None:
        return None
    return mask.bool().numpy()[:, -ids.shape[1] :]


def _comparable(candidates: list[tuple[ir.Value, np.ndarray]], y: np.ndarray) -> bool:
    return any(True for _, array in candidates for _ in _layouts(array, y.shape))


def _off(
    candidates: list[tuple[ir.Value, np.ndarray]],
    y: np.ndarray,
    own: list[np.ndarray],
    mask: np.ndarray | None,
    judge: Judge,
) -> tuple[str, str] | None:
    """Return the operator and both statistics of the nearest candidate, if none agrees with y."""
    nearest: tuple[float, str, str] | None = None
    y_real, own_real = _real(y, mask), [_real(array, mask) for array in own]
    for value, array in candidates:
        for layout in _layouts(array, y.shape):
            real = _real(layout, mask)
            if judge(real, y_real, own_real):
                return None
            error = deviation(real, y_real).rms
            if nearest is None or error < nearest[0]:
                told = (
                    f"graph mean {real.mean():.4g}, spread {real.std():.4g}; "
                    f"source mean {y_real.mean():.4g}, spread {y_real.std():.4g}"
                )
                nearest = error, _operator(value), told
    return nearest[1:] if nearest else None


def _rounding(dtype: torch.dtype, found: np.ndarray, y: np.ndarray, own: list[np.ndarray]) -> bool:
    """Whether it is as near to y as the gate's rule asks, with as many draws as the gate's doubt."""
    scale = scale_for(y, dtype)
    for array in own:
        scale.add(deviation(array, y))
    away = deviation(found, y)
    return finding(away, scale, 1 + 2 * away.rows.size).passed


def _noise(found: np.ndarray, y: np.ndarray, own: list[np.ndarray]) -> bool:
    """Whether it is no noisier than PyTorch's simulation, with twice the gate's allowance for all."""
    noise = pooled_errors([deviation(array, y).errors for array in own])
    return all(a <= 2 * NOISE * b for a, b in zip(deviation(found, y).errors, noise))


def _runs(
    checkpoint: Checkpoint, rounded: Checkpoint | None, case: Mapping[str, Tensor], inside: set[str]
) -> list[Calls]:
    if rounded is not None:
        return [_calls(rounded.module, case, inside)]
    runs = []
    for seed in range(DRAWS):
        with Rounded(seed):
            runs.append(_calls(checkpoint.module, case, inside))
    return runs


def _operator(value: ir.Value) -> str:
    """Return what computes a value, whatever lays it out afterwards."""
    node = value.producer()
    while node is not None and node.op_type in ("Reshape", "Transpose") and node.inputs[0]:
        source = node.inputs[0].producer()
        if source is None or source.metadata_props.get(MODULE) != node.metadata_props.get(MODULE):
            break
        node = source
    return node.op_type if node is not None else "input"


def _layouts(array: np.ndarray, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yield `array` as a graph and a module may lay out the same numbers, in the module's shape."""
    if array.size != int(np.prod(shape)) or not np.issubdtype(array.dtype, np.floating):
        return
    yield array.reshape(shape)
    if array.ndim == 4:  # (batch, heads, sequence, width) for (batch, sequence, heads × width)
        yield array.swapaxes(1, 2).reshape(shape)
    if len(shape) == 4:
        swapped = (shape[0], shape[2], shape[1], shape[3])
        yield array.reshape(swapped).swapaxes(1, 2)


def _real(array: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Return what belongs to real tokens, where the array has a token axis."""
    if mask is not None and array.ndim > 2 and array.shape[:2] == mask.shape:
        return array[mask]
    if mask is not None and array.ndim == 4 and (array.shape[0], array.shape[2]) == mask.shape:
        return array.swapaxes(1, 2)[mask]
    return array


def _calls(module: nn.Module, case: Mapping[str, Tensor], names: set[str] | None) -> Calls:
    """Return the tensors that each call to the named submodules gave; without names, only the calls."""
    calls: Calls = []

    def hook(name: str) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            listed = output.values() if isinstance(output, Mapping) else output
            listed = [listed] if isinstance(listed, Tensor) else list(listed or ())
            tensors = [value for value in listed if isinstance(value, Tensor)]
            if names is None:
                tensors = []
            calls.append((name, [_kept(value) for value in tensors]))

        return keep

    handles = [
        m.register_forward_hook(hook(n))
        for n, m in module.named_modules()
        if n and (names is None or n in names)
    ]
    kind = next((p.dtype for p in module.parameters()), torch.float32)
    inputs = {k: v.to(kind) if v.is_floating_point() else v for k, v in case.items()}
    try:
        with torch.inference_mode(), unchanged(module):
            named_outputs(module, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _kept(value: Tensor) -> np.ndarray:
    array: np.ndarray = (value if value.dtype == torch.float64 else value.float()).numpy().copy()
    return array
