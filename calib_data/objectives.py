"""What language models are trained on, made from texts: packed blocks, masked tokens, translations."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calib_data.batches import Content, Objective, Texts
from calib_data.errors import ConfigError, DataError
from calib_data.sources import Examples

IGNORED = -100  # a label that no loss counts
MASKED = 0.15  # share of the tokens that a masked language model is asked for
REPLACED = (0.8, 0.1)  # of these: shown as the mask token, as a random one; the rest as they are


class NextToken(Objective):
    """Texts one by one, for a causal language model: what follows a token is its label."""

    labelled = False


class Windows(Objective):
    """Texts one by one, a long one in windows of `max_length` tokens, so that none of it is left out.

    A window begins with the last token of the one before: every token but a text's first is predicted
    exactly once.
    """

    labelled = False
    settings = ("windows",)

    def encode(
        self, examples: Examples, tokenizer: Any, max_length: int | None, field: str
    ) -> Content:
        """Return the windows, a row each."""
        return _Windows(examples, tokenizer, max_length, field)


class _Windows(Texts):
    def __init__(
        self, examples: Examples, tokenizer: Any, max_length: int | None, field: str
    ) -> None:
        super().__init__(examples, tokenizer, None, field)
        if max_length is None:
            return
        size = min(max_length, tokenizer.model_max_length)
        if size < 2:
            raise ConfigError(f"--max-length must be 2 or more to predict a token, got {size}")
        ends, lengths = [], []
        for end, length in zip(self._ends.tolist(), self.lengths.tolist()):
            start = end - length
            while True:
                stop = min(start + size, end)
                ends.append(stop)
                lengths.append(stop - start)
                if stop == end:
                    break
                start = stop - 1
        self._ends, self.lengths = np.array(ends), np.array(lengths)
        self.longest = int(self.lengths.max())
        self.settings.append(size)


class Packed(Objective):
    """Texts one after another, each with the end token, cut into blocks of `max_length` tokens.

    No token is padding but in the last block. A batch holds `input_ids` and `attention_mask`, (B, T).
    """

    labelled = False
    settings = ("packed",)

    def encode(
        self, examples: Examples, tokenizer: Any, max_length: int | None, field: str
    ) -> Content:
        """Return the blocks; `ConfigError` without a length or an end token."""
        return _Blocks(examples, tokenizer, max_length)


class _Blocks:
    def __init__(self, examples: Examples, tokenizer: Any, max_length: int | None) -> None:
        end = tokenizer.eos_token_id
        if end is None or max_length is None or max_length < 2:
            raise ConfigError(
                "packing needs "
                + ("--max-length of 2 or more" if end is not None else "a tokenizer with eos_token")
                + "; leave --pack out, or set it"
            )
        rows = tokenizer(examples.column("text"), return_attention_mask=False)["input_ids"]
        parts = [np.asarray(_ended(row, end), dtype=np.int64) for row in rows]
        stream = np.concatenate(parts)
        size = min(max_length, tokenizer.model_max_length)
        self._blocks = [stream[i : i + size] for i in range(0, len(stream), size)]
        if len(self._blocks[-1]) < 2:  # nothing follows its only token
            self._blocks.pop()
        if not self._blocks:
            raise DataError(f"{examples.spec} has no text of two tokens; use longer texts")
        self.lengths = np.array([len(block) for block in self._blocks])
        self.longest = int(self.lengths.max())
        self.settings: list[Any] = [size, end]

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        blocks = [self._blocks[row] for row in rows]
        ids = _padded(blocks, 0)
        mask = _padded([np.ones_like(block) for block in blocks], 0)
        return {"input_ids": ids, "attention_mask": mask}

    def arrays(self) -> Iterator[np.ndarray]:
        yield from self._blocks


class Translation(Objective):
    """Two texts, the first for the encoder of an encoder–decoder and the second for its decoder.

    Beside the first text's tokens a batch holds `labels` (B, U), the second's, which end with the end
    token, if there is one, and are padded with −100; and `decoder_input_ids` (B, U), the labels one
    further right after `start`, the id that decoding starts from.
    """

    labelled = False

    def __init__(self, start: int) -> None:
        self.settings = ("translation", start)
        self._start = start

    def encode(
        self, examples: Examples, tokenizer: Any, max_length: int | None, field: str
    ) -> Content:
        """Return both texts as token ids, each cut at `max_length`."""
        return _Translations(examples, tokenizer, max_length, self._start)


class _Translations:
    def __init__(
        self, examples: Examples, tokenizer: Any, max_length: int | None, start: int
    ) -> None:
        self._source = Texts(examples, tokenizer, max_length, "text")
        if max_length is not None:
            max_length = min(max_length, tokenizer.model_max_length)
        # text_target: some tokenizers encode the language of the answer differently
        rows = tokenizer(
            text_target=examples.column("text_pair"),
            truncation=max_length is not None,
            max_length=max_length,
        )["input_ids"]
        end = tokenizer.eos_token_id
        self._labels = [np.asarray(_ended(row, end)[:max_length], dtype=np.int64) for row in rows]
        answers = np.array([len(row) for row in self._labels])
        self.lengths = self._source.lengths + answers
        self.longest = max(self._source.longest, int(answers.max()))
        self._start, self._pad = start, tokenizer.pad_token_id or 0
        self.settings = [*self._source.settings, end]

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        labels = _padded([self._labels[row] for row in rows], IGNORED)
        shifted = labels.roll(1, dims=1)
        shifted[:, 0] = self._start
        shifted = shifted.masked_fill(shifted == IGNORED, self._pad)
        return self._source.batch(rows) | {"decoder_input_ids": shifted, "labels": labels}

    def arrays(self) -> Iterator[np.ndarray]:
        yield from self._source.arrays()
        yield from self._labels


class Masked(Objective):
    """Texts of which some tokens are hidden, anew in every epoch (Devlin et al. 2019, arXiv:1810.04805).

    15 % of the tokens that are neither special nor padding are asked for: their ids are the `labels`
    (B, T), which are −100 elsewhere. Of these, 80 % become the mask token, 10 % any token. A batch
    has at least one where it has any such token.
    """

    labelled = False
    settings = ("masked", MASKED, *REPLACED)

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.mask_token_id is None:
            raise ConfigError(
                "the tokenizer has no mask token, which a masked language model needs; "
                "choose another --task"
            )
        self._mask, self._size = tokenizer.mask_token_id, len(tokenizer)
        self._special = np.array(tokenizer.all_special_ids)

    def prepare(self, batch: dict[str, Tensor], random: np.random.Generator) -> dict[str, Tensor]:
        """Return the batch with some ids replaced and `labels`."""
        ids = batch["input_ids"].numpy()
        usual = (batch["attention_mask"].numpy() == 1) & ~np.isin(ids, self._special)
        draw = random.random(ids.shape)
        chosen = usual & (draw < MASKED)
        if not chosen.any() and usual.any():
            chosen = usual & (draw == draw[usual].min())
        kind = random.random(ids.shape)
        other = random.integers(0, self._size, ids.shape)
        shown = np.where(chosen & (kind < REPLACED[0]), self._mask, ids)
        shown = np.where(chosen & (kind >= 1 - REPLACED[1]), other, shown)
        labels = np.where(chosen, ids, IGNORED)
        return batch | {"input_ids": torch.from_numpy(shown), "labels": torch.from_numpy(labels)}


def _ended(row: list[int], end: int | None) -> list[int]:
    """Return the ids with the end token last, unless there is none or it is there already."""
    return row if end is None or row[-1:] == [end] else [*row, end]


def _padded(rows: list[np.ndarray], fill: int) -> Tensor:
    """Return (rows, longest), padded on the right."""
    made = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for target, row in zip(made, rows):
        target[: len(row)] = row
    return torch.from_numpy(made)
