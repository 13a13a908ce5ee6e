"""The witness: what the user's own library answers for the directory that the user named.

Raw texts or images go in on both sides: the library with its own processor on one; our PyTorch
checkpoint, and then the bundle's own processor and graph in plain ONNX Runtime, on the other. So
what we write in between (poolings, prompts, heads, processors) is not its own judge.
"""

import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calib_data.batches import ImageShape
from calib_data.errors import ParityError
from compress.checkpoint import Checkpoint
from compress.loading import quiet_libraries
from compress.sentence import SentenceEncoder, is_sentence_directory
from compress.signature import has_towers, named_outputs
from export.bundle import OnnxBundle
from export.verdict import Check

# Of a row's length. Both sides compute in float32, whose rounding leaves some 1e-6 after tens of
# layers; another pooling, prompt or head is 1e-3 and more.
BOUND = 1e-4
_TEXTS = (
    "Green",
    "the cat sat on the mat",
    "What is Python, and who was it made by?",
    "Not one of the three dogs ran to the green house when it was blue, 12 miles away & small.",
    "a small red bird flew over the tree and under the large house; " * 40,  # beyond most limits
)
_FED = {"input_ids", "attention_mask", "token_type_ids", "bbox", "pixel_values"}

Answers = list[dict[str, np.ndarray]]


@dataclass(frozen=True)
class Witness:
    """What a library answered, and how far ours is from it."""

    entry: Mapping[str, Any]  # library, version, class, inputs, deviation; or why there is none
    checks: tuple[Check, ...] = ()

    def raise_if_failed(self) -> None:
        """Raise `ParityError` with both answers where they are apart."""
        if self.entry.get("apart"):
            raise ParityError(str(self.entry["apart"]))


def agrees(found: np.ndarray, answer: np.ndarray) -> float:
    """Return how far `found` is from `answer`: of all rows the largest difference, of a row's length.

    Infinite where shapes differ or a number is not finite.
    """
    if found.shape != answer.shape or not np.isfinite(found).all():
        return float("inf")
    rows = answer.reshape(-1, answer.shape[-1]).astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1)
    apart = np.linalg.norm(found.reshape(rows.shape) - rows, axis=1)
    return float((apart / np.maximum(lengths, 1e-30)).max(initial=0.0))


def hear_witness(checkpoint: Checkpoint, bundle: OnnxBundle, dtype: str) -> Witness:
    """Return what the library answers for the checkpoint's source, and the checks of ours against it.

    There is none for a checkpoint that a stage changed, which is held to its PyTorch model, and none
    without a processor; the entry says why.
    """
    if checkpoint.source is None:
        return _none("changed by a stage or made by code: held to its PyTorch checkpoint")
    processor = checkpoint.processor
    if processor is None or isinstance(processor, ImageShape):
        return _none("the directory holds no tokenizer or processor that takes raw inputs")
    if has_towers(checkpoint.backbone) or checkpoint.task == "text2text-generation":
        return _none(f"{checkpoint.task} is not heard yet")
    encoder = isinstance(checkpoint.module, SentenceEncoder)
    if encoder and not is_sentence_directory(checkpoint.source):
        return _none("the pooling was asked for by --task; the directory names none")
    name = "sentence-transformers" if encoder else "transformers"
    if encoder and importlib.util.find_spec("sentence_transformers") is None:
        return _none("sentence-transformers is not installed: pip install 'onnxpress[sentence]'")
    hear = _encoder if encoder else _transformer
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with quiet_libraries():
            kind, inputs, answers = hear(checkpoint)
    except Exception as error:  # of a library: no common type
        reason = " ".join(str(error).split())[:160]
        return _none(f"{name} does not answer: {type(error).__name__}: {reason}")
    finally:
        logging.disable(level)
    entry = {"library": name, "version": importlib.metadata.version(name), "class": kind}
    sides: dict[str, Answers] = {"PyTorch": _run(inputs, processor, checkpoint, checkpoint.predict)}
    if dtype == "fp32" and "model" in bundle.graphs and set(bundle.signature.names) <= _FED:
        sides["ONNX Runtime"] = _run(inputs, bundle.processor, checkpoint, _session(bundle))
    checks = list(_compared(sides, answers))
    worst = max(checks, key=lambda found: found[0].rms)
    told: dict[str, Any] = {
        **entry,
        "inputs": sum(len(group) for group in inputs),
        "graph": "ONNX Runtime" in sides,
        "deviation": worst[0].rms,
    }
    if not worst[0].passed:
        check, answer, found = worst
        told["apart"] = (
            f"{entry['library']} {entry['version']} ({kind}) answers {_some(answer)} for a raw input, "
            f"{check.session} here {_some(found)}: {check.output} is {check.rms:.2g} of its length "
            f"away, {BOUND:g} allowed; nothing was published"
        )
    return Witness(told, tuple(check for check, _, _ in checks))


def told_witness(entry: Mapping[str, Any]) -> str:
    """Return the line that the command prints of parity.json's `witness`."""
    if not entry.get("library"):
        return f"no witness: {entry['why']}"
    what = "encode" if entry["library"] == "sentence-transformers" else entry["class"]
    return (
        f"equal to {entry['library']} {entry['version']}'s {what} on {entry['inputs']} raw inputs "
        f"(within {entry['deviation']:.1g})"
    )


def _none(why: str) -> Witness:
    return Witness({"library": None, "why": why})


