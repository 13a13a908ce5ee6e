"""A model with all that is needed to use it again, in memory and on disk."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calib_data.batches import ImageShape
from calib_data.errors import ConfigError, ModelError
from compress.files import read_json, write_json
from compress.fresh import unchanged
from compress.sentence import SentenceEncoder, current_files
from compress.signature import Signature, named_outputs
from compress.tasks import CUSTOM, TASKS, Task
from compress.versions import versions
from compress.wrapper import Wrapper

FORMAT = 2  # of onnxpress.json; raised when an older reader would misread a newer file
_PLAIN = 1  # of a checkpoint without adapters, which older readers know as well
MANIFEST = "onnxpress.json"


@dataclass(frozen=True)
class Checkpoint:
    """A module in eval mode with its task, processor, signature and history.

    `structure` maps a block's name to the number of units it keeps where that differs from the
    config, and a stack's of a user's own module to the layers it keeps (see `surgery.resize_`);
    `quantization` holds the scheme's settings and the names of the quantized modules, `adapters` the
    method's settings and the names of the adapted ones.
    """

    module: nn.Module
    task: str
    signature: Signature
    processor: Any = None  # a tokenizer, an image processor, an ImageShape, or None
    structure: Mapping[str, Any] = field(default_factory=dict)
    quantization: Mapping[str, Any] | None = None
    adapters: Mapping[str, Any] | None = None
    lineage: tuple[Mapping[str, Any], ...] = ()
    sidecars: Mapping[str, bytes] = field(default_factory=dict)  # sentence-transformers files
    factory: str | None = None  # package.module:factory that made the module
    source: Path | None = None  # the user's own directory, as long as no stage changed the model

    @property
    def backbone(self) -> nn.Module:
        """The transformer itself: inside a wrapper, otherwise the module."""
        return self.module.backbone if isinstance(self.module, Wrapper) else self.module

    @property
    def config(self) -> Any:
        """The transformers config, or None for a factory's module."""
        return getattr(self.backbone, "config", None)

    @property
    def hidden_size(self) -> int | None:
        """The channels of the residual stream, or None where no config tells them.

        A pruned model has fewer than its config says, which it is built from.
        """
        return self.structure.get("hidden", getattr(self.config, "hidden_size", None))

    @property
    def task_row(self) -> Task:
        """The row of the task table."""
        return TASKS.get(self.task, CUSTOM)

    @property
    def output(self) -> str:
        """The output that metrics and losses look at."""
        preferred = self.task_row.output
        return preferred if preferred in self.signature.outputs else self.signature.outputs[0]

    @property
    def sparse(self) -> bool:
        """Whether some weights were made zero, which later training must leave so."""
        return any(stage.get("stage") == "sparsify" for stage in self.lineage)

    @property
    def max_length(self) -> int | None:
        """The longest sequence the model takes: its positions, or what its tokenizer allows."""
        limits = [self.signature.longest, getattr(self.processor, "model_max_length", None)]
        # tokenizers without a limit say 10**30
        known = [int(x) for x in limits if x is not None and x < 10**9]
        return min(known) if known else None

    def check_length(self, sequence: int) -> int:
        """Return `sequence`; a `ConfigError` if the model has fewer positions."""
        if self.signature.longest is not None and sequence > self.signature.longest:
            raise ConfigError(
                f"--max-length {sequence} is longer than the model's {self.signature.longest} positions"
            )
        return sequence

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the module on the entries of `batch` that it takes; return its outputs by name."""
        inputs = {name: batch[name] for name in self.signature.names if name in batch}
        missing = [name for name in self.signature.names if name not in inputs]
        # token types default to zeros where there is a table of them
        typed = getattr(self.config, "type_vocab_size", None) is not None
        if missing and not (typed and missing == ["token_type_ids"]):
            raise ModelError(f"the batch has no {missing[0]}; it holds {', '.join(batch)}")
        return named_outputs(self.module, inputs)

    def predict(self, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Return the outputs for `batch` as float32 arrays by name, as a fresh model gives them."""
        with torch.inference_mode(), unchanged(self.module):
            outputs = self.forward(batch)
        return {name: value.float().cpu().numpy() for name, value in outputs.items()}

    def with_stage(self, stage: str, **details: Any) -> "Checkpoint":
        """Return this checkpoint with one more stage in its lineage."""
        entry = {"stage": stage, "versions": versions(), **details}
        return replace(self, lineage=(*self.lineage, entry), source=None)


@dataclass(frozen=True)
class StageResult:
    """What a stage returns: the new checkpoint and what there is to tell about it."""

    checkpoint: Checkpoint
    report: dict[str, Any]


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's tensors by name, each storage once: tied weights under their first name."""
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    kept = {}
    for name, value in module.state_dict().items():
        key = (value.data_ptr(), value.shape, value.stride())
        if value.numel() and key in seen:
            continue
        seen.add(key)
        kept[name] = value
    return kept


def weights_sha256(module: nn.Module) -> str:
    """Return the hex sha256 over the names, shapes, dtypes and values of the module's tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(weights_of(module).items()):
        array = value.detach().cpu().contiguous()
        digest.update(f"{name}\0{array.dtype}\0{tuple(array.shape)}\0".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def parameter_count(module: nn.Module) -> int:
    """Return how many numbers the module's weights hold, int8 ones included, tied ones once."""
    return sum(value.numel() for value in weights_of(module).values())


def save_checkpoint(checkpoint: Checkpoint, directory: Path) -> None:
    """Write `checkpoint` into an existing empty directory (see `files.staged_directory`)."""
    from safetensors.torch import save_file

    weights = {k: v.detach().cpu().contiguous() for k, v in weights_of(checkpoint.backbone).items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    save_processor(checkpoint, directory)
    write_json(
        directory / MANIFEST,
        {
            "format": FORMAT if checkpoint.adapters else _PLAIN,
            "task": checkpoint.task,
            "factory": checkpoint.factory,
            "structure": dict(checkpoint.structure),
            "quantization": checkpoint.quantization,
            **({"adapters": checkpoint.adapters} if checkpoint.adapters else {}),
            "sha256": weights_sha256(checkpoint.backbone),
            "lineage": list(checkpoint.lineage),
        },
    )


def save_processor(checkpoint: Checkpoint, directory: Path) -> None:
    """Write configs, tokenizer or image processor, and sentence-transformers files into `directory`."""
    if checkpoint.config is not None:
        checkpoint.config.save_pretrained(directory)
    generation = getattr(checkpoint.backbone, "generation_config", None)
    if generation is not None:  # not its save_pretrained, which refuses what many models come with
        text = generation.to_json_string()
        (directory / "generation_config.json").write_text(text, encoding="utf-8")
    if checkpoint.processor is not None and not isinstance(checkpoint.processor, ImageShape):
        checkpoint.processor.save_pretrained(directory)
        _name_tokenizer_for_all(directory / "tokenizer_config.json")
    files = checkpoint.sidecars
    if isinstance(checkpoint.module, SentenceEncoder):
        files = current_files(checkpoint.module, files, checkpoint.hidden_size)
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _name_tokenizer_for_all(path: Path) -> None:
    """Give a tokenizer without a class of its own the name that transformers 4 knows as well."""
    if path.is_file():
        settings = read_json(path)
        if settings.get("tokenizer_class") == "TokenizersBackend":
            write_json(path, {**settings, "tokenizer_class": "PreTrainedTokenizerFast"})
