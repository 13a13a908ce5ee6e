"""What the gate is tried on: tiny models of several families, exported, and twins that are not them."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import onnx
import onnx_ir as ir
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.mutations import Random
from compress.checkpoint import Checkpoint
from compress.quantize import QuantizeConfig, quantize
from compress.signature import named_outputs, transformer_signature
from compress.tasks import get_task
from compress.wrapper import Wrapper
from export.graph import ExportConfig, build_graph
from export.parts import parts

_TEXT = {"vocab_size": 101, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48}
_VIT = {"image_size": 12, "patch_size": 4, "num_channels": 3, "num_labels": 5}
# name → (model type, task, config, quantization scheme, opset)
FAMILIES: dict[str, tuple[str, str, dict[str, Any], str | None, int]] = {
    "encoder": ("bert", "feature-extraction", _TEXT | _SIZES, None, 23),
    "encoder, opset 18": ("bert", "feature-extraction", _TEXT | _SIZES, None, 18),
    "classifier": ("bert", "text-classification", _TEXT | _SIZES | {"num_labels": 5}, None, 23),
    "decoder": ("gpt2", "text-generation", _TEXT | _GPT2, None, 23),
    "rotary decoder": (
        "llama", "text-generation", _TEXT | _SIZES | {"num_key_value_heads": 2}, None, 23,
    ),
    "vision": ("vit", "image-classification", _SIZES | _VIT, None, 23),
    "int8 encoder": ("bert", "feature-extraction", _TEXT | _SIZES, "dynamic", 23),
    "int8 decoder": ("gpt2", "text-generation", _TEXT | _GPT2, "dynamic", 23),
    "int8 vision": ("vit", "image-classification", _SIZES | _VIT, "dynamic", 23),
    "static encoder": ("bert", "feature-extraction", _TEXT | _SIZES, "static", 23),
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """An exported model, ready to be mutated; `content` is empty where only its twins have graphs."""

    checkpoint: Checkpoint
    part: Checkpoint
    content: bytes

    def graph(self) -> ir.Model:
        """Return a fresh copy of the graph."""
        return ir.from_proto(onnx.load_from_string(self.content))


class Sampled:
    """Calibration data: what the model's signature calls valid inputs."""

    fingerprint = "sampled"

    def __init__(self, checkpoint: Checkpoint) -> None:
        samples = (checkpoint.signature.sample(8, 16, seed=seed, ragged=True) for seed in range(4))
        self._batches = list(samples)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Mapping[str, torch.Tensor]]:
        return iter(self._batches)


def build(family: str) -> Subject:
    """Return the exported model of one family, its weights drawn as large as trained ones."""
    if family in HEADS:
        return _headed(HEADS[family])
    kind, task, settings, scheme, opset = FAMILIES[family]
    checkpoint = float_checkpoint(kind, task, settings)
    if scheme is not None:
        checkpoint = quantize(checkpoint, QuantizeConfig(scheme), Sampled(checkpoint)).checkpoint
    return Subject(checkpoint, *_exported(checkpoint, opset))


def _exported(checkpoint: Checkpoint, opset: int = 23) -> tuple[Checkpoint, bytes]:
    (part,) = parts(checkpoint).values()
    graph = build_graph(part, ExportConfig(opset=opset))
    return part, bytes(ir.to_proto(graph).SerializeToString())


