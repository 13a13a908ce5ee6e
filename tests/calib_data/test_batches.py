from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, ViTImageProcessor

from calib_data.batches import (
    Batches,
    ImageShape,
    check_labels,
    collect,
    model_inputs,
    same_tokenizer,
)
from calib_data.errors import ConfigError, DataError
from calib_data.objectives import Masked
from calib_data.sources import Examples
from tests.tiny import SENTENCES, tiny_batches, tiny_tokenizer


def make(**columns: list) -> Examples:
    return Examples(datasets.Dataset.from_dict(columns), "test data")


def texts(count: int = 32, **columns: list) -> Examples:
    return make(text=SENTENCES[:count], **columns)


def same(first: Batches, second: Batches, epoch: int = 0) -> bool:
    pairs = list(zip(first.iterate(epoch), second.iterate(epoch), strict=True))
    return all(a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a) for a, b in pairs)


def test_batches_hold_what_the_tokenizer_makes() -> None:
    tokenizer = tiny_tokenizer()
    examples = texts(label=list(range(32)), score=[i / 2 for i in range(32)])
    batches = Batches(examples, tokenizer, batch_size=5)
    assert len(batches) == len(list(batches)) == 7
    assert sorted(np.concatenate(batches.rows)) == list(range(32))
    for rows, batch in zip(batches.rows, batches, strict=True):
        expected = tokenizer([SENTENCES[i] for i in rows], padding="longest", return_tensors="pt")
        assert set(expected) == {"input_ids", "attention_mask", "token_type_ids"}
        for name, value in expected.items():
            assert batch[name].equal(value), name
        assert batch["labels"].equal(torch.from_numpy(rows))
        assert batch["scores"].equal(torch.from_numpy(rows / 2).float())
        assert model_inputs(batch).keys() == set(expected)


def test_pairs_jointly_or_one_side() -> None:
    tokenizer = tiny_tokenizer()
    examples = make(text=["the cat", "a"], text_pair=["a dog ran", "blue"])
    (joint,) = Batches(examples, tokenizer)
    expected = tokenizer(["the cat", "a"], ["a dog ran", "blue"], padding=True, return_tensors="pt")
    assert joint["input_ids"].equal(expected["input_ids"])
    assert joint["token_type_ids"].equal(expected["token_type_ids"])
    for side in ("text", "text_pair"):
        alone = make(text=examples.column(side))
        assert same(Batches(examples, tokenizer, field=side), Batches(alone, tokenizer))
    with pytest.raises(DataError, match="no text_pair"):
        Batches(texts(), tokenizer, field="text_pair")


def test_left_padding_and_no_pad_token() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    tokenizer.pad_token = None
    (batch,) = Batches(make(text=["the cat sat", "a"]), tokenizer)
    assert batch["attention_mask"].tolist() == [[1] * 5, [0, 0, 1, 1, 1]]
    assert batch["input_ids"][1].tolist() == [0, 0, *tokenizer("a")["input_ids"]]


