"""Teachers, students and batches for the tests of distillation, one case per task and family."""

from typing import Any

import torch
from torch import Tensor, nn

from compress.checkpoint import Checkpoint
from compress.sentence import SentenceEncoder
from compress.sentence_modules import Normalize, Pooling
from compress.signature import transformer_signature
from tests.tiny import tiny_checkpoint

# (family, task), and whether its tokens have labels (else its rows have, or nothing)
CASES = [
    ("bert", "text-classification"),
    ("distilbert", "token-classification"),
    ("bert", "fill-mask"),
    ("gpt2", "text-generation"),
    ("llama", "text-generation"),
    ("bart", "text2text-generation"),
    ("t5", "text2text-generation"),
    ("vit", "image-classification"),
    ("bert", "sentence-embedding"),
    ("modernbert", "sentence-embedding"),
]
LABELLED = ("token-classification", "fill-mask", "text2text-generation")


def make(family: str, task: str, **changes: Any) -> Checkpoint:
    """Return a tiny checkpoint for any task, sentence embeddings among them."""
    if family == "t5":
        changes["decoder_start_token_id"] = 0
    if task != "sentence-embedding":
        return tiny_checkpoint(family, task, **changes)
    plain = tiny_checkpoint(family, "feature-extraction", **changes)
    module = SentenceEncoder(plain.module, [Pooling(("mean",)), Normalize()]).eval()
    signature = transformer_signature(module, plain.module, plain.processor)
    return Checkpoint(module, task, signature, plain.processor)


def batch_for(checkpoint: Checkpoint, rows: int = 4, length: int = 7) -> dict[str, Tensor]:
    """Return a ragged batch, padded on the right, with the labels that the task takes."""
    batch = checkpoint.signature.sample(rows, length, ragged=True)
    random = torch.Generator().manual_seed(3)
    task = checkpoint.task
    if task.endswith("-classification") and task != "token-classification":
        batch["labels"] = torch.randint(0, 2, (rows,), generator=random)
    if task in LABELLED:
        classes = 2 if task == "token-classification" else checkpoint.signature.vocabulary
        labels = torch.randint(0, classes, (rows, length), generator=random)
        labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
        labels[::2, 2] = -100
        batch["labels"] = labels
    batch.pop("decoder_input_ids", None)
    return batch


def padded(batch: dict[str, Tensor], columns: int, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the batch with more padding on the right, or fewer columns if `columns` < 0."""
    fill = {"input_ids": checkpoint.signature.pad, "labels": -100}
    return {
        name: nn.functional.pad(value, (0, columns), value=fill.get(name, 0))
        if value.dim() == 2
        else value
        for name, value in batch.items()
    }


def halves(batch: dict[str, Tensor], checkpoint: Checkpoint) -> list[dict[str, Tensor]]:
    """Return the first row and the rest, the rest without the padding that it does not need."""
    first, rest = ({k: v[rows] for k, v in batch.items()} for rows in (slice(1), slice(1, None)))
    if "attention_mask" in rest:
        spare = rest["attention_mask"].shape[1] - int(rest["attention_mask"].sum(1).max())
        rest = padded(rest, -spare, checkpoint)
    return [first, rest]
