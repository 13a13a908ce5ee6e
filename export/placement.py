"""Where and how ONNX Runtime really runs a graph: provider, kernel and time of every node."""

import contextlib
import json
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch
from torch import Tensor

from calib_data.errors import ModelError, ProviderError
from compress.signature import Input, Kind, Signature
from export.bundle import open_bundle
from export.sessions import PROVIDERS, call, complete_feed, open_session, provider_options

SHAPE = (8, 128)  # (batch, length) of the samples; a model with fewer positions gets as many
RUNS = 5  # counted per sample, after one that is not
_NAMED = 10  # nodes in an error's one line
_PRODUCTS = ("MatMul", "Gemm", "Conv", "Attention", "Einsum")  # parts of their operators' names
_COPIES = ("MemcpyToHost", "MemcpyFromHost")
_CONTROL = ("If", "Loop", "Scan")  # the profiler counts the nodes inside again
# operators of ai.onnx that stand for several of its older ones; those of other domains all do
_FUSED = ("Attention", "Gelu", "LayerNormalization", "RMSNormalization", "RotaryEmbedding")


@dataclass(frozen=True)
class PlacedNode:
    """One node of the optimized graph."""

    name: str
    operator: str  # with its domain, but for ai.onnx's
    provider: str | None = None  # None: no sample came by
    kernel: str | None = None  # the operator with the types of its inputs, which choose the kernel
    seconds: Mapping[str, float] = field(default_factory=dict)  # of one run, by sample

    @property
    def multiplies(self) -> bool:
        """Whether it is a matrix product, or several."""
        return any(part in self.operator for part in _PRODUCTS)

    @property
    def fused(self) -> bool:
        """Whether it does the work of several operators."""
        return "." in self.operator or self.operator in _FUSED


@dataclass(frozen=True)
class OperatorUse:
    """What the nodes of one operator on one provider come to."""

    operator: str
    provider: str | None
    nodes: int
    share: Mapping[str, float]  # of the time of all nodes, by sample