def _encoder(checkpoint: Checkpoint) -> tuple[str, list[list[Any]], Answers]:
    """Return sentence-transformers' answers: a batch for each prompt, padded as it pads."""
    from sentence_transformers import SentenceTransformer

    made: Any = SentenceTransformer(str(checkpoint.source), device="cpu", local_files_only=True)
    prompts = dict.fromkeys(["", *(made.prompts or {}).values()])
    answers, inputs = [], []
    for prompt in prompts:
        inputs.append([prompt + text for text in _TEXTS])
        given = {"prompt": prompt, "convert_to_numpy": True, "show_progress_bar": False}
        if "sentence_embedding" in checkpoint.signature.outputs:
            answers.append({"sentence_embedding": made.encode(list(_TEXTS), **given)})
        else:
            found = made.encode(list(_TEXTS), prompt=prompt, output_value="token_embeddings")
            answers.append({"token_embeddings": np.concatenate([f.float().numpy() for f in found])})
    return type(made).__name__, inputs, answers


def _transformer(checkpoint: Checkpoint) -> tuple[str, list[list[Any]], Answers]:
    """Return the answers of the class that config.json names, one input at a time."""
    import transformers

    source = str(checkpoint.source)
    auto = getattr(transformers, checkpoint.task_row.auto_class)
    names = getattr(checkpoint.config, "architectures", None) or [""]
    known = set(auto._model_mapping._model_mapping.values())
    kind = getattr(transformers, names[0]) if names[0] in known else auto
    model = kind.from_pretrained(source, dtype=torch.float32, local_files_only=True).eval()
    images = "pixel_values" in checkpoint.signature.names
    opener = transformers.AutoImageProcessor if images else transformers.AutoTokenizer
    processor = opener.from_pretrained(source)
    raw: Sequence[Any] = _TEXTS
    if images:
        random = np.random.default_rng(0)
        raw = [random.integers(0, 256, size, np.uint8) for size in ((90, 60, 3), (48, 120, 3))]
    inputs = [[one] for one in raw]
    answers = []
    for one in inputs:
        with torch.inference_mode():
            batch = _prepared(one, processor, checkpoint)
            taken = {n: v for n, v in batch.items() if n in checkpoint.signature.names}
            made = named_outputs(model, taken)
        answers.append({checkpoint.output: made[checkpoint.output].float().numpy()})
    return type(model).__name__, inputs, answers


def _prepared(inputs: Sequence[Any], processor: Any, checkpoint: Checkpoint) -> dict[str, Any]:
    if "pixel_values" in checkpoint.signature.names:
        return dict(processor(list(inputs), return_tensors="pt"))
    limit = checkpoint.max_length
    cut = {"truncation": True, "max_length": limit} if limit else {}
    made = dict(processor(list(inputs), padding=len(inputs) > 1, return_tensors="pt", **cut))
    ids = made["input_ids"]
    drawn = checkpoint.signature.sample(*ids.shape)
    for item in checkpoint.signature.inputs:
        if item.kind == "boxes":  # where a token stands in a page, no text says
            made.setdefault(item.name, drawn[item.name])
    return made


def _run(
    inputs: Sequence[Sequence[Any]],
    processor: Any,
    checkpoint: Checkpoint,
    predict: Callable[[dict[str, Any]], Mapping[str, np.ndarray]],
) -> Answers:
    """Return the outputs for each batch of raw inputs; vectors of tokens without the padding."""
    answers = []
    for batch in inputs:
        made = _prepared(batch, processor, checkpoint)
        try:
            found = dict(predict(made))
        except Exception as error:  # ONNX Runtime and PyTorch raise many unrelated types
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in made.items())
            reason = " ".join(str(error).split())[:200]
            raise ParityError(
                f"the model's own processor gives {shapes}, which the library answers and what is "
                f"exported here does not take: {reason}"
            ) from error
        if "token_embeddings" in found:
            found["token_embeddings"] = found["token_embeddings"][made["attention_mask"].bool()]
        answers.append(found)
    return answers


def _session(bundle: OnnxBundle) -> Callable[[dict[str, Any]], dict[str, np.ndarray]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    path: Path = bundle.graph.path
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    taken = [value.name for value in session.get_inputs()]
    names = [value.name for value in session.get_outputs()]

    def predict(batch: dict[str, Any]) -> dict[str, np.ndarray]:
        feeds = {n: batch[n].numpy() if n in batch else _zeros(batch) for n in taken}
        return dict(zip(names, session.run(None, feeds)))

    return predict


def _zeros(batch: Mapping[str, Any]) -> np.ndarray:
    return np.zeros(batch["input_ids"].shape, np.int64)  # token types, which default to zeros


def _compared(
    sides: Mapping[str, Answers], answers: Answers
) -> Iterator[tuple[Check, np.ndarray, np.ndarray]]:
    for side, found in sides.items():
        for place, answer in enumerate(answers):
            for output, expected in answer.items():
                apart = agrees(found[place][output], expected)
                where = ("witness", f"raw inputs {place + 1}", side, output)
                check = Check.of(where, "witness", (apart, apart), (BOUND, BOUND))
                yield check, expected, found[place][output]


def _some(values: np.ndarray) -> str:
    first = ", ".join(f"{value:.4g}" for value in values.reshape(-1)[:3])
    return f"[{first}, … {values.shape}]"
