"""How each runtime is described (in the parent) and opened (in the worker).

A new baseline is one more row of `RUNTIMES`. Nothing heavy is imported until a function is called:
the memory of an ONNX worker must not hold PyTorch.
"""

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from calib_data.errors import ConfigError, ProviderError

Arrays = Mapping[str, np.ndarray]
NEW = "new_tokens"  # the input that asks for so many tokens after a prompt


@dataclass(frozen=True)
class Tokens:
    """What was generated, (batch, new)."""

    tokens: np.ndarray


@dataclass(frozen=True)
class GraphUse:
    """What ONNX Runtime makes of a graph."""

    operators: Mapping[str, float]  # seconds of a run by operator, the costliest first
    providers: Mapping[str, int]  # nodes on each
    copies: int  # nodes that carry data between host and device


@dataclass(frozen=True)
class Source:
    """What is known of a variant before it runs."""

    task: str
    signature: Any  # compress.signature.Signature; None for a graph of another tool's
    processor: Any
    max_length: int | None
    lineage: tuple[Mapping[str, Any], ...]
    size_bytes: int
    sha256: Mapping[str, str]  # per weight file
    output: str | None = None  # the output that the task is about
    labels: tuple[str, ...] = ()  # a classifier's class names, in order
    # hidden states (batch, sequence, width) and mask → what a sentence encoder makes of them
    head: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None

    @property
    def foreign(self) -> bool:
        """Whether it is another tool's, which says nothing of what its inputs mean."""
        return self.signature is None


@dataclass(frozen=True)
class Place:
    """Where a model runs, and what of a call counts."""

    provider: str = "cpu"
    threads: int = 1  # of all calls together
    streams: int = 1  # calls at once
    transfers: bool = (
        False  # whether a device's calls carry inputs and outputs from and to the host
    )
    graphs: bool = (
        False  # whether CUDA records the kernels of each input and launches them together
    )

    @property
    def device(self) -> str:
        """The device of the provider, as PyTorch and ONNX Runtime call it."""
        return "cpu" if self.provider == "cpu" else "cuda"


@dataclass(frozen=True)
class Loaded:
    """A model ready to run; only `run` is timed."""

    prepare: Callable[[Arrays], Any]  # arrays → what `run` takes
    run: Callable[[Any], Any]
    collect: Callable[[Any], Arrays]  # what `run` returned → arrays by name
    providers: tuple[str, ...]
    generate: Callable[[Any], Tokens] | None = None  # for what `prepare` made with NEW in it


@dataclass(frozen=True)
class Runtime:
    """What to know about a runtime."""

    describe: Callable[[str], Source]
    open: Callable[[str, Place], Loaded]
    inspect: Callable[[str, Place, tuple[int, int]], GraphUse] | None = None  # at (batch, length)


def find_runtime(name: str) -> Runtime:
    """Return the runtime called `name`: a row of `RUNTIMES`, or `package.module:attribute`."""
    if name in RUNTIMES:
        return RUNTIMES[name]
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"runtime {name!r} is unknown; use one of {', '.join(RUNTIMES)}"
        ) from error


def _describe_checkpoint(model: str) -> Source:
    from compress.checkpoint import weights_of, weights_sha256
    from compress.loading import open_checkpoint

    checkpoint = open_checkpoint(model)
    # The weights' own bytes: a hub id or a factory has no file of its own to weigh.
    tensors = weights_of(checkpoint.module).values()
    return Source(
        task=checkpoint.task,
        signature=checkpoint.signature,
        processor=checkpoint.processor,
        max_length=checkpoint.max_length,
        lineage=tuple(checkpoint.lineage),
        size_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        sha256={"weights": weights_sha256(checkpoint.module)},
        output=checkpoint.output,
        labels=_labels(getattr(checkpoint.config, "id2label", None)),
        head=partial(_pooled, checkpoint) if checkpoint.task == "sentence-embedding" else None,
    )