@dataclass(frozen=True)
class Placement:
    """A graph as ONNX Runtime runs it at its default optimization level.

    CUDA works on its own: a node's time there is what the host spends on it, waiting included.
    """

    samples: Mapping[str, Mapping[str, Sequence[int]]]  # shapes of the inputs, by sample
    nodes: tuple[PlacedNode, ...]

    @property
    def operators(self) -> list[OperatorUse]:
        """The operators, the most costly first."""
        groups: dict[tuple[str, str | None], list[PlacedNode]] = defaultdict(list)
        for node in self.nodes:
            groups[node.operator, node.provider].append(node)
        whole = {name: _spent(self.nodes, name) or 1.0 for name in self.samples}
        uses = [
            OperatorUse(*key, len(nodes), {n: _spent(nodes, n) / whole[n] for n in whole})
            for key, nodes in groups.items()
        ]
        return sorted(uses, key=lambda use: (-sum(use.share.values()), use.operator))

    @property
    def fused(self) -> dict[str, int]:
        """How many nodes of each fused operator there are."""
        names = [node.operator for node in self.nodes if node.fused]
        return {name: names.count(name) for name in sorted(set(names))}

    @property
    def copies(self) -> int:
        """How many nodes copy between devices."""
        return sum(node.operator in _COPIES for node in self.nodes)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON gives it back."""
        return {
            "samples": {name: dict(shapes) for name, shapes in self.samples.items()},
            "operators": [vars(use) for use in self.operators],
            "fused": self.fused,
            "copies": self.copies,
            "nodes": [vars(node) for node in self.nodes],
        }


def _spent(nodes: Iterable[PlacedNode], sample: str) -> float:
    return sum(node.seconds.get(sample, 0.0) for node in nodes)


def stray_products(nodes: Iterable[PlacedNode], provider: str) -> list[PlacedNode]:
    """Return the matrix products that run, but not on `provider`."""
    strays = (None, PROVIDERS[provider])
    return [node for node in nodes if node.multiplies and node.provider not in strays]


def require_products(placements: Mapping[str, Placement], provider: str) -> None:
    """Raise `ProviderError` naming the matrix products that run on another provider."""
    strays = [
        f"{graph}: {node.name} ({node.operator})"
        for graph, placement in placements.items()
        for node in stray_products(placement.nodes, provider)
    ]
    if strays:
        more = f" and {len(strays) - _NAMED} more" if len(strays) > _NAMED else ""
        raise ProviderError(
            f"{len(strays)} matrix products do not run on {PROVIDERS[provider]}: "
            f"{', '.join(strays[:_NAMED])}{more}; export with --target {provider}"
        )


def inspect_graphs(
    path: Path,
    provider: str = "cpu",
    shape: tuple[int, int] = SHAPE,
    threads: int | None = None,
) -> dict[str, Placement]:
    """Return the placement of every graph of a bundle, or of one `.onnx` file, by name.

    Raises `ProviderError` where the provider is not obtained, `ModelError` where a graph does not run.
    """
    return {
        name: _inspect(graph, signature, provider, shape, threads)
        for name, (graph, signature) in _graphs(path).items()
    }


def _graphs(path: Path) -> dict[str, tuple[Path, Signature | None]]:
    """Return the graphs by name, each with its signature if that is known."""
    if not path.is_file():
        return {
            name: (graph.path, graph.signature) for name, graph in open_bundle(path).graphs.items()
        }
    with contextlib.suppress(ModelError):  # the file may lie anywhere
        for name, graph in open_bundle(path.parent).graphs.items():
            if graph.path.samefile(path):
                return {name: (path, graph.signature)}
    return {path.stem: (path, None)}


def _inspect(
    path: Path,
    signature: Signature | None,
    provider: str,
    shape: tuple[int, int],
    threads: int | None,
) -> Placement:
    """Open the graph with the profiler, run samples, and read what it wrote."""
    session = open_session(path, provider, threads)
    samples = _samples(signature or _guessed(session), shape)
    options = session.get_session_options()
    del session  # it held the weights; the one to come does again
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder, "optimized.onnx")
        options.optimized_model_filepath = str(optimized)
        for key, value in (("file_name", "weights"), ("min_size_in_bytes", "1024")):
            options.add_session_config_entry(
                f"session.optimized_model_external_initializers_{key}", value
            )
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder, "profile"))
        session = ort.InferenceSession(str(path), options, provider_options(provider))
        feeds = {name: complete_feed(session, sample) for name, sample in samples.items()}
        try:
            for feed in feeds.values():
                for _ in range(1 + RUNS):
                    call(session, feed)
        except Exception as error:  # the pybind exceptions have no common base
            raise ModelError(
                f"{path} does not run on a sample of {shape[0]} × {shape[1]}: "
                f"{str(error).splitlines()[0][:200]}; try another --batch or --length"
            ) from error
        events = json.loads(Path(session.end_profiling()).read_text())
        graph = onnx.load(optimized, load_external_data=False).graph
    shapes = {n: {k: list(v.shape) for k, v in feed.items()} for n, feed in feeds.items()}
    return Placement(shapes, tuple(_placed(events, list(_nodes(graph)), tuple(feeds))))


def _placed(
    events: Iterable[Mapping[str, Any]], nodes: Sequence[onnx.NodeProto], samples: Sequence[str]
) -> Iterator[PlacedNode]:
    """Yield the nodes that the profiler saw, in the order of their first run, then the others.

    It gives nodes without a name one of its own, and tells no node's domain.
    """
    starts = sorted(event["ts"] for event in events if event["name"] == "model_run")
    named = {(node.name, node.op_type): node.domain for node in nodes}
    any_of = {node.op_type: node.domain for node in nodes}
    seen: dict[tuple[str, str], Mapping[str, Any]] = {}
    spent: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in sorted(events, key=lambda event: event["ts"]):
        if event["cat"] != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        key = (event["name"].removesuffix("_kernel_time"), event["args"]["op_name"])
        seen.setdefault(key, event["args"])
        sample, run = divmod(bisect_right(starts, event["ts"]) - 1, 1 + RUNS)
        if run > 0 and key[1] not in _CONTROL:
            spent[key][samples[sample]] += event["dur"] / 1e6 / RUNS
    for key, told in seen.items():
        kinds = [kind for value in told["input_type_shape"] for kind in value]
        operator = _operator(named.get(key, any_of.get(key[1], "")), key[1])
        kernel = f"{operator}({', '.join(kinds)})"
        yield PlacedNode(key[0], operator, told["provider"], kernel, dict(spent[key]))
    for node in nodes:
        if node.name and (node.name, node.op_type) not in seen:
            yield PlacedNode(node.name, _operator(node.domain, node.op_type))


def _operator(domain: str, op_type: str) -> str:
    return op_type if domain in ("", "ai.onnx") else f"{domain}.{op_type}"


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph and of the graphs inside them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _samples(signature: Signature, shape: tuple[int, int]) -> dict[str, dict[str, Tensor]]:
    """Return inputs by the sample's name; with a cache, a prompt and the step after it."""
    batch, length = shape
    length = min(length, signature.longest or length)
    if not signature.has_past:
        return {"sample": _typed(signature, signature.sample(batch, length))}
    return {
        "prompt": _typed(signature, signature.sample(batch, length)),
        "step": _typed(signature, signature.sample(batch, 1, past=length - 1)),
    }


