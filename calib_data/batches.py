"""Encoding examples once, and handing them out as batches of tensors with little padding."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from calib_data.errors import ConfigError, DataError
from calib_data.sources import Examples

# One batch in, named outputs out: the form in which every model, of whatever runtime, is measured.
Predict = Callable[[Mapping[str, Tensor]], Mapping[str, np.ndarray]]

ROWS = "rows"  # (B,) int64, the examples that a batch holds, where `Batches.numbered` is asked
TARGETS = ("labels", "scores", ROWS)  # what a batch carries besides the inputs of the model
TEACHER = "teacher_"  # how the inputs begin that are for a teacher with a processor of its own
POOL = 50  # batches that are sorted together when shuffling
_AT_ONCE = 64  # texts that are encoded: a tokenizer makes far more of each than is kept


@dataclass(frozen=True)
class ImageShape:
    """The images that a model without an image processor takes: square, values in 0..1."""

    size: int  # pixels a side
    channels: int = 1


class Batches:
    """A re-iterable of batches, dicts of tensors, sorted by length so that little is padding.

    Texts become `input_ids`, `attention_mask` and what else the tokenizer makes, (B, T) int64 with
    T the longest of the batch; images become `pixel_values`, (B, C, H, W) float32. Labels follow
    as `labels`, (B,) int64, scores as `scores`, (B,) float32. Every pass is the same; to shuffle
    anew, `iterate(epoch)`.

    `processor` is a fast tokenizer, an image processor or an `ImageShape`. `field` chooses which
    text is encoded: "text", "text_pair" or "both", jointly where there are two. Texts are cut at
    `max_length` tokens and the tokenizer's own bound, or nowhere if it is None. An `objective` makes
    of texts what a language model is trained on; the default is texts with their labels.

    `teacher_processor` encodes the same rows once more, for a teacher that has a tokenizer of its own:
    its inputs follow as `teacher_input_ids` and so on.

    Raises DataError where the examples are not what the processor takes.
    """

    def __init__(
        self,
        examples: Examples,
        processor: Any,
        *,
        batch_size: int = 32,
        max_length: int | None = 128,
        seed: int = 0,
        shuffle: bool = False,
        drop_last: bool = False,
        field: str = "both",
        teacher_processor: Any = None,
        objective: "Objective | None" = None,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if field not in ("both", "text", "text_pair"):
            raise ConfigError(f"field must be both, text or text_pair, got {field}")
        if drop_last and batch_size > len(examples):
            raise DataError(
                f"{examples.spec} has {len(examples)} examples, less than one batch of "
                f"{batch_size}; lower the batch size"
            )
        self.examples = examples
        self.batch_size = batch_size
        self._seed, self._shuffle, self._drop_last = seed, shuffle, drop_last
        self._objective = objective or Objective()
        self._content = _encode(examples, processor, max_length, field, self._objective)
        self._teachers = (
            _encode(examples, teacher_processor, max_length, field, Objective())
            if teacher_processor
            else None
        )
        if self._teachers is not None and len(self._teachers.lengths) != len(self.lengths):
            raise ConfigError(
                "packed texts have no rows in common with another tokenizer's; leave --pack out"
            )
        self._targets: dict[str, Tensor] = {}
        if "label" in examples.roles and self._objective.labelled:
            self._targets["labels"] = torch.tensor(examples.column("label"), dtype=torch.int64)
        if "score" in examples.roles and self._objective.labelled:
            self._targets["scores"] = torch.tensor(examples.column("score"), dtype=torch.float32)
        self.rows = self._plan(0)  # the example indices of each batch, in the order of iteration
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.iterate(0)

    def iterate(self, epoch: int) -> Iterator[dict[str, Tensor]]:
        """Yield the batches of one pass; with `shuffle`, each epoch has an order of its own."""
        for index, rows in enumerate(self._plan(epoch)):
            targets = {name: values[rows] for name, values in self._targets.items()}
            random = np.random.default_rng([self._seed, epoch, index])
            batch = self._objective.prepare(self._content.batch(rows) | targets, random)
            if self._teachers is not None:
                theirs = self._teachers.batch(rows)
                batch |= {f"{TEACHER}{name}": value for name, value in theirs.items()}
            yield batch

    def numbered(self) -> "Batches":
        """Return these batches, each saying in `rows` (B,) int64 which examples it holds."""
        numbered = copy.copy(self)
        numbered._targets = {**self._targets, ROWS: torch.arange(len(self.lengths))}
        return numbered

    def steady(self) -> bool:
        """Whether rows are the same in every epoch, and not drawn anew, as for masking."""
        made = []
        for epoch in (0, 1):
            batch = self._content.batch(self.rows[0])
            made.append(self._objective.prepare(batch, np.random.default_rng(epoch)))
        return all(value.equal(made[1][name]) for name, value in made[0].items())

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, (N,); 1 for an image."""
        return self._content.lengths

    @property
    def longest(self) -> int:
        """The most tokens that a text has."""
        return self._content.longest

    def _plan(self, epoch: int) -> list[np.ndarray]:
        """Return the example indices of each batch."""
        size, lengths = self.batch_size, self.lengths
        if not self._shuffle:
            # Longest first: a batch that does not fit into memory fails at once, not at the end.
            order = np.argsort(-lengths, kind="stable")
            batches = [order[i : i + size] for i in range(0, len(order), size)]
        else:
            random = np.random.default_rng([self._seed, epoch])
            order = random.permutation(len(lengths))
            batches = []
            for start in range(0, len(order), size * POOL):
                pool = order[start : start + size * POOL]
                pool = pool[np.argsort(lengths[pool], kind="stable")]
                batches += [pool[i : i + size] for i in range(0, len(pool), size)]
            batches = [batches[i] for i in random.permutation(len(batches))]
        return [rows for rows in batches if len(rows) == size or not self._drop_last]

    def _fingerprint(self) -> str:
        """Return the SHA-256 of the encoded content, the targets and the settings, as hex."""
        digest = hashlib.sha256()
        settings = [self.batch_size, self._seed, self._shuffle, self._drop_last]
        made = [settings, self._content.settings, *self._objective.settings]
        digest.update(json.dumps(made).encode())
        for array in self._content.arrays():
            digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        if self._teachers is not None:
            digest.update(json.dumps(self._teachers.settings).encode())
            for array in self._teachers.arrays():
                digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        for name, values in self._targets.items():
            digest.update(name.encode() + values.numpy().tobytes())
        for rows in self.rows:
            digest.update(rows.astype(np.int64).tobytes() + b"|")
        return digest.hexdigest()


