"""The exporter's result: a directory with the graphs and all that is needed to use them."""

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from calib_data.batches import ImageShape
from calib_data.errors import ModelError
from compress.checkpoint import Checkpoint, save_processor
from compress.files import inside, read_json, sha256_file, write_json
from compress.loading import open_processor
from compress.signature import Signature
from export.exactness import ALL, exact_on
from export.serialize import EXTERNAL_DATA_BYTES, write_model

FORMAT = 1
MANIFEST = "onnxpress.json"
EXAMPLES = "examples.safetensors"  # the example inputs of a factory's module


@dataclass(frozen=True)
class File:
    """A file as it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Graph:
    """One graph of a bundle."""

    path: Path
    signature: Signature
    output: str  # the one that metrics look at
    files: Mapping[str, File]  # the graph and its external data, by name

    @property
    def size_bytes(self) -> int:
        """The size of the graph with its external data."""
        return sum(file.bytes for file in self.files.values())


@dataclass(frozen=True)
class OnnxBundle:
    """A bundle on disk: its graphs, manifest, config and tokenizer copies, `parity.json`.

    Most models are one graph, `model`; some are several that work together.
    """

    path: Path
    manifest: dict[str, Any]

    @functools.cached_property
    def graphs(self) -> dict[str, Graph]:
        """The graphs by name."""
        stored: Mapping[str, Any] = {}
        if (self.path / EXAMPLES).is_file():
            from safetensors.torch import load_file

            stored = load_file(self.path / EXAMPLES)
        return {
            name: Graph(
                path=inside(self.path, f"{name}.onnx"),
                signature=_signature(entry["signature"], stored),
                output=str(entry["output"]),
                files={file: File(**values) for file, values in entry["files"].items()},
            )
            for name, entry in self.manifest["graphs"].items()
        }

    @property
    def graph(self) -> Graph:
        """The graph called `model`; a `ModelError` names the others where there is none."""
        if "model" not in self.graphs:
            raise ModelError(
                f"{self.path} holds no graph that is the whole model, but {', '.join(self.graphs)}"
            )
        return self.graphs["model"]

    @property
    def signature(self) -> Signature:
        """Inputs and outputs of the graph called `model`."""
        return self.graph.signature

    @property
    def task(self) -> str:
        """What the model is for."""
        return str(self.manifest["task"])

    @property
    def lineage(self) -> list[dict[str, Any]]:
        """The stages that made it, the source first."""
        return list(self.manifest["lineage"])

    @property
    def max_length(self) -> int | None:
        """The longest sequence it takes, or None for no limit."""
        return self.manifest["max_length"]

    @property
    def exact_on(self) -> str | None:
        """The processors on which sums of int8 are exact; None where there are none, or is not known."""
        found = [graph.get("exact_on") for graph in self.manifest["graphs"].values()]
        return next((on for on in found if on not in (None, ALL)), ALL if ALL in found else None)

    @functools.cached_property
    def processor(self) -> Any:
        """Its tokenizer, its image processor, what holds both, or None."""
        items = [item for graph in self.graphs.values() for item in graph.signature.inputs]
        pixels = [item.shape for item in items if item.kind == "pixels"]
        text = any(item.kind == "ids" for item in items)
        processor = open_processor(self.path, text=text, images=bool(pixels))
        if processor is None and pixels and not text:
            processor = ImageShape(pixels[0][2], pixels[0][1])
        if hasattr(processor, "model_max_length") and self.max_length is not None:
            processor.model_max_length = self.max_length
        return processor

    @property
    def size_bytes(self) -> int:
        """The size of all graphs with their external data."""
        return sum(graph.size_bytes for graph in self.graphs.values())

    def verify(self) -> None:
        """Raise `ModelError` for a file of a graph that is not, byte for byte, what was written."""
        for graph in self.graphs.values():
            for name, file in graph.files.items():
                if sha256_file(self.path / name) != file.sha256:
                    raise ModelError(f"{self.path / name} was changed after its export")


def open_bundle(path: str | Path) -> OnnxBundle:
    """Return the bundle in `path`.

    Raises `ModelError` where it is none, and for files that are missing or of another size than
    was written (`OnnxBundle.verify` compares their content too).
    """
    path = Path(path)
    if not (path / MANIFEST).is_file():
        raise ModelError(f"{path} is no ONNX bundle: it has no {MANIFEST}")
    manifest = read_json(path / MANIFEST)
    if (
        not isinstance(manifest, dict)
        or not isinstance(manifest.get("graphs"), dict)
        or not isinstance(manifest.get("format"), int)
    ):
        raise ModelError(f"{path} is no ONNX bundle: {MANIFEST} is not a bundle's manifest")
    if manifest["format"] > FORMAT:
        raise ModelError(f"{path} has format {manifest['format']}, newer than {FORMAT}; upgrade")
    bundle = OnnxBundle(path, manifest)
    try:
        graphs = bundle.graphs
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path / MANIFEST} is damaged: {error!r}") from error
    for graph in graphs.values():
        for name, file in graph.files.items():
            _check_size(inside(path, name), file.bytes)
    return bundle


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise ModelError(f"{path} is missing; export again")
    if path.stat().st_size != expected:
        raise ModelError(
            f"{path} has {path.stat().st_size} bytes, and {expected} were written: it was cut short "
            "or changed; export again"
        )


def write_bundle(
    graphs: Iterable[tuple[str, Checkpoint, ir.Model]],
    checkpoint: Checkpoint,
    settings: dict[str, Any],
    directory: Path,
) -> OnnxBundle:
    """Write graphs (name, what it is the graph of, graph) into an existing empty directory.

    Manifest, config and tokenizer are those of `checkpoint`, the whole. One graph at a time is held.
    """
    lineage = [*checkpoint.lineage, {"stage": "export", "settings": settings}]
    table = {}
    for name, part, model in graphs:
        model.metadata_props["onnxpress.lineage"] = json.dumps(lineage)
        table[name] = {
            "signature": part.signature.to_json(),
            "output": part.output,
            "exact_on": exact_on(model),
            "files": {file: vars(facts) for file, facts in _save(model, directory, name).items()},
        }
        del model  # the next one is built before this loop's variable is set again
    save_processor(checkpoint, directory)
    if checkpoint.signature.examples:
        from safetensors.torch import save_file

        named = zip(checkpoint.signature.names, checkpoint.signature.examples)
        save_file({n: v.contiguous() for n, v in named}, directory / EXAMPLES)
    manifest = {
        "format": FORMAT,
        "task": checkpoint.task,
        "max_length": checkpoint.max_length,
        "graphs": table,
        "settings": settings,
        "lineage": lineage,
    }
    write_json(directory / MANIFEST, manifest)
    return OnnxBundle(directory, manifest)


def _save(model: ir.Model, directory: Path, name: str) -> dict[str, File]:
    """Write a graph, with its weights beside it where they are too large; return the files."""
    path = directory / f"{name}.onnx"
    write_model(model, path, EXTERNAL_DATA_BYTES)
    written = [path, path.with_name(f"{path.name}.data")]
    return {f.name: File(f.stat().st_size, sha256_file(f)) for f in written if f.is_file()}


def _signature(value: Mapping[str, Any], examples: Mapping[str, Any]) -> Signature:
    names = [item["name"] for item in value["inputs"]]
    return Signature.from_json(value, tuple(examples[name] for name in names if name in examples))


def read_graph(path: Path) -> ir.Model:
    """Return the graph in `path`, its external data left on disk.

    Raises `ModelError` for what is no graph, and for external data that is missing, too short, or
    outside the graph's folder.
    """
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf and onnx_ir raise many unrelated types
        raise ModelError(f"{path} cannot be read as a graph: {_line(error)}") from error
    if not model.graph.outputs:
        raise ModelError(f"{path} cannot be read as a graph: it has no outputs")
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                data = inside(path.parent, str(tensor.location))
                needed = (tensor.offset or 0) + (tensor.length or 0)
                if not data.is_file():
                    raise ModelError(f"{path} has its weights in {data.name}, which is missing")
                if data.stat().st_size < needed:
                    raise ModelError(
                        f"{data} has {data.stat().st_size} bytes, and {path.name} needs {needed}"
                    )
    return model


def external_files(model: ir.Model, path: Path) -> list[Path]:
    """Return the files beside `path` that hold the graph's weights, each once."""
    found: dict[Path, None] = {}
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                found[inside(path.parent, str(value.const_value.location))] = None
    return list(found)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