def float_checkpoint(
    kind: str, task: str, settings: Mapping[str, Any], seed: int = 0
) -> Checkpoint:
    """Return a model of a family, its weights drawn as large as trained ones."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = getattr(transformers, get_task(task).auto_class).from_config(config)
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1:
                value.mul_(3)
            else:
                value.add_(torch.randn_like(value), alpha=0.1)
    model = model.eval()
    return Checkpoint(model, task, transformer_signature(model, model, None))


# --- heads whose mistakes no single node shows --------------------------------------------------

_MODES = ("cls", "max", "mean", "mean_sqrt_len", "weighted mean", "last")
_ORDER = ("dense", "norm", "scale")


@dataclass(frozen=True)
class Head:
    """What a sentence encoder does after its transformer; `switch` is the longest short text."""

    mode: str = "mean"
    order: tuple[str, ...] = _ORDER
    switch: int | None = None
    side: str = ""  # of the switch that is taken for every length: short or long
    quiet: bool = False  # tokens whose states are up to 10,000 times smaller


HEADS: dict[str, Head] = {
    **{f"sentence encoder, {mode}": Head(mode) for mode in ("cls", "max", "mean")},
    **{f"switch after {n} tokens": Head(switch=n) for n in (2, 7, 11, 23, 40)},
    "quiet tokens": Head(quiet=True),
}


class _Encoder(Wrapper):
    """A transformer with a head, as its parameters say."""

    def __init__(self, backbone: nn.Module, head: Head) -> None:
        super().__init__(backbone)
        width = int(self.config.hidden_size)
        self.head = head
        self.dense = nn.Linear(width, width)
        self.other = nn.Linear(width, width)
        self.gain: Tensor
        self.register_buffer("scale", torch.linspace(0.5, 2, width))
        self.register_buffer("gain", 10 ** -torch.linspace(0, 4, int(self.config.vocab_size)))

    def forward(self, **inputs: Tensor) -> Mapping[str, Tensor]:
        """Return states (batch, sequence, width) and one vector per text (batch, width)."""
        hidden = named_outputs(self.backbone, inputs)["last_hidden_state"]
        head, mask = self.head, inputs["attention_mask"]
        if head.quiet:
            hidden = hidden * self.gain[inputs["input_ids"]].unsqueeze(-1)
        if head.switch is not None:
            long = head.side == "long" if head.side else hidden.shape[1] > head.switch
            hidden = self.other(hidden) if long else hidden
        vector = _pooled(hidden, mask, head.mode)
        for step in head.order:
            vector = {
                "dense": lambda v: torch.tanh(self.dense(v)),
                "norm": lambda v: F.normalize(v, dim=-1),
                "scale": lambda v: v * self.scale,
            }[step](vector)
        return {"token_embeddings": hidden, "sentence_embedding": vector}


def _pooled(hidden: Tensor, mask: Tensor, mode: str) -> Tensor:
    weights = mask.unsqueeze(-1).to(hidden.dtype)  # (batch, sequence, 1)
    if mode == "cls":
        return hidden[:, 0]
    if mode == "max":
        return hidden.masked_fill(weights == 0, -1e9).amax(dim=1)
    if mode == "last":
        last = (mask.cumsum(1) * mask).argmax(1)
        return hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[2])).squeeze(1)
    if mode == "weighted mean":
        weights = weights * weights.cumsum(1)
    total, count = (hidden * weights).sum(1), weights.sum(1)
    return total / (count.sqrt() if mode == "mean_sqrt_len" else count)


def _headed(head: Head) -> Subject:
    plain = float_checkpoint("bert", "feature-extraction", _TEXT | _SIZES)
    torch.manual_seed(1)
    encoder = _Encoder(plain.module, head).eval()
    outputs = ("token_embeddings", "sentence_embedding")
    signature = replace(plain.signature, outputs=outputs)
    checkpoint = replace(plain, module=encoder, signature=signature)
    if head.switch is not None:
        (part,) = parts(checkpoint).values()
        return Subject(checkpoint, part, b"")
    return Subject(checkpoint, *_exported(checkpoint))


def twin(subject: Subject, kind: str, random: Random) -> tuple[ir.Model, str] | None:
    """Return the graph of a model that differs from the subject's in its head alone, and how."""
    module = subject.checkpoint.module
    if not isinstance(module, _Encoder):
        return None
    head = module.head
    if kind == "one of two branches" and head.switch is not None:
        side = ("short", "long")[int(random.integers(2))]
        return _twin(subject, replace(head, side=side)), f"{side} texts' branch for all"
    if head.switch is not None or head.quiet:
        return None
    if kind == "pooling mode":
        others = [mode for mode in _MODES if mode != head.mode]
        mode = others[int(random.integers(len(others)))]
        return _twin(subject, replace(head, mode=mode)), f"{mode} for {head.mode}"
    if kind == "module order":
        order = tuple(_ORDER[int(i)] for i in random.permutation(len(_ORDER)))
        if order != head.order:
            return _twin(subject, replace(head, order=order)), " → ".join(order)
    return None


def _twin(subject: Subject, head: Head) -> ir.Model:
    module = copy.deepcopy(subject.checkpoint.module)
    module.head = head  # type: ignore[assignment]
    _, content = _exported(replace(subject.checkpoint, module=module))
    return ir.from_proto(onnx.load_from_string(content))


TWIN_KINDS = ("pooling mode", "module order", "one of two branches")