class Content(Protocol):
    """What batches are cut from: as many rows as `lengths` has, tokens of each, (N,)."""

    lengths: np.ndarray
    longest: int  # most tokens that the model sees at once
    settings: list[Any]  # that the encoding depends on, JSON-able

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Return these rows as one batch of tensors."""

    def arrays(self) -> Iterator[np.ndarray]:
        """Yield everything that is encoded, for the fingerprint."""


class Objective:
    """What is asked of the texts in a batch: here, nothing but the labels that come with them."""

    labelled = True  # whether a batch carries the labels and scores of its examples
    settings: tuple[Any, ...] = ()  # that the batches depend on, JSON-able

    def encode(
        self, examples: Examples, tokenizer: Any, max_length: int | None, field: str
    ) -> Content:
        """Return the texts as token ids."""
        return Texts(examples, tokenizer, max_length, field)

    def prepare(self, batch: dict[str, Tensor], random: np.random.Generator) -> dict[str, Tensor]:
        """Return the batch as it is trained on; `random` depends on seed, epoch and place alone."""
        return batch


def _encode(
    examples: Examples, processor: Any, max_length: int | None, field: str, objective: Objective
) -> Content:
    if hasattr(processor, "padding_side"):  # what tokenizers have and image processors lack
        return objective.encode(examples, processor, max_length, field)
    if processor is not None and "image" in examples.roles:
        return _Images(examples, processor)
    raise DataError(
        f"{examples.spec} holds {', '.join(sorted(examples.roles))}, for which the model "
        "has neither a tokenizer nor an image processor; use other data or add one to it"
    )


class Texts:
    """Examples as token ids, padded here: it works for tokenizers that have no pad token."""

    def __init__(
        self, examples: Examples, tokenizer: Any, max_length: int | None, field: str
    ) -> None:
        if field == "both" and "text_pair" in examples.roles:
            texts = [examples.column("text"), examples.column("text_pair")]
        else:
            texts = [examples.column("text_pair" if field == "text_pair" else "text")]
        if max_length is not None:
            max_length = min(max_length, tokenizer.model_max_length)
        # one array a column: rows of their own, among what a tokenizer throws away, tear the heap
        parts: dict[str, list[np.ndarray]] = {}
        lengths: list[int] = []
        for start in range(0, len(texts[0]), _AT_ONCE):
            encoded = tokenizer(
                *(column[start : start + _AT_ONCE] for column in texts),
                padding=False,
                truncation=max_length is not None,
                max_length=max_length,
                return_attention_mask=True,
                verbose=False,  # no warning of long texts, which `Windows` cuts
            )
            lengths += map(len, encoded["input_ids"])
            for name in encoded:
                if name in {"attention_mask", *tokenizer.model_input_names}:
                    rows = [np.asarray(row, dtype=np.int32) for row in encoded[name]]
                    parts.setdefault(name, []).append(np.concatenate(rows))
        self._columns = {name: np.concatenate(arrays) for name, arrays in parts.items()}
        self.lengths = np.array(lengths)
        self._ends = self.lengths.cumsum()  # of each row in a column
        if not self.lengths.all():
            raise DataError(
                f"{examples.spec}, example {int(self.lengths.argmin()) + 1} has no token that the "
                "tokenizer knows; remove it"
            )
        self.longest = int(self.lengths.max())
        self._left = tokenizer.padding_side == "left"
        self._fill = {
            "input_ids": tokenizer.pad_token_id or 0,
            "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0) or 0,
        }
        self.settings = [field, max_length, tokenizer.padding_side, self._fill]

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Return these texts, (B, T) each, T the longest of them."""
        longest = int(self.lengths[rows].max())
        batch = {}
        for name, column in self._columns.items():
            padded = np.full(
                (len(rows), longest), self._fill.get(name, 0), dtype=np.int64
            )  # (B, T)
            for target, row in zip(padded, rows):
                values = column[self._ends[row] - self.lengths[row] : self._ends[row]]
                target[longest - len(values) if self._left else 0 :][: len(values)] = values
            batch[name] = torch.from_numpy(padded)
        return batch

    def arrays(self) -> Iterator[np.ndarray]:
        """Yield the ids, masks and types of every row."""
        for column in self._columns.values():
            for length, end in zip(self.lengths, self._ends):
                yield column[end - length : end].astype(np.int64)


