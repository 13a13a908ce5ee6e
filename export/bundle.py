"""The exporter's result: a directory with the graph and all that is needed to use it."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from calib_data.batches import ImageShape
from calib_data.errors import ModelError
from compress.checkpoint import Checkpoint, save_processor
from compress.files import read_json, sha256_file, write_json
from compress.loading import open_processor
from compress.signature import Signature

FORMAT = 1
GRAPH = "model.onnx"
MANIFEST = "onnxpress.json"
# protobuf holds 2 GiB; past this the weights go beside the graph
EXTERNAL_DATA_BYTES = 2**31 - 2**24


@dataclass(frozen=True)
class OnnxBundle:
    """A bundle on disk: `model.onnx`, manifest, config and tokenizer copies, `parity.json`."""

    path: Path
    manifest: dict[str, Any]

    @property
    def model_path(self) -> Path:
        """The graph."""
        return self.path / GRAPH

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

    @functools.cached_property
    def signature(self) -> Signature:
        """Its inputs and outputs."""
        examples: tuple[Any, ...] = ()
        if (self.path / "examples.safetensors").is_file():
            from safetensors.torch import load_file

            stored = load_file(self.path / "examples.safetensors")
            examples = tuple(stored[item["name"]] for item in self.manifest["signature"]["inputs"])
        return Signature.from_json(self.manifest["signature"], examples)

    @functools.cached_property
    def processor(self) -> Any:
        """Its tokenizer or image processor, or None."""
        pixels = [item.shape for item in self.signature.inputs if item.kind == "pixels"]
        image = ImageShape(pixels[0][2], pixels[0][1]) if pixels else None
        processor = open_processor(self.path, image)
        if processor is not None and image is None and self.max_length is not None:
            processor.model_max_length = self.max_length
        return processor

    @property
    def size_bytes(self) -> int:
        """The size of the graph with its external data."""
        return sum(path.stat().st_size for path in self.path.glob(f"{GRAPH}*"))


def open_bundle(path: str | Path) -> OnnxBundle:
    """Return the bundle in `path`; a `ModelError` where it is none, or its graph is not the one made."""
    path = Path(path)
    if not (path / GRAPH).is_file() or not (path / MANIFEST).is_file():
        raise ModelError(f"{path} is no ONNX bundle: it needs {GRAPH} and {MANIFEST}")
    manifest = read_json(path / MANIFEST)
    if (
        not isinstance(manifest, dict)
        or "signature" not in manifest
        or not isinstance(manifest.get("format"), int)
    ):
        raise ModelError(f"{path / MANIFEST} is not a bundle's manifest")
    if manifest["format"] > FORMAT:
        raise ModelError(f"{path} has format {manifest['format']}, newer than {FORMAT}; upgrade")
    return OnnxBundle(path, manifest)


def write_bundle(
    model: ir.Model, checkpoint: Checkpoint, settings: dict[str, Any], directory: Path
) -> OnnxBundle:
    """Write the graph, manifest, config and tokenizer into an existing empty directory."""
    lineage = [*checkpoint.lineage, {"stage": "export", "settings": settings}]
    model.metadata_props["onnxpress.lineage"] = json.dumps(lineage)
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    external = f"{GRAPH}.data" if size > EXTERNAL_DATA_BYTES else None
    ir.save(model, directory / GRAPH, external_data=external)
    save_processor(checkpoint, directory)
    if checkpoint.signature.examples:
        from safetensors.torch import save_file

        named = zip(checkpoint.signature.names, checkpoint.signature.examples)
        save_file({n: v.contiguous() for n, v in named}, directory / "examples.safetensors")
    manifest = {
        "format": FORMAT,
        "task": checkpoint.task,
        "output": checkpoint.output,
        "max_length": checkpoint.max_length,
        "signature": checkpoint.signature.to_json(),
        "settings": settings,
        "sha256": sha256_file(directory / GRAPH),
        "lineage": lineage,
    }
    write_json(directory / MANIFEST, manifest)
    return OnnxBundle(directory, manifest)