def _typed(signature: Signature, sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the sample in the signature's dtypes."""
    kinds = {item.name: getattr(torch, item.dtype) for item in signature.inputs}
    return {name: value.to(kinds[name]) for name, value in sample.items()}


# the names that exporters give inputs → what they hold, and the axes that may be dynamic
_BY_NAME: dict[str, tuple[Kind, dict[int, str]]] = {
    "input_ids": ("ids", {0: "batch", 1: "sequence"}),
    "decoder_input_ids": ("ids", {0: "batch", 1: "sequence"}),
    "attention_mask": ("mask", {0: "batch", 1: "total_sequence"}),
    "encoder_attention_mask": ("mask", {0: "batch", 1: "encoder_sequence"}),
    "token_type_ids": ("types", {0: "batch", 1: "sequence"}),
    "position_ids": ("positions", {0: "batch", 1: "sequence"}),
    "pixel_values": ("pixels", {0: "batch"}),
    "encoder_hidden_states": ("hidden", {0: "batch", 1: "encoder_sequence"}),
    "past_key_values": ("past", {0: "batch", 2: "past_sequence"}),
    "use_cache_branch": ("flag", {}),
}
_DTYPES = {"float": "float32", "double": "float64"}  # where ONNX Runtime and PyTorch differ


def _guessed(session: ort.InferenceSession) -> Signature:
    """Return the signature of a graph that comes with none, by the usual names of its inputs.

    An input with a name of its own gets ones, and one for its dynamic axes but the first.
    """
    inputs, examples = [], []
    for item in session.get_inputs():
        kind, axes = _BY_NAME.get(item.name.split(".")[0], ("example", {0: "batch"}))
        if ".encoder." in item.name:
            axes = {0: "batch", 2: "encoder_sequence"}
        shape = tuple(size if isinstance(size, int) else 1 for size in item.shape)
        dynamic = tuple((i, a) for i, a in axes.items() if not isinstance(item.shape[i], int))
        dtype = item.type.removeprefix("tensor(").removesuffix(")")
        inputs.append(Input(item.name, kind, dynamic, shape, _DTYPES.get(dtype, dtype)))
        examples.append(torch.ones(shape, dtype=getattr(torch, inputs[-1].dtype)))
    # three ids of which the first is padding: every vocabulary has them
    return Signature(tuple(inputs), (), vocabulary=3, examples=tuple(examples))
