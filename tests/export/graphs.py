"""What the tests of the exporter share: graphs of tiny models, saved, changed and run."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from compress.checkpoint import Checkpoint
from compress.quantize import quantize
from compress.quantize_config import QuantizeConfig
from export.graph import MODULE, ExportConfig, build_graph
from export.parts import parts
from export.sessions import open_session, run
from tests.tiny import SampledBatches, tiny_checkpoint

NAMES = {
    "bert": ("bert", "feature-extraction"),
    "classifier": ("bert", "text-classification"),
    "gpt2": ("gpt2", "text-generation"),
    "llama": ("llama", "text-generation"),
    "vit": ("vit", "image-classification"),
}


@functools.cache
def checkpoint_of(name: str, int8: bool = False) -> Checkpoint:
    """Return a tiny checkpoint, made once."""
    checkpoint = tiny_checkpoint(*NAMES[name])
    return quantize(checkpoint, QuantizeConfig()).checkpoint if int8 else checkpoint


@functools.cache
def _bytes_of(name: str, int8: bool, target: str, opset: int) -> bytes:
    model = build_graph(checkpoint_of(name, int8), ExportConfig(target=target, opset=opset))
    return bytes(ir.to_proto(model).SerializeToString())


def graph_of(name: str, int8: bool = False, target: str = "cpu", opset: int = 23) -> ir.Model:
    """Return the graph of a tiny checkpoint, exported once and read anew each time."""
    import onnx

    return ir.from_proto(onnx.load_from_string(_bytes_of(name, int8, target, opset)))


@functools.cache
def _cached_bytes_of(name: str, int8: bool) -> bytes:
    (part,) = parts(checkpoint_of(name, int8)).values()
    return bytes(ir.to_proto(build_graph(part, ExportConfig())).SerializeToString())


def cached_graph_of(name: str, int8: bool = False) -> ir.Model:
    """Return the graph of a tiny decoder with its cache, exported once and read anew each time."""
    import onnx

    return ir.from_proto(onnx.load_from_string(_cached_bytes_of(name, int8)))


@functools.cache
def static_checkpoint_of(name: str = "bert", opset: int = 23, **settings: Any) -> Checkpoint:
    """Return the one part of a tiny checkpoint with fixed activation steps, made once."""
    del opset
    checkpoint = tiny_checkpoint(*NAMES[name])
    batches = SampledBatches(checkpoint)
    small = quantize(checkpoint, QuantizeConfig("static", **settings), batches).checkpoint
    (part,) = parts(small).values()
    return part


@functools.cache
def _static_bytes_of(name: str, target: str, opset: int = 23, **settings: Any) -> bytes:
    part = static_checkpoint_of(name, **settings)
    return bytes(ir.to_proto(build_graph(part, ExportConfig(target, opset))).SerializeToString())


def static_graph_of(name: str = "bert", target: str = "cpu", **settings: Any) -> ir.Model:
    """Return its graph, exported once and read anew each time."""
    import onnx

    return ir.from_proto(onnx.load_from_string(_static_bytes_of(name, target, **settings)))


def save(model: ir.Model, folder: Path, change: Callable[[ir.Model], Any] | None = None) -> Path:
    """Write the graph, changed or not, into `folder`; return its path."""
    if change is not None:
        change(model)
    ir.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def run_graph(
    model: ir.Model | Path, inputs: Mapping[str, Any], optimize: bool = False
) -> dict[str, np.ndarray]:
    """Return the outputs of the graph, without ONNX Runtime's optimizations unless asked for."""
    if isinstance(model, ir.Model):
        source: Any = ir.to_proto(model).SerializeToString()
    else:
        source = model
    return run(open_session(source, optimize=optimize), inputs)


def operators(model: ir.Model) -> Counter[str]:
    """Return how often each operator occurs."""
    return Counter(node.op_type for node in model.graph)


def optimized_operators(path: Path, folder: Path) -> Counter[str]:
    """Return how often each operator occurs in what ONNX Runtime makes of the graph."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return operators(ir.load(folder / "optimized.onnx"))


def cast(value: ir.Value, dtype: ir.DataType, output: ir.Value | None = None) -> ir.Node:
    """Return a node that turns `value` into another type."""
    outputs = None if output is None else [output]
    return ir.node("Cast", [value], {"to": int(dtype)}, outputs=outputs)


def initializer(model: ir.Model, suffix: str) -> ir.Value:
    """Return the one initializer whose name ends in `suffix`."""
    (found,) = (v for n, v in model.graph.initializers.items() if n.endswith(suffix))
    return found


def edit(value: ir.Value, change: Callable[[np.ndarray], Any]) -> None:
    """Change the numbers of an initializer in place."""
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    change(array)
    value.const_value = ir.tensor(array, name=value.name)


def weight_of(model: ir.Model, module: str) -> ir.Value:
    """Return the weight of a linear layer, which the exporter may have renamed in transposing it."""
    (found,) = {
        value
        for node in model.graph
        if node.op_type in ("MatMul", "Gemm", "MatMulInteger")
        and node.metadata_props.get(MODULE) == module
        for value in node.inputs
        if value is not None and value.const_value is not None and len(value.const_value.shape) == 2
    }
    return found
