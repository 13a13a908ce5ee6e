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


@dataclass(frozen=True)
class Loaded:
    """A model ready to run; only `run` is timed."""

    prepare: Callable[[Arrays], Any]  # arrays → what `run` takes
    run: Callable[[Any], Any]
    collect: Callable[[Any], Arrays]  # what `run` returned → arrays by name
    providers: tuple[str, ...]


@dataclass(frozen=True)
class Runtime:
    """The two things to know about a runtime."""

    describe: Callable[[str], Source]
    open: Callable[[str, str, int], Loaded]  # (model, provider, threads)


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
    )


def _open_checkpoint(model: str, provider: str, threads: int, compiled: bool = False) -> Loaded:
    import torch

    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    from compress.loading import open_checkpoint

    checkpoint = open_checkpoint(model)
    device = "cpu"
    if provider == "cuda":
        if not torch.cuda.is_available():
            raise ProviderError("PyTorch finds no CUDA device; use --provider cpu")
        device = "cuda"
        checkpoint.module.to(device)
    if compiled:  # at the first call of each kind of input: warming up takes minutes
        checkpoint.module.compile()
    return Loaded(
        # copied: PyTorch warns of arrays that it may not write to
        prepare=lambda batch: {k: torch.from_numpy(v.copy()).to(device) for k, v in batch.items()},
        run=checkpoint.predict,
        collect=lambda outputs: outputs,
        providers=(f"torch:{device}{', compiled' if compiled else ''}",),
    )


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


def _open_graph(model: str, provider: str, threads: int) -> Loaded:
    from export.sessions import call, complete_feed, open_session, widened

    path = Path(model)
    session = open_session(path / "model.onnx" if path.is_dir() else path, provider, threads)
    names = [item.name for item in session.get_outputs()]
    half = {item.name for item in session.get_inputs() if item.type == "tensor(float16)"}

    def prepare(batch: Arrays) -> Arrays:  # all variants get one sample, whatever their precision
        cast = {k: v.astype(np.float16) if k in half else v for k, v in batch.items()}
        return complete_feed(session, cast)

    return Loaded(
        prepare=prepare,
        run=lambda feed: call(session, feed),
        collect=lambda outputs: {
            name: widened(value)
            for name, value in zip(names, outputs, strict=True)
            if not name.startswith("present.")  # no metric looks at a cache
        },
        providers=tuple(session.get_providers()),
    )


def _labels(names: Mapping[Any, str] | None) -> tuple[str, ...]:
    """Return the class names of a config, whose keys are whole numbers or their digits."""
    return tuple(names[key] for key in sorted(names, key=int)) if names else ()


RUNTIMES: dict[str, Runtime] = {
    "pytorch": Runtime(_describe_checkpoint, _open_checkpoint),
    "compiled": Runtime(_describe_checkpoint, partial(_open_checkpoint, compiled=True)),
    "onnx": Runtime(_describe_graph, _open_graph),
}