def word_tokenizer() -> PreTrainedTokenizerFast:
    model = models.WordLevel({"[UNK]": 0, "cat": 1, "the": 2}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def test_a_teachers_own_tokenizer_sees_the_same_rows() -> None:
    own, theirs = tiny_tokenizer(), word_tokenizer()
    batches = Batches(texts(), own, batch_size=5, shuffle=True, teacher_processor=theirs)
    plain = Batches(texts(), own, batch_size=5, shuffle=True)
    for rows, batch, alone in zip(batches.rows, batches, plain, strict=True):
        expected = theirs([SENTENCES[i] for i in rows], padding=False)["input_ids"]
        mask = batch["teacher_attention_mask"].bool()
        found = [ids[real].tolist() for ids, real in zip(batch["teacher_input_ids"], mask)]
        assert found == expected
        assert all(batch[name].equal(value) for name, value in alone.items())
    assert batches.fingerprint != plain.fingerprint
    twice = Batches(texts(), own, batch_size=5, shuffle=True, teacher_processor=own)
    assert twice.fingerprint != batches.fingerprint


def test_tokenizers_are_told_apart_by_what_they_give() -> None:
    assert same_tokenizer(tiny_tokenizer(), tiny_tokenizer())
    assert not same_tokenizer(tiny_tokenizer(), word_tokenizer())
    kept = tiny_tokenizer()  # the same words, and nothing around a text
    kept._tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    assert not same_tokenizer(tiny_tokenizer(), kept)
    assert same_tokenizer(ImageShape(8), ImageShape(8))


def test_truncation_respects_the_smaller_bound() -> None:
    long = make(text=["the cat " * 60])
    for max_length, length in ((10, 10), (128, 64), (None, 122)):
        (batch,) = Batches(long, tiny_tokenizer(), max_length=max_length)
        assert batch["input_ids"].shape == (1, length)


def padding_share(batches: Batches) -> float:
    masks = [batch["attention_mask"] for batch in batches]
    return 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)


@pytest.mark.parametrize("shuffle", [False, True])
def test_buckets_leave_little_padding(shuffle: bool) -> None:
    words = np.random.default_rng(0).integers(1, 40, 300)
    examples = make(text=["cat " * int(n) for n in words])
    assert padding_share(Batches(examples, tiny_tokenizer(), batch_size=8, shuffle=shuffle)) < 0.05


def test_passes_repeat_and_epochs_differ() -> None:
    def shuffled(seed: int = 0, **options: Any) -> Batches:
        options = {"shuffle": True, "batch_size": 5} | options
        return Batches(texts(), tiny_tokenizer(), seed=seed, **options)

    assert same(shuffled(), shuffled())
    assert same(shuffled(), shuffled(), epoch=3)
    batches = shuffled()
    orders = [
        [tuple(b["input_ids"].flatten().tolist()) for b in batches.iterate(e)] for e in (0, 1)
    ]
    assert orders[0] != orders[1]
    assert [r.tolist() for r in batches.rows] != [r.tolist() for r in shuffled(seed=1).rows]
    for shuffle in (True, False):
        dropping = shuffled(drop_last=True, shuffle=shuffle)
        assert len(dropping) == len(list(dropping.iterate(1))) == 6
        assert {len(rows) for rows in dropping.rows} == {5}


def test_fingerprint_follows_content_order_and_settings() -> None:
    tokenizer = tiny_tokenizer()
    base = Batches(texts(), tokenizer).fingerprint
    assert len(base) == 64
    assert Batches(texts(), tokenizer).fingerprint == base
    changed = [*SENTENCES[:31], "a cat"]
    others = [
        Batches(make(text=changed), tokenizer),
        Batches(make(text=SENTENCES[::-1]), tokenizer),
        Batches(texts(label=[0] * 32), tokenizer),
        Batches(texts(label=[1] * 32), tokenizer),
        Batches(texts(), tokenizer, batch_size=4),
        Batches(texts(), tokenizer, max_length=6),
        Batches(texts(), tokenizer, shuffle=True),
        Batches(texts(), tokenizer, shuffle=True, seed=1),
    ]
    assert len({base, *(b.fingerprint for b in others)}) == len(others) + 1


def test_images_without_a_processor() -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    examples = make(image=[grey, grey + 1], label=[0, 1])
    (batch,) = Batches(examples, ImageShape(8, 3))
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert batch["pixel_values"][1, 2].equal(torch.from_numpy(grey + 1) / 255)
    scaled = make(image=[(grey / 255).astype(np.float32)])
    (floats,) = Batches(scaled, ImageShape(8, 1))
    assert floats["pixel_values"][0].equal(batch["pixel_values"][0, :1])
    with pytest.raises(DataError, match=r"image 1 is 8×8, the model takes 9×9"):
        Batches(examples, ImageShape(9, 1))


