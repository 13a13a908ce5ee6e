"""What the exporter could write in each place, as tiny graphs: the data of `benchmarks.operators`.

A new alternative is a function that adds its nodes to a `Graph`, and an entry in `CHOICES`.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

# metadata, as JSON: outputs to compare, and inputs with the outputs that live in their buffers
COMPARED, SHARED = "onnxpress.compared", "onnxpress.shared"
_OPSET, _IR = 23, 11
_FLOAT = onnx.TensorProto.FLOAT


@dataclass(frozen=True, eq=False)
class Fed:
    """An input of the graph; a letter an axis, of which those in `Graph.DYNAMIC` have any size."""

    axes: str
    array: np.ndarray


Operand = str | Fed | np.ndarray | None  # a node's output, an input, a weight, nothing
Build = Callable[["Graph", Any], Any]  # → the output, or several, that all alternatives share


class Graph:
    """Nodes being added one by one. What is handed to `op` becomes an input or a weight by its type."""

    DYNAMIC = "BSPT"  # batch, sequence, past, total

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: dict[str, Fed] = {}
        self.weights: dict[str, np.ndarray] = {}
        self.outputs: list[str] = []
        self.compared: list[str] = []
        self.shared: dict[str, str] = {}
        self._names: dict[int, str] = {}

    def op(self, kind: str, *operands: Operand, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node, of another domain as in `com.microsoft.Gelu`; return its output or outputs."""
        domain, _, op_type = kind.rpartition(".")
        made = [f"{op_type}_{len(self.nodes)}.{i}" for i in range(outputs)]
        inputs = [self._name(operand) for operand in operands]
        name = f"{op_type}_{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(op_type, inputs, made, name=name, domain=domain, **attributes)
        )
        return made[0] if outputs == 1 else made

    def keep(self, *values: str) -> None:
        """Make the values outputs that are not compared: a cache."""
        self.outputs += values

    def share(self, past: Fed, present: str) -> None:
        """Let an output live in the buffer of an input."""
        self.shared[self._name(past)] = present

    def model(self) -> onnx.ModelProto:
        """Return the finished graph."""
        inputs = []
        for name, fed in self.inputs.items():
            kind = helper.np_dtype_to_tensor_dtype(fed.array.dtype)
            sizes = zip(fed.axes, fed.array.shape, strict=True)
            shape = [axis if axis in self.DYNAMIC else size for axis, size in sizes]
            inputs.append(helper.make_tensor_value_info(name, kind, shape))
        graph = helper.make_graph(
            self.nodes,
            "alternative",
            inputs,
            [helper.make_tensor_value_info(n, _FLOAT, None) for n in self.compared + self.outputs],
            [numpy_helper.from_array(array, name) for name, array in self.weights.items()],
        )
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR)
        notes = {COMPARED: self.compared, SHARED: self.shared}
        helper.set_model_props(model, {name: json.dumps(note) for name, note in notes.items()})
        return model

    def _name(self, operand: Operand) -> str:
        if operand is None or isinstance(operand, str):
            return operand or ""
        if id(operand) not in self._names:
            if isinstance(operand, Fed):
                name = f"x{len(self.inputs)}"
                self.inputs[name] = operand
            else:
                name = f"w{len(self.weights)}"
                self.weights[name] = operand
            self._names[id(operand)] = name  # not given to another: what is stored lives on
        return self._names[id(operand)]


@dataclass(frozen=True)
class Alternative:
    """One way to write it."""

    build: Build
    error: float = 1e-4  # largest difference to the first alternative, over its largest value


@dataclass(frozen=True)
class Choice:
    """One place in a graph where the exporter has a choice."""

    name: str
    data: Callable[..., SimpleNamespace]  # (random, *shape, **widths) → weights, then inputs
    axes: str  # what the numbers of a shape are
    shapes: tuple[tuple[int, ...], ...]
    small: tuple[int, ...]  # for tests
    alternatives: Mapping[str, Alternative]
    chosen: Mapping[str, str]  # target → the alternative that the exporter emits
    copies: int = 4  # in one graph, so that starting a run weighs little
    widths: Mapping[str, int] = field(default_factory=dict)  # of weights, for `data`


def build(choice: Choice, alternative: str, shape: tuple[int, ...], copies: int = 0) -> Graph:
    """Return an alternative, several times on data of its own."""
    graph = Graph()
    for copy in range(copies or choice.copies):
        data = choice.data(np.random.default_rng(copy), *shape, **choice.widths)
        made = choice.alternatives[alternative].build(graph, data)
        graph.compared += made if isinstance(made, tuple) else (made,)
    return graph