class _Images:
    """Examples as pixels, made batch by batch: all of them at once may not fit into memory."""

    def __init__(self, examples: Examples, processor: Any) -> None:
        self._images = examples.column("image")
        self._processor = processor
        self._plain = isinstance(getattr(processor, "size", None), int)
        if self._plain:
            for i, image in enumerate(self._images):
                _check_shape(image, processor, f"{examples.spec}, image {i + 1}")
        self.lengths, self.longest = np.ones(len(self._images), dtype=np.int64), 1
        to_json = getattr(processor, "to_json_string", lambda: repr(processor))
        self.settings = [to_json()]

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        images = [self._images[row] for row in rows]
        if self._plain:
            pixels = torch.stack([_plain_pixels(x, self._processor.channels) for x in images])
        else:
            channels = len(getattr(self._processor, "image_mean", None) or (0, 0, 0))
            pixels = self._processor(
                images=[_as_bytes(image, channels) for image in images],
                return_tensors="pt",
                input_data_format="channels_last",
            )["pixel_values"]
        return {"pixel_values": pixels.to(torch.float32)}  # (B, C, H, W)

    def arrays(self) -> Iterator[np.ndarray]:
        yield from self._images


def _check_shape(image: np.ndarray, shape: ImageShape, name: str) -> None:
    depth = 1 if image.ndim == 2 else image.shape[2]
    if image.shape[:2] != (shape.size, shape.size) or depth not in (1, shape.channels):
        found = "×".join(map(str, image.shape))
        raise DataError(
            f"{name} is {found}, the model takes {shape.size}×{shape.size} with {shape.channels} "
            "channels; resize the data, or give the model an image processor"
        )