def test_images_through_a_processor() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    expected = processor(images=[image], return_tensors="pt")["pixel_values"]
    (batch,) = Batches(make(image=[image]), processor)
    assert batch["pixel_values"].equal(expected)
    (floats,) = Batches(make(image=[(image / 255).astype(np.float32)]), processor)
    assert floats["pixel_values"].equal(expected)


def test_collect_restores_the_order() -> None:
    batches = Batches(texts(label=list(range(32))), tiny_tokenizer(), batch_size=5)

    def first_ids(batch: Any) -> dict[str, np.ndarray]:
        assert "labels" not in batch
        return {"y": batch["input_ids"][:, 1:3].numpy(), "wide": batch["input_ids"].numpy()}

    ids = [tiny_tokenizer()(text)["input_ids"][1:3] for text in SENTENCES]
    assert collect(first_ids, batches, "y").tolist() == ids
    with pytest.raises(DataError, match="no output z, only y, wide"):
        collect(first_ids, batches, "z")
    with pytest.raises(DataError, match="depends on the length"):
        collect(first_ids, batches, "wide")


def test_labels_outside_the_classes_are_named() -> None:
    examples = texts(3, label=[0, 2, -1])
    check_labels(texts(2, label=[0, 2]), 3)
    with pytest.raises(DataError, match="example 2 has label 2, and the model knows 0 to 1"):
        check_labels(examples, 2)
    with pytest.raises(DataError, match="example 3 has label -1"):
        check_labels(Batches(examples, tiny_tokenizer()), 3)


def test_what_does_not_fit_is_refused() -> None:
    for options in ({"batch_size": 0}, {"max_length": 0}, {"field": "label"}):
        with pytest.raises(ConfigError):
            Batches(texts(), tiny_tokenizer(), **options)
    with pytest.raises(DataError, match="neither a tokenizer nor an image processor"):
        Batches(texts(), None)
    with pytest.raises(DataError, match="neither a tokenizer nor an image processor"):
        Batches(texts(), ImageShape(8, 1))
    with pytest.raises(DataError, match="no text, only image"):
        Batches(make(image=[np.zeros((8, 8))]), tiny_tokenizer())
    with pytest.raises(DataError, match="less than one batch"):
        Batches(texts(3), tiny_tokenizer(), drop_last=True)


def test_numbered_batches_say_which_rows_they_hold() -> None:
    plain = tiny_batches(8, 3)
    numbered = plain.numbered()
    for epoch in range(2):
        for rows, batch, other in zip(
            numbered._plan(epoch), numbered.iterate(epoch), plain.iterate(epoch)
        ):
            assert batch.pop("rows").tolist() == rows.tolist()
            assert batch.keys() == other.keys()
            assert all(batch[name].equal(value) for name, value in other.items())
    assert numbered.fingerprint == plain.fingerprint
    assert "rows" not in model_inputs(next(iter(numbered)))


def test_masked_batches_are_not_steady() -> None:
    plain = tiny_batches(8, 8)
    assert plain.steady()
    objective = Masked(tiny_tokenizer())
    masked = Batches(plain.examples, tiny_tokenizer(), batch_size=8, objective=objective)
    assert not masked.steady()


def test_texts_are_encoded_in_parts_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = Examples(
        datasets.Dataset.from_dict({"text": SENTENCES[:10], "text_pair": SENTENCES[3:13]}), "pairs"
    )
    whole = Batches(pairs, tiny_tokenizer(), batch_size=4, max_length=9)
    monkeypatch.setattr("calib_data.batches._AT_ONCE", 3)
    parts = Batches(pairs, tiny_tokenizer(), batch_size=4, max_length=9)
    assert parts.fingerprint == whole.fingerprint
    for one, other in zip(whole, parts, strict=True):
        assert all(value.equal(other[name]) for name, value in one.items())