def _pooled(checkpoint: Any, hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    import torch

    with torch.inference_mode():
        made = checkpoint.module.embed(torch.from_numpy(hidden), torch.from_numpy(mask.copy()))
    return np.asarray(made.float().cpu())


def _open_checkpoint(model: str, place: Place, compiled: bool = False) -> Loaded:
    import torch

    torch.set_num_threads(max(1, place.threads // place.streams))  # each call has its own
    torch.set_num_interop_threads(1)
    from compress.loading import open_checkpoint

    checkpoint = open_checkpoint(model)
    device = place.device
    if device == "cuda" and not torch.cuda.is_available():
        raise ProviderError("PyTorch finds no CUDA device; use --provider cpu")
    checkpoint.module.to(device)
    if compiled:  # at the first call of each kind of input: warming up takes minutes
        checkpoint.module.compile()

    def prepare(batch: Arrays) -> Any:
        # copied: PyTorch warns of arrays that it may not write to
        tensors = {name: torch.from_numpy(array.copy()) for name, array in batch.items()}
        return tensors if place.transfers else {k: v.to(device) for k, v in tensors.items()}

    def run(batch: Any) -> Any:
        with torch.inference_mode():
            outputs = checkpoint.forward({name: value.to(device) for name, value in batch.items()})
            if place.transfers:
                return {name: value.cpu() for name, value in outputs.items()}
        if device == "cuda":
            torch.cuda.synchronize()
        return outputs

    return Loaded(
        prepare=prepare,
        run=run,
        collect=lambda outputs: {k: v.float().cpu().numpy() for k, v in outputs.items()},
        generate=lambda batch: _continued(checkpoint, batch),
        providers=(f"torch:{device}{', compiled' if compiled else ''}",),
    )


def _continued(checkpoint: Any, batch: Mapping[str, Any]) -> Tokens:
    """Return greedy tokens after a prompt, the end token ignored."""
    import torch

    device = next(checkpoint.module.parameters()).device
    ids, new = batch["input_ids"].to(device), int(batch[NEW])
    with torch.inference_mode():
        made = checkpoint.backbone.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
    return Tokens(made[:, ids.shape[1] :].cpu().numpy())


def _describe_graph(model: str) -> Source:
    from export.bundle import open_bundle

    if Path(model).is_file():
        return _describe_foreign(Path(model))
    bundle = open_bundle(model)
    bundle.verify()
    graph = bundle.graph
    config = bundle.path / "config.json"
    settings = json.loads(config.read_text()) if config.is_file() else {}
    return Source(
        task=bundle.task,
        signature=graph.signature,
        processor=bundle.processor,
        max_length=bundle.max_length,
        lineage=tuple(bundle.lineage),
        size_bytes=graph.size_bytes,
        sha256={name: file.sha256 for name, file in graph.files.items()},
        output=graph.output,
        labels=_labels(settings.get("id2label")),
    )


def _describe_foreign(path: Path) -> Source:
    """Return what a graph by another tool tells of itself, which is little."""
    from compress.files import sha256_file
    from export.bundle import external_files, read_graph

    files = (path, *external_files(read_graph(path), path))
    return Source(
        task="",
        signature=None,
        processor=None,
        max_length=None,
        lineage=({"stage": "foreign", "model": path.name},),
        size_bytes=sum(file.stat().st_size for file in files),
        sha256={file.name: sha256_file(file) for file in files},
    )


def _open_graph(model: str, place: Place) -> Loaded:
    from benchmarks.bound import GRAPHS, BoundSession
    from export.sessions import call, complete_feed, open_session, widened

    path = Path(model)
    file = path / "model.onnx" if path.is_dir() else path
    settings = GRAPHS if place.graphs else None
    # calls at once share the session's threads, which each joins with its own
    threads = max(1, place.threads - place.streams + 1)
    session = open_session(file, place.provider, threads, settings=settings)
    names = [item.name for item in session.get_outputs()]
    half = {item.name for item in session.get_inputs() if item.type == "tensor(float16)"}

    def complete(batch: Arrays) -> Arrays:  # all variants get one sample, whatever their precision
        cast = {k: v.astype(np.float16) if k in half else v for k, v in batch.items()}
        return complete_feed(session, cast)

    def collect(outputs: Any) -> Arrays:
        return {name: widened(value) for name, value in zip(names, outputs, strict=True)}

    on_host = place.device == "cpu" or place.transfers
    bound = None if on_host else BoundSession(session, place.device, place.graphs)

    def prepare(batch: Arrays) -> Any:
        feed = complete(batch)
        return bound.prepare(feed) if bound else feed

    decoding: list[Any] = []  # opened when tokens are first asked for

    def generate(batch: Arrays) -> Tokens:
        from transformers import GenerationConfig

        from export.bundle import open_bundle
        from export.generate import generate, open_decoding

        if not decoding:
            decoding.append(open_decoding(open_bundle(path), place.provider, place.threads))
        settings = GenerationConfig(max_new_tokens=int(batch[NEW]), pad_token_id=0)
        made = generate(decoding[0], batch["input_ids"].tolist(), settings)
        return Tokens(np.array(made.tokens))

    return Loaded(
        prepare=lambda batch: batch if NEW in batch else prepare(batch),
        run=bound.run if bound else lambda feed: call(session, feed),
        generate=generate if path.is_dir() else None,
        collect=lambda made: _without_cache((bound.collect if bound else collect)(made)),
        providers=tuple(session.get_providers()),
    )


def _without_cache(outputs: Arrays) -> Arrays:
    """Return outputs but for a decoder's cache, which no metric looks at."""
    return {k: v for k, v in outputs.items() if not k.startswith("present.")}


def _inspect_graph(model: str, place: Place, shape: tuple[int, int]) -> GraphUse:
    from export.placement import inspect_graphs

    path = Path(model)
    placement = inspect_graphs(
        path / "model.onnx" if path.is_dir() else path, place.provider, shape, place.threads
    )
    (found,) = placement.values()
    sample = next(iter(found.samples))  # of a decoder the prompt
    spent: dict[str, float] = {}
    providers: dict[str, int] = {}
    for node in found.nodes:
        if node.provider is not None:
            spent[node.operator] = spent.get(node.operator, 0.0) + node.seconds.get(sample, 0.0)
            providers[node.provider] = providers.get(node.provider, 0) + 1
    ordered = sorted(spent.items(), key=lambda pair: -pair[1])
    return GraphUse(dict(ordered), providers, found.copies)


def _labels(names: Mapping[Any, str] | None) -> tuple[str, ...]:
    """Return the class names of a config, whose keys are whole numbers or their digits."""
    return tuple(names[key] for key in sorted(names, key=int)) if names else ()


RUNTIMES: dict[str, Runtime] = {
    "pytorch": Runtime(_describe_checkpoint, _open_checkpoint),
    "compiled": Runtime(_describe_checkpoint, partial(_open_checkpoint, compiled=True)),
    "onnx": Runtime(_describe_graph, _open_graph, _inspect_graph),
}