def _normal(random: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (random.standard_normal(shape) * scale).astype(np.float32)


def _ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def _scalar(value: float) -> np.ndarray:
    return np.array(value, np.float32)


def _split(g: Graph, value: Operand, heads: int, width: int) -> str:
    """(batch, sequence, heads × width) → (batch, heads, sequence, width)."""
    apart = g.op("Reshape", value, _ints(0, 0, heads, width))
    return str(g.op("Transpose", apart, perm=[0, 2, 1, 3]))


def _join(g: Graph, value: Operand) -> str:
    """(batch, heads, sequence, width) → (batch, sequence, heads × width)."""
    swapped = g.op("Transpose", value, perm=[0, 2, 1, 3])
    return str(g.op("Reshape", swapped, _ints(0, 0, -1)))


# --- residual and normalisation ------------------------------------------------------------------


def _residual_data(random: Any, batch: int, sequence: int, hidden: int) -> SimpleNamespace:
    return SimpleNamespace(
        scale=_normal(random, hidden),
        bias=_normal(random, hidden),
        x=Fed("BSE", _normal(random, batch, sequence, hidden)),
        y=Fed("BSE", _normal(random, batch, sequence, hidden)),
    )


def _layer_norm(add: str) -> Build:
    return lambda g, d: g.op("LayerNormalization", g.op(add, d.x, d.y), d.scale, d.bias)


def _layer_norm_apart(g: Graph, d: Any) -> Operand:
    width = len(d.scale)
    total = g.op("Reshape", g.op("Add", d.x, d.y), _ints(0, 0, 1, width))
    return g.op("Reshape", g.op("LayerNormalization", total, d.scale, d.bias), _ints(0, 0, width))


def _layer_norm_keeping(add: str) -> Build:
    def build(g: Graph, d: Any) -> tuple[Operand, ...]:
        total = g.op(add, d.x, d.y)
        return g.op("LayerNormalization", total, d.scale, d.bias), total

    return build


def _skip_norm(g: Graph, d: Any) -> Operand:
    return g.op("com.microsoft.SkipLayerNormalization", d.x, d.y, d.scale, d.bias, epsilon=1e-5)


def _skip_norm_keeping(g: Graph, d: Any) -> tuple[Operand, ...]:
    kind = "com.microsoft.SkipLayerNormalization"
    made = g.op(kind, d.x, d.y, d.scale, d.bias, outputs=4, epsilon=1e-5)
    g.nodes[-1].output[1] = g.nodes[-1].output[2] = ""
    return made[0], made[3]


def _rms_norm(add: str, kind: str = "RMSNormalization") -> Build:
    def build(g: Graph, d: Any) -> tuple[Operand, ...]:
        total = g.op(add, d.x, d.y)
        return g.op(kind, total, d.scale, axis=-1, epsilon=1e-5), total

    return build


def _rms_norm_written_out(g: Graph, d: Any) -> tuple[Operand, ...]:
    total = g.op("Add", d.x, d.y)
    square = g.op("Pow", total, _scalar(2))
    mean = g.op("ReduceMean", square, _ints(-1), keepdims=1)
    root = g.op("Sqrt", g.op("Add", mean, _scalar(1e-5)))
    return g.op("Mul", d.scale, g.op("Div", total, root)), total


def _rms_norm_skip(g: Graph, d: Any) -> tuple[Operand, ...]:
    kind = "com.microsoft.SkipSimplifiedLayerNormalization"
    made = g.op(kind, d.x, d.y, d.scale, outputs=4, epsilon=1e-5)
    g.nodes[-1].output[1] = g.nodes[-1].output[2] = ""
    return made[0], made[3]


# --- attention -----------------------------------------------------------------------------------


def _attention_data(
    random: Any, batch: int, sequence: int, heads: int, width: int, shared: int = 0
) -> SimpleNamespace:
    """Queries, keys and values, and the right padding of all rows but the first as masks.

    ONNX Runtime's `Attention` takes no mask that broadcasts over the queries; ONNX's does.
    """
    shared = shared or heads
    lengths = np.maximum(1, sequence - np.arange(batch) * max(1, sequence // 16))
    real = np.arange(sequence) < lengths[:, None]  # (batch, sequence)
    square = np.broadcast_to(real[:, None, None], (batch, 1, sequence, sequence)).copy()
    additive = np.where(square, 0, -1e9).astype(np.float32)
    return SimpleNamespace(
        heads=heads,
        width=width,
        shared=shared,
        q=Fed("BSE", _normal(random, batch, sequence, heads * width)),
        k=Fed("BSK", _normal(random, batch, sequence, shared * width)),
        v=Fed("BSK", _normal(random, batch, sequence, shared * width)),
        keys=Fed("BS", real.astype(np.int32)),
        mask=Fed("B1ST", square),
        bias=Fed("B1ST", additive),
        row_bias=Fed("B11T", additive[:, :, :1]),
        last=Fed("B", np.full(batch, sequence - 1, np.int32)),
        total=Fed("", np.array(sequence, np.int32)),
    )


def _attention(mask: str | None) -> Build:
    def build(g: Graph, d: Any) -> Operand:
        masks = [getattr(d, mask)] if mask else []
        heads = {"q_num_heads": d.heads, "kv_num_heads": d.shared}
        return g.op("Attention", d.q, d.k, d.v, *masks, **heads)

    return build


def _multi_head(keys: str | None = None, bias: str | None = None) -> Build:
    def build(g: Graph, d: Any) -> Operand:
        masks = [getattr(d, name) if name else None for name in (keys, bias)]
        kind = "com.microsoft.MultiHeadAttention"
        return g.op(kind, d.q, d.k, d.v, None, *masks, num_heads=d.heads)

    return build


def _group_query(bias: str | None) -> Build:
    def build(g: Graph, d: Any) -> Operand:
        masks = [None, None, None, getattr(d, bias)] if bias else []
        made = g.op(
            "com.microsoft.GroupQueryAttention",
            *(d.q, d.k, d.v, None, None, d.last, d.total, *masks),
            outputs=3,
            num_heads=d.heads,
            kv_num_heads=d.shared,
            causal=0,
        )
        return str(made[0])

    return build


def _attention_written_out(bias: str | None) -> Build:
    def build(g: Graph, d: Any) -> Operand:
        query = g.op("Mul", _split(g, d.q, d.heads, d.width), _scalar(d.width**-0.5))
        key = g.op("Transpose", _split(g, d.k, d.heads, d.width), perm=[0, 1, 3, 2])
        scores = g.op("MatMul", query, key)
        if bias:
            scores = g.op("Add", scores, getattr(d, bias))
        weights = g.op("Softmax", scores, axis=-1)
        return _join(g, g.op("MatMul", weights, _split(g, d.v, d.heads, d.width)))

    return build


def _attention_repeating(g: Graph, d: Any) -> Operand:
    """Keys and values repeated for each query head of their group."""
    times = d.heads // d.shared

    def repeated(value: Operand) -> Operand:
        apart = g.op("Unsqueeze", _split(g, value, d.shared, d.width), _ints(2))
        many = g.op("Expand", apart, _ints(1, 1, times, 1, 1))
        return str(g.op("Reshape", many, _ints(0, d.heads, -1, d.width)))

    query = _split(g, d.q, d.heads, d.width)
    return _join(g, g.op("Attention", query, repeated(d.k), repeated(d.v), d.mask))


# --- one more token over a cache -----------------------------------------------------------------


def _cache_data(
    random: Any, batch: int, past: int, heads: int, width: int, capacity: int
) -> SimpleNamespace:
    d = _attention_data(random, batch, 1, heads, width)
    total = past + 1
    buffers = [np.zeros((batch, heads, capacity, width), np.float32) for _ in range(2)]
    for buffer in buffers:
        buffer[:, :, :past] = _normal(random, batch, heads, past, width)
    d.past = [Fed("BHPD", buffer[:, :, :past].copy()) for buffer in buffers]
    d.buffers = [Fed("BHPD", buffer) for buffer in buffers]
    d.mask = Fed("B1ST", np.ones((batch, 1, 1, total), bool))
    d.bias = Fed("B1ST", np.zeros((batch, 1, 1, total), np.float32))
    d.last = Fed("B", np.full(batch, past, np.int32))
    d.total = Fed("", np.array(total, np.int32))
    return d


def _cached_attention(g: Graph, d: Any) -> Operand:
    heads = {"q_num_heads": d.heads, "kv_num_heads": d.heads}
    made = g.op("Attention", d.q, d.k, d.v, d.mask, *d.past, outputs=3, **heads)
    g.keep(*made[1:])
    return str(made[0])


def _cached_concat(g: Graph, d: Any) -> Operand:
    new = [_split(g, value, d.heads, d.width) for value in (d.k, d.v)]
    present = [g.op("Concat", past, value, axis=2) for past, value in zip(d.past, new)]
    g.keep(*present)
    return _join(g, g.op("Attention", _split(g, d.q, d.heads, d.width), *present, d.mask))


def _cached_multi_head(g: Graph, d: Any) -> Operand:
    kind = "com.microsoft.MultiHeadAttention"
    inputs = (d.q, d.k, d.v, None, None, d.bias, *d.past)
    made = g.op(kind, *inputs, outputs=3, num_heads=d.heads)
    g.keep(*made[1:])
    return str(made[0])


def _cached_group_query(share: bool, bias: bool = True) -> Build:
    def build(g: Graph, d: Any) -> Operand:
        past = d.buffers if share else d.past
        masks = [None, None, None, d.bias] if bias else []
        made = g.op(
            "com.microsoft.GroupQueryAttention",
            *(d.q, d.k, d.v, *past, d.last, d.total, *masks),
            outputs=3,
            num_heads=d.heads,
            kv_num_heads=d.heads,
        )
        g.keep(*made[1:])
        if share:
            for buffer, present in zip(past, made[1:]):
                g.share(buffer, present)
        return str(made[0])

    return build


# --- linear layers -------------------------------------------------------------------------------


def _linear_data(random: Any, batch: int, rows: int, inputs: int, outputs: int) -> SimpleNamespace:
    return SimpleNamespace(
        weight=_normal(random, inputs, outputs, scale=inputs**-0.5),
        bias=_normal(random, outputs, scale=0.1),
        x=Fed("BSE", _normal(random, batch, rows, inputs)),
    )


def _rows_data(random: Any, rows: int, inputs: int, outputs: int) -> SimpleNamespace:
    return _linear_data(random, 1, rows, inputs, outputs)


def _int8_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return int8 values (in, out) and one scale per output."""
    scale = np.abs(weight).max(axis=0) / 127
    return np.round(weight / scale).astype(np.int8), scale.astype(np.float32)


def _quantized(g: Graph, x: Operand) -> list[str]:
    return list(g.op("DynamicQuantizeLinear", x, outputs=3))


def _int8_product(g: Graph, rounded: list[str], weight: np.ndarray, bias: np.ndarray) -> str:
    values, scale = _int8_weight(weight)
    number, x_scale, zero_point = rounded
    product = g.op("Cast", g.op("MatMulInteger", number, values, zero_point), to=_FLOAT)
    return str(g.op("Add", g.op("Mul", product, g.op("Mul", x_scale, scale)), bias))


def _linear(g: Graph, d: Any) -> Operand:
    return g.op("Add", g.op("MatMul", d.x, d.weight), d.bias)


def _linear_int8(g: Graph, d: Any) -> Operand:
    return _int8_product(g, _quantized(g, d.x), d.weight, d.bias)


_STEP = np.float32(10 / 255)  # of inputs that are normal


def _linear_fixed(kind: type = np.uint8) -> Build:
    def build(g: Graph, d: Any) -> Operand:
        values, scale = _int8_weight(d.weight)
        step = np.array(_STEP)
        zero: np.ndarray = np.array(128 if kind == np.uint8 else 0, kind)
        rounded = g.op("QuantizeLinear", d.x, step, zero)
        kernel = "com.microsoft.MatMulIntegerToFloat"
        return g.op(kernel, rounded, values, step, scale, zero, None, d.bias)

    return build


def _linear_standard(product: str) -> Build:
    def build(g: Graph, d: Any) -> Operand:
        values, scale = _int8_weight(d.weight)
        step, zero = np.array(_STEP), np.array(128, np.uint8)
        x: Operand = d.x
        if product == "Gemm":
            x = g.op("Reshape", d.x, _ints(-1, len(values)))
        x = g.op("DequantizeLinear", g.op("QuantizeLinear", x, step, zero), step, zero)
        weight = g.op("DequantizeLinear", values, scale, np.zeros(len(scale), np.int8), axis=1)
        bias_steps = np.round(d.bias / (step * scale)).astype(np.int32)
        bias = g.op("DequantizeLinear", bias_steps, step * scale, axis=0)
        if product == "MatMul":
            return g.op("Add", g.op("MatMul", x, weight), bias)
        target = g.op("Concat", g.op("Shape", d.x, end=-1), _ints(len(scale)), axis=0)
        return g.op("Reshape", g.op("Gemm", x, weight, bias), target)

    return build


def _linear_blocks(bits: int, accuracy: int, size: int = 32) -> Build:
    def build(g: Graph, d: Any) -> Operand:
        inputs, outputs = d.weight.shape
        blocks = d.weight.T.reshape(outputs, -1, size)
        zero = 1 << (bits - 1)
        scale = np.abs(blocks).max(axis=-1, keepdims=True) / (zero - 1)
        values = (np.round(blocks / scale) + zero).astype(np.uint8)
        zeros = np.full((outputs, inputs // size), zero, np.uint8)
        if bits == 4:  # two in a byte, the first in the low bits
            values, zeros = (v[..., ::2] | (v[..., 1::2] << 4) for v in (values, zeros))
        return g.op(
            "com.microsoft.MatMulNBits",
            *(d.x, values, scale[..., 0].astype(np.float32), zeros, None, d.bias),
            K=inputs,
            N=outputs,
            bits=bits,
            block_size=size,
            accuracy_level=accuracy,
        )

    return build


def _thirds(array: np.ndarray) -> list[np.ndarray]:
    return [part.copy() for part in np.split(array, 3, axis=-1)]


def _three(g: Graph, d: Any) -> tuple[Operand, ...]:
    pairs = zip(_thirds(d.weight), _thirds(d.bias))
    return tuple(g.op("Add", g.op("MatMul", d.x, weight), bias) for weight, bias in pairs)


def _merged(g: Graph, d: Any) -> tuple[Operand, ...]:
    return tuple(g.op("Split", _linear(g, d), outputs=3, axis=-1, num_outputs=3))


def _three_int8(g: Graph, d: Any) -> tuple[Operand, ...]:
    rounded = _quantized(g, d.x)
    pairs = zip(_thirds(d.weight), _thirds(d.bias))
    return tuple(_int8_product(g, rounded, weight, bias) for weight, bias in pairs)


def _merged_int8(g: Graph, d: Any) -> tuple[Operand, ...]:
    return tuple(g.op("Split", _linear_int8(g, d), outputs=3, axis=-1, num_outputs=3))


def _head_stored_transpose(g: Graph, d: Any) -> Operand:
    return g.op("MatMul", d.x, d.weight)


def _head_transpose(g: Graph, d: Any) -> Operand:
    return g.op("MatMul", d.x, g.op("Transpose", d.weight.T.copy(), perm=[1, 0]))


def _head_gemm(g: Graph, d: Any) -> Operand:
    inputs, outputs = d.weight.shape
    flat = g.op("Reshape", d.x, _ints(-1, inputs))
    product = g.op("Gemm", flat, d.weight.T.copy(), transB=1)
    batch = g.op("Shape", d.x, start=0, end=2)
    return g.op("Reshape", product, g.op("Concat", batch, _ints(outputs), axis=0))


def _head_fused(g: Graph, d: Any) -> Operand:
    return g.op("com.microsoft.FusedMatMul", d.x, d.weight.T.copy(), transB=1)


# --- activations ---------------------------------------------------------------------------------


def _activation_data(random: Any, batch: int, sequence: int, hidden: int) -> SimpleNamespace:
    bias = _normal(random, hidden)
    return SimpleNamespace(bias=bias, x=Fed("BSE", _normal(random, batch, sequence, hidden)))


def _gelu(add: str, form: str = "none") -> Build:
    return lambda g, d: g.op("Gelu", g.op(add, d.x, d.bias), approximate=form)


def _gelu_written_out(g: Graph, d: Any) -> Operand:
    x = g.op("Add", d.x, d.bias)
    curve = g.op("Erf", g.op("Div", x, _scalar(math.sqrt(2))))
    return g.op("Mul", g.op("Mul", x, g.op("Add", curve, _scalar(1))), _scalar(0.5))


def _gelu_tanh_written_out(g: Graph, d: Any) -> Operand:
    x = g.op("Add", d.x, d.bias)
    cube = g.op("Mul", g.op("Pow", x, _scalar(3)), _scalar(0.044715))
    curve = g.op("Tanh", g.op("Mul", g.op("Add", x, cube), _scalar(math.sqrt(2 / math.pi))))
    return g.op("Mul", g.op("Mul", x, _scalar(0.5)), g.op("Add", curve, _scalar(1)))


def _biased(kind: str) -> Build:
    return lambda g, d: g.op(kind, d.x, d.bias)


def _gated(alpha: float) -> Build:
    """x × sigmoid(alpha × x): SiLU where alpha is 1."""

    def build(g: Graph, d: Any) -> Operand:
        inner = d.x if alpha == 1 else g.op("Mul", d.x, _scalar(alpha))
        return g.op("Mul", d.x, g.op("Sigmoid", inner))

    return build


def _quick(alpha: float) -> Build:
    return lambda g, d: g.op("com.microsoft.QuickGelu", d.x, alpha=alpha)


# --- positions and embeddings --------------------------------------------------------------------


def _rotary_data(
    random: Any, batch: int, sequence: int, heads: int, width: int, longest: int
) -> SimpleNamespace:
    frequencies = 10000.0 ** (-np.arange(0, width, 2) / width)
    angles = np.arange(longest)[:, None] * frequencies
    cos, sin = (f(angles).astype(np.float32) for f in (np.cos, np.sin))  # (longest, width / 2)
    start = longest - sequence
    rows = [np.broadcast_to(t[start:], (batch, sequence, width // 2)).copy() for t in (cos, sin)]
    return SimpleNamespace(
        heads=heads,
        width=width,
        x=Fed("BSE", _normal(random, batch, sequence, heads * width)),
        cos=cos,
        sin=sin,
        rows=[Fed("BSh", row) for row in rows],
        positions=Fed("BS", np.tile(np.arange(start, longest), (batch, 1))),
    )


def _rotary_rows(g: Graph, d: Any) -> Operand:
    return g.op("RotaryEmbedding", d.x, *d.rows, num_heads=d.heads)


def _rotary_tables(g: Graph, d: Any) -> Operand:
    return g.op("RotaryEmbedding", d.x, d.cos, d.sin, d.positions, num_heads=d.heads)


def _rotary_contrib(g: Graph, d: Any) -> Operand:
    kind = "com.microsoft.RotaryEmbedding"
    return g.op(kind, d.x, d.positions, d.cos, d.sin, num_heads=d.heads)


def _rotary_written_out(g: Graph, d: Any) -> Operand:
    x = _split(g, d.x, d.heads, d.width)
    cos, sin = (g.op("Unsqueeze", g.op("Concat", rows, rows, axis=-1), _ints(1)) for rows in d.rows)
    left, right = g.op("Split", x, outputs=2, axis=-1, num_outputs=2)
    turned = g.op("Concat", g.op("Neg", right), left, axis=-1)
    return _join(g, g.op("Add", g.op("Mul", x, cos), g.op("Mul", turned, sin)))


def _embedding_data(
    random: Any, batch: int, sequence: int, vocabulary: int, longest: int, hidden: int
) -> SimpleNamespace:
    sizes = {"words": vocabulary, "positions": longest, "types": 2}
    tables = {name: _normal(random, size, hidden) for name, size in sizes.items()}
    scale, bias = _normal(random, hidden), _normal(random, hidden)
    ids = random.integers(0, vocabulary, (batch, sequence))
    types = np.zeros((batch, sequence), np.int64)
    places = np.tile(np.arange(sequence), (batch, 1))
    return SimpleNamespace(
        **tables,
        scale=scale,
        bias=bias,
        wide=[Fed("BS", array) for array in (ids, places, types)],
        ids=[Fed("BS", array.astype(np.int32)) for array in (ids, types)],
    )


def _embedding(add: str, apart: bool = False) -> Build:
    def build(g: Graph, d: Any) -> Operand:
        tables = (d.words, d.positions, d.types)
        words, places, types = (g.op("Gather", t, ids) for t, ids in zip(tables, d.wide))
        both = SimpleNamespace(**{**vars(d), "x": g.op("Add", words, types), "y": places})
        return (_layer_norm_apart if apart else _layer_norm(add))(g, both)

    return build


def _embedding_fused(g: Graph, d: Any) -> Operand:
    inputs = (*d.ids, d.words, d.positions, d.types, d.scale, d.bias)
    made = g.op("com.microsoft.EmbedLayerNormalization", *inputs, outputs=2, epsilon=1e-5)
    return str(made[0])


# --- the choices ---------------------------------------------------------------------------------


def _both(name: str) -> dict[str, str]:
    return {"cpu": name, "cuda": name}


_TEXTS = ((8, 128), (1, 32))
_HIDDEN = {"hidden": 384}
_HEADS = {"heads": 12, "width": 32}
_QKV = {"inputs": 384, "outputs": 1152}

CHOICES = (
    Choice(
        "residual before LayerNormalization",
        _residual_data,
        "batch × length",
        _TEXTS,
        (2, 5),
        {
            "Add, LayerNormalization": Alternative(_layer_norm("Add")),
            "Sum, LayerNormalization": Alternative(_layer_norm("Sum")),
            "Add, LayerNormalization between reshapes": Alternative(_layer_norm_apart),
            "SkipLayerNormalization": Alternative(_skip_norm),
        },
        {
            "cpu": "Add, LayerNormalization between reshapes",
            "cuda": "Add, LayerNormalization",
        },
        widths=_HIDDEN,
    ),
    Choice(
        "residual that goes on, LayerNormalization",
        _residual_data,
        "batch × length",
        ((1, 1), *_TEXTS),
        (2, 5),
        {
            "Add, LayerNormalization": Alternative(_layer_norm_keeping("Add")),
            "Sum, LayerNormalization": Alternative(_layer_norm_keeping("Sum")),
            "SkipLayerNormalization": Alternative(_skip_norm_keeping),
        },
        _both("Add, LayerNormalization"),
        widths={"hidden": 768},
    ),
    Choice(
        "residual that goes on, RMSNormalization",
        _residual_data,
        "batch × length",
        ((1, 1), *_TEXTS),
        (2, 5),
        {
            "Add, RMSNormalization": Alternative(_rms_norm("Add")),
            "Sum, RMSNormalization": Alternative(_rms_norm("Sum")),
            "Add, SimplifiedLayerNormalization": Alternative(
                _rms_norm("Add", "SimplifiedLayerNormalization")
            ),
            "Sum, SimplifiedLayerNormalization": Alternative(
                _rms_norm("Sum", "SimplifiedLayerNormalization")
            ),
            "SkipSimplifiedLayerNormalization": Alternative(_rms_norm_skip),
            "written out": Alternative(_rms_norm_written_out),
        },
        _both("Add, RMSNormalization"),
        widths={"hidden": 768},
    ),
    Choice(
        "attention, no padding",
        _attention_data,
        "batch × length",
        (*_TEXTS, (8, 512)),
        (2, 5),
        {
            "Attention": Alternative(_attention(None)),
            "MultiHeadAttention": Alternative(_multi_head()),
            "GroupQueryAttention": Alternative(_group_query(None)),
            "written out": Alternative(_attention_written_out(None)),
        },
        _both("Attention"),
        copies=2,
        widths=_HEADS,
    ),
    Choice(
        "attention, padded",
        _attention_data,
        "batch × length",
        (*_TEXTS, (8, 512)),
        (3, 5),
        {
            "Attention, mask": Alternative(_attention("mask")),
            "Attention, bias": Alternative(_attention("bias")),
            "MultiHeadAttention, key padding": Alternative(_multi_head(keys="keys")),
            "MultiHeadAttention, bias": Alternative(_multi_head(bias="bias")),
            "GroupQueryAttention, bias": Alternative(_group_query("bias")),
            "written out, bias of one row": Alternative(_attention_written_out("row_bias")),
        },
        _both("Attention, mask"),
        copies=2,
        widths=_HEADS,
    ),
    Choice(
        "attention, heads in groups",
        _attention_data,
        "batch × length",
        _TEXTS,
        (3, 5),
        {
            "Attention": Alternative(_attention("mask")),
            "Attention on repeated keys and values": Alternative(_attention_repeating),
            "GroupQueryAttention, bias": Alternative(_group_query("bias")),
        },
        _both("Attention"),
        widths={"heads": 12, "width": 64, "shared": 4},
    ),
    Choice(
        "one token over a cache",
        _cache_data,
        "batch × past",
        ((1, 32), (1, 160), (1, 512)),
        (2, 7),
        {
            "Concat, Attention": Alternative(_cached_concat),
            "Attention with past": Alternative(_cached_attention),
            "MultiHeadAttention with past": Alternative(_cached_multi_head),
            "GroupQueryAttention, copying": Alternative(_cached_group_query(False)),
            "GroupQueryAttention in place": Alternative(_cached_group_query(True)),
            "GroupQueryAttention in place, no bias": Alternative(_cached_group_query(True, False)),
        },
        _both("GroupQueryAttention in place"),
        widths={"heads": 12, "width": 64, "capacity": 1024},
    ),
    Choice(
        "queries, keys and values, float",
        _linear_data,
        "batch × length",
        ((1, 1), *_TEXTS),
        (2, 5),
        {"three products": Alternative(_three), "one product, Split": Alternative(_merged)},
        _both("three products"),
        widths=_QKV,
    ),
    Choice(
        "queries, keys and values, int8",
        _linear_data,
        "batch × length",
        ((1, 1), *_TEXTS),
        (2, 5),
        {
            "three products": Alternative(_three_int8),
            "one product, Split": Alternative(_merged_int8),
        },
        _both("three products"),
        widths=_QKV,
    ),
    Choice(
        "linear layer, fixed steps",
        _rows_data,
        "rows",
        ((1,), (32,), (1024,)),
        (5,),
        {
            "QuantizeLinear, MatMulIntegerToFloat": Alternative(_linear_fixed()),
            "the same, int8 inputs": Alternative(_linear_fixed(np.int8), 0.02),
            "QuantizeLinear, DequantizeLinear, Gemm": Alternative(_linear_standard("Gemm"), 1e-3),
            "the same, MatMul and Add": Alternative(_linear_standard("MatMul"), 1e-3),
            "DynamicQuantizeLinear, MatMulInteger": Alternative(_linear_int8, 0.05),
        },
        {
            "cpu": "QuantizeLinear, MatMulIntegerToFloat",
            "cuda": "QuantizeLinear, DequantizeLinear, Gemm",
        },
        widths={"inputs": 384, "outputs": 1536},
    ),
    Choice(
        "linear layer, fewer bits",
        _rows_data,
        "rows",
        ((1,), (32,), (1024,)),
        (5,),
        {
            "MatMul": Alternative(_linear),
            "DynamicQuantizeLinear, MatMulInteger": Alternative(_linear_int8, 0.05),
            "MatMulNBits, 8 bit, accuracy 4": Alternative(_linear_blocks(8, 4), 0.03),
            "MatMulNBits, 8 bit, accuracy 0": Alternative(_linear_blocks(8, 0), 0.03),
            "MatMulNBits, 4 bit, accuracy 4": Alternative(_linear_blocks(4, 4), 0.2),
            "MatMulNBits, 4 bit, accuracy 0": Alternative(_linear_blocks(4, 0), 0.2),
        },
        {},  # the user's: each has its own precision
        widths={"inputs": 768, "outputs": 3072},
    ),
    Choice(
        "GELU with its bias, exact",
        _activation_data,
        "batch × length",
        ((1, 1), *_TEXTS),
        (2, 5),
        {
            "Add, Gelu": Alternative(_gelu("Add")),
            "Sum, Gelu": Alternative(_gelu("Sum")),
            "BiasGelu": Alternative(_biased("com.microsoft.BiasGelu")),
            "written out": Alternative(_gelu_written_out),
        },
        _both("Add, Gelu"),
        widths={"hidden": 1536},
    ),
    Choice(
        "GELU with its bias, by tanh",
        _activation_data,
        "batch × length",
        ((1, 1), *_TEXTS),
        (2, 5),
        {
            "Add, Gelu": Alternative(_gelu("Add", "tanh")),
            "Sum, Gelu": Alternative(_gelu("Sum", "tanh")),
            "FastGelu": Alternative(_biased("com.microsoft.FastGelu")),
            "written out": Alternative(_gelu_tanh_written_out),
        },
        _both("Add, Gelu"),
        widths={"hidden": 3072},
    ),
    Choice(
        "x × sigmoid(1.702 x)",
        _activation_data,
        "batch × length",
        ((1, 1), *_TEXTS),
        (2, 5),
        {
            "Mul, Sigmoid, Mul": Alternative(_gated(1.702)),
            "QuickGelu": Alternative(_quick(1.702)),
        },
        _both("QuickGelu"),
        widths={"hidden": 2048},
    ),
    Choice(
        "SiLU",
        _activation_data,
        "batch × length",
        ((1, 1), *_TEXTS),
        (2, 5),
        {"Sigmoid, Mul": Alternative(_gated(1.0)), "QuickGelu": Alternative(_quick(1.0))},
        _both("Sigmoid, Mul"),
        widths={"hidden": 2048},
    ),
    Choice(
        "rotary embedding",
        _rotary_data,
        "batch × length",
        ((1, 1), *_TEXTS),
        (2, 5),
        {
            "RotaryEmbedding, a row per token": Alternative(_rotary_rows),
            "RotaryEmbedding, tables": Alternative(_rotary_tables),
            "com.microsoft RotaryEmbedding": Alternative(_rotary_contrib),
            "written out": Alternative(_rotary_written_out),
        },
        _both("RotaryEmbedding, a row per token"),
        widths={"heads": 12, "width": 64, "longest": 512},
    ),
    Choice(
        "embeddings and LayerNormalization",
        _embedding_data,
        "batch × length",
        _TEXTS,
        (2, 5),
        {
            "Gather, Add, LayerNormalization": Alternative(_embedding("Add")),
            "Gather, Add, Sum, LayerNormalization": Alternative(_embedding("Sum")),
            "Gather, Add, LayerNormalization between reshapes": Alternative(
                _embedding("Add", apart=True)
            ),
            "EmbedLayerNormalization": Alternative(_embedding_fused),
        },
        {
            "cpu": "Gather, Add, LayerNormalization between reshapes",
            "cuda": "Gather, Add, LayerNormalization",
        },
        copies=1,
        widths={"vocabulary": 8192, "longest": 512, "hidden": 384},
    ),
    Choice(
        "logits by a tied table",
        _rows_data,
        "rows",
        ((1,), (32,), (1024,)),
        (5,),
        {
            "MatMul by a stored transpose": Alternative(_head_stored_transpose),
            "Transpose, MatMul": Alternative(_head_transpose),
            "Gemm, transB": Alternative(_head_gemm),
            "FusedMatMul, transB": Alternative(_head_fused),
        },
        _both("Transpose, MatMul"),
        copies=1,
        widths={"inputs": 384, "outputs": 16384},
    ),
)
