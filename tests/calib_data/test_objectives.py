"""Packed blocks, masked tokens and translations, as language models are trained on them."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from calib_data.batches import Batches, model_inputs
from calib_data.characters import character_tokenizer
from calib_data.errors import ConfigError
from calib_data.objectives import Masked, NextToken, Packed, Translation, Windows
from calib_data.sources import Examples
from tests.tiny import SENTENCES, tiny_tokenizer

COUNT = 8


def examples(**columns: list[Any]) -> Examples:
    return Examples(datasets.Dataset.from_dict({"text": SENTENCES[:COUNT], **columns}), "test data")


def examples_of(texts: list[str]) -> Examples:
    return Examples(datasets.Dataset.from_dict({"text": texts}), "test data")


def characters() -> Any:
    return character_tokenizer(SENTENCES)


def test_packed_blocks_hold_every_token_in_order() -> None:
    tokenizer = characters()
    made = Batches(examples(), tokenizer, batch_size=3, max_length=20, objective=Packed())
    rows = {
        int(row): batch["input_ids"][i][batch["attention_mask"][i] == 1].tolist()
        for rows, batch in zip(made.rows, made)
        for i, row in enumerate(rows)
    }
    stream = [token for row in sorted(rows) for token in rows[row]]
    end = tokenizer.eos_token_id
    expected = [t for text in SENTENCES[:COUNT] for t in [*tokenizer(text)["input_ids"], end]]
    assert stream == expected
    assert all(len(rows[row]) == 20 for row in range(len(rows) - 1))


@pytest.mark.parametrize("side", ["right", "left"])
def test_windows_predict_every_token_of_a_text_once(side: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    texts = ["the", " ".join(SENTENCES), *SENTENCES[:3]]
    made = Batches(examples_of(texts), tokenizer, batch_size=3, max_length=7, objective=Windows())
    rows = {
        int(row): batch["input_ids"][i][batch["attention_mask"][i] == 1].tolist()
        for rows, batch in zip(made.rows, made)
        for i, row in enumerate(rows)
    }
    windows = [rows[row] for row in sorted(rows)]
    assert made.longest == max(map(len, windows)) == 7
    assert len(made.lengths) == len(windows)
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        predicted = ids[:1]
        while len(predicted) < len(ids):
            window = windows.pop(0)
            assert window[0] == predicted[-1]
            predicted += window[1:]
        assert predicted == ids
    assert not windows
    whole = Batches(examples_of(texts), tokenizer, max_length=None, objective=Windows())
    assert len(whole.lengths) == len(texts)
    with pytest.raises(ConfigError, match="2 or more"):
        Batches(examples_of(texts), tokenizer, max_length=1, objective=Windows())


def test_packing_needs_a_length_and_an_end() -> None:
    for tokenizer, length in ((characters(), None), (tiny_tokenizer(), 16)):
        with pytest.raises(ConfigError, match="--pack"):
            Batches(examples(), tokenizer, max_length=length, objective=Packed())


def test_packing_changes_the_fingerprint() -> None:
    prints = {
        Batches(examples(), characters(), max_length=size, objective=objective).fingerprint
        for objective in (NextToken(), Packed())
        for size in (16, 20)
    }
    assert len(prints) == 4


def masked(seed: int = 0) -> Batches:
    tokenizer = tiny_tokenizer()
    many = Examples(datasets.Dataset.from_dict({"text": SENTENCES * 30}), "many")
    return Batches(many, tokenizer, seed=seed, objective=Masked(tokenizer))


def test_masking_is_of_the_share_and_the_kinds_it_says() -> None:
    tokenizer, made = tiny_tokenizer(), masked()
    plain = Batches(made.examples, tokenizer)
    asked = hidden = kept = usual = 0
    for batch, before in zip(made, plain):
        chosen = (batch["labels"] != -100).numpy()
        ids, was = batch["input_ids"].numpy(), before["input_ids"].numpy()
        special = np.isin(was, tokenizer.all_special_ids)
        assert not (chosen & special).any()
        assert (batch["labels"].numpy()[chosen] == was[chosen]).all()
        assert (ids[~chosen] == was[~chosen]).all()
        usual += int((~special).sum())
        asked += int(chosen.sum())
        hidden += int((ids[chosen] == tokenizer.mask_token_id).sum())
        kept += int((ids[chosen] == was[chosen]).sum())
    assert asked / usual == pytest.approx(0.15, abs=0.02)
    assert hidden / asked == pytest.approx(0.8, abs=0.05)
    assert kept / asked == pytest.approx(0.1, abs=0.04)


def test_masking_is_the_same_again_and_another_in_each_epoch() -> None:
    def labels(batches: Batches, epoch: int) -> list[Any]:
        return [batch["labels"].tolist() for batch in batches.iterate(epoch)]

    assert labels(masked(), 1) == labels(masked(), 1)
    assert labels(masked(), 1) != labels(masked(), 0)
    assert labels(masked(seed=1), 1) != labels(masked(), 1)


def test_a_short_batch_is_asked_for_something() -> None:
    tokenizer = tiny_tokenizer()
    short = Examples(datasets.Dataset.from_dict({"text": ["green"] * 12}), "short")
    for batch in Batches(short, tokenizer, batch_size=1, objective=Masked(tokenizer)):
        assert (batch["labels"] != -100).sum() >= 1


def test_masking_needs_a_mask_token() -> None:
    with pytest.raises(ConfigError, match="no mask token"):
        Masked(characters())


def test_translations_shift_the_labels_behind_the_start() -> None:
    tokenizer = characters()
    pairs = examples(text_pair=[text[::-1] for text in SENTENCES[:COUNT]], label=[0] * COUNT)
    made = Batches(pairs, tokenizer, batch_size=3, max_length=40, objective=Translation(start=7))
    for rows, batch in zip(made.rows, made):
        for i, row in enumerate(rows):
            labels = batch["labels"][i]
            real = labels[labels != -100].tolist()
            expected = tokenizer(SENTENCES[row][::-1])["input_ids"] + [tokenizer.eos_token_id]
            assert real == expected[:40]
            given = batch["decoder_input_ids"][i]
            assert given[: len(real)].tolist() == [7, *real[:-1]]
            assert (given[len(real) + 1 :] == tokenizer.pad_token_id).all()
        assert set(model_inputs(batch)) == {"input_ids", "attention_mask", "decoder_input_ids"}


def test_characters_come_back_as_they_were(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text = "To be,\n\n or  not\tto be?"
    tokenizer = character_tokenizer([text], max_length=99)
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = one(text)["input_ids"]
        assert len(ids) == len(text)
        assert one.decode(ids) == text
        assert one("z")["input_ids"] == [one.unk_token_id]
        assert one.model_max_length == 99