def _plain_pixels(image: np.ndarray, channels: int) -> Tensor:
    """Return (C, H, W) in 0..1; greyscale is repeated for a model that takes colour."""
    pixels = torch.from_numpy(np.ascontiguousarray(np.atleast_3d(image))).permute(2, 0, 1)
    pixels = pixels / 255 if pixels.dtype == torch.uint8 else pixels
    return pixels.expand(channels, -1, -1).to(torch.float32)


def _as_bytes(image: np.ndarray, channels: int) -> np.ndarray:
    """Return (H, W, C) uint8: processors divide by 255 whatever they are given."""
    if image.dtype != np.uint8:
        image = (image * 255).round().clip(0, 255).astype(np.uint8)
    image = np.atleast_3d(image)
    return np.repeat(image, channels, axis=2) if image.shape[2] == 1 else image


def same_tokenizer(one: Any, other: Any) -> bool:
    """Whether two processors give a text the same ids; processors of images are taken for alike."""
    if one is other or not all(hasattr(x, "padding_side") for x in (one, other)):
        return True
    probe = ["The cat's 3 naïve 猫, don't you think?", "x"]
    return bool(
        one.get_vocab() == other.get_vocab()
        and one(probe)["input_ids"] == other(probe)["input_ids"]
    )


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch without labels, scores and row numbers, which are not for the model to see."""
    return {name: value for name, value in batch.items() if name not in TARGETS}


def check_labels(data: Examples | Batches, num_labels: int) -> None:
    """Raise DataError if a label is not one of the classes 0 … num_labels − 1."""
    examples = data.examples if isinstance(data, Batches) else data
    for i, label in enumerate(examples.column("label")):
        if not 0 <= label < num_labels:
            raise DataError(
                f"{examples.spec}, example {i + 1} has label {label}, and the model knows 0 to "
                f"{num_labels - 1}; use matching data, or a model with more classes"
            )


def pick(outputs: Mapping[str, np.ndarray], output: str) -> np.ndarray:
    """Return one named output; raise DataError with the names there are."""
    if output not in outputs:
        raise DataError(
            f"the model has no output {output}, only {', '.join(outputs)}; choose another metric"
        )
    return np.asarray(outputs[output])


def collect(predict: Predict, batches: Batches, output: str) -> np.ndarray:
    """Return one output for all examples, (N, …), in their own order and not in the batches'.

    Raises DataError where the output is missing, or differs in shape from batch to batch.
    """
    parts = [pick(predict(model_inputs(batch)), output) for batch in batches]
    if len({part.shape[1:] for part in parts}) > 1:
        raise DataError(f"the output {output} depends on the length of the text; choose another")
    return restore_order(parts, batches)


def restore_order(parts: Sequence[np.ndarray], batches: Batches) -> np.ndarray:
    """Return rows that were gathered batch by batch in the order of the examples."""
    return np.concatenate(parts)[np.argsort(np.concatenate(batches.rows))]
