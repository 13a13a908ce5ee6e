import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from calib_data.characters import character_tokenizer
from calib_data.errors import ConfigError, DataError, ModelError
from compress import vocabulary
from compress.adapter_plan import AdapterConfig
from compress.adapters import add_adapter
from compress.checkpoint import Checkpoint, weights_sha256
from compress.loading import open_checkpoint
from compress.quantize import quantize
from compress.quantize_config import QuantizeConfig
from compress.signature import transformer_signature
from compress.tokenizer_subset import closed, subset, word_pieces
from compress.vocabulary import prune_vocabulary
from tests.tiny import FAMILIES, SENTENCES, VISION, tiny_checkpoint, tiny_tokenizer, write

TEXTS = ["the cat sat on the mat", "a small red bird flew", "what is a python module"]
CORPUS = [
    "the lowest newer wider tower is lower than the newest and widest one",
    "they tower lower and wider in the new tower",
    "unbelievable widening of newness",
] * 3


def trained(kind: str) -> Any:
    """Return a tokenizer of this kind trained on CORPUS, as real ones are set up."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer: Any
    if kind == "bpe":  # GPT-2's
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=360,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    elif kind == "bpe ends":  # CLIP's
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.BpeTrainer(
            vocab_size=120, special_tokens=special, end_of_word_suffix="</w>"
        )
    elif kind == "unigram":  # T5's
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>")
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(special_tokens=special)
    tokenizer.train_from_iterator(CORPUS, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    if kind == "bpe":
        tokenizer.post_processor = processors.RobertaProcessing(ends[1], ends[0])
    else:
        tokenizer.post_processor = processors.Sequence(
            [processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> $B </s>", ends)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    )


def tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[str]]:
    return [tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) for text in texts]


@pytest.mark.parametrize("kind", ["bpe", "bpe ends", "unigram", "words"])
def test_texts_are_split_as_before(kind: str, tmp_path: Path) -> None:
    tokenizer = trained(kind)
    texts = CORPUS[1:2]
    used = {i for text in texts for i in tokenizer(text)["input_ids"]}
    kept = closed(tokenizer, used)
    made = subset(tokenizer, kept)
    assert len(made) == len(kept) < len(tokenizer)
    assert tokens(made, texts) == tokens(tokenizer, texts)
    assert [[kept[i] for i in made(t)["input_ids"]] for t in texts] == [
        tokenizer(t)["input_ids"] for t in texts
    ]
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id"):
        assert kept[getattr(made, name)] == getattr(tokenizer, name)
    assert made.decode(made(texts[0])["input_ids"]) == tokenizer.decode(
        tokenizer(texts[0])["input_ids"]
    )
    # and other words still are, unless whole words are all it knows
    other = made(CORPUS[0])["input_ids"]
    assert (made.unk_token_id in other) == (kind == "words")
    made.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again(CORPUS)["input_ids"] == made(CORPUS)["input_ids"]


def test_merges_need_what_makes_them() -> None:
    tokenizer = trained("bpe")
    vocabulary = tokenizer.get_vocab()
    long = max((t for t in vocabulary if t.isalpha() and t.isascii()), key=len)
    assert len(long) > 3
    kept = closed(tokenizer, {vocabulary[long]})
    made = subset(tokenizer, kept)
    assert tokens(made, [long]) == tokens(tokenizer, [long])
    # without what is on the way there the token could not be made
    bare = sorted(
        {vocabulary[long]} | {i for t, i in vocabulary.items() if len(t) == 1} | {0, 1, 2, 3}
    )
    assert set(bare) < set(kept)
    assert tokens(subset(tokenizer, bare), [long]) != tokens(tokenizer, [long])


def columns(checkpoint: Checkpoint, pruned: Checkpoint) -> Tensor:
    """Return the old ids of the tokens that `pruned` has, in its order."""
    names = pruned.processor.convert_ids_to_tokens(range(len(pruned.processor)))
    return torch.tensor(checkpoint.processor.convert_tokens_to_ids(names))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in VISION])
def test_a_pruned_vocabulary_gives_the_same(family: str, tmp_path: Path) -> None:
    # opened, since a family's own tokenizer may add a token
    checkpoint = open_checkpoint(write(tiny_checkpoint(family), tmp_path / "whole"))
    before = weights_sha256(checkpoint.module)
    result = prune_vocabulary(checkpoint, TEXTS, keep=["green", "[MASK]", "two dogs"])
    pruned = result.checkpoint
    assert weights_sha256(checkpoint.module) == before
    assert result.report["tokens_after"] == len(pruned.processor) == pruned.config.vocab_size
    assert result.report["tokens_after"] < result.report["tokens_before"]
    assert result.report["parameters_after"] < result.report["parameters_before"]
    if family != "qwen2":  # whose own tokenizer makes nothing of these words
        assert {"green", "dog"} <= pruned.processor.get_vocab().keys()
    assert "house" not in pruned.processor.get_vocab()

    write(pruned, tmp_path / "out")
    again = open_checkpoint(tmp_path / "out")
    for text in TEXTS:
        old = checkpoint.processor([text], return_tensors="pt")
        new = again.processor([text], return_tensors="pt")
        assert columns(checkpoint, pruned)[new["input_ids"]].equal(old["input_ids"])
        if "decoder_input_ids" in checkpoint.signature.names:
            old["decoder_input_ids"], new["decoder_input_ids"] = old["input_ids"], new["input_ids"]
        first, second = checkpoint.predict(old), again.predict(new)
        for name, value in first.items():
            assert abs(value - second[name]).max() < 1e-4 * abs(value).max()


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("bert", "fill-mask"),
        ("roberta", "fill-mask"),
        ("gpt2", "text-generation"),
        ("llama", "text-generation"),
        ("t5", "text2text-generation"),
        ("bart", "text2text-generation"),
        ("distilbert", "fill-mask"),
        ("electra", "fill-mask"),
        ("opt", "text-generation"),
        ("gpt_neox", "text-generation"),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_heads_over_the_tokens_follow(family: str, task: str, tied: bool, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(family, task, tie_word_embeddings=tied)
    pruned = prune_vocabulary(checkpoint, TEXTS).checkpoint
    kept = columns(checkpoint, pruned)
    batch = pruned.signature.sample(2, 7)
    assert int(batch["input_ids"].max()) < len(kept)
    old = {k: kept[v] if k.endswith("input_ids") else v for k, v in batch.items()}
    write(pruned, tmp_path / "out")
    expected = torch.from_numpy(checkpoint.predict(old)["logits"])[..., kept]
    for made in (pruned, open_checkpoint(tmp_path / "out")):
        found = torch.from_numpy(made.predict(batch)["logits"])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == len(kept)
    for name in ("pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id"):
        value = getattr(checkpoint.config, name, None)
        if value is not None:
            assert kept[getattr(pruned.config, name)] == value
        stored = getattr(getattr(pruned.backbone, "generation_config", None), name, None)
        if stored is not None:
            assert kept[stored] == getattr(checkpoint.backbone.generation_config, name)


def test_positions_are_still_counted_from_the_padding() -> None:
    """RoBERTa's begin after the padding's id, so that must not move."""
    checkpoint = tiny_checkpoint("roberta")
    pruned = prune_vocabulary(checkpoint, TEXTS[:1]).checkpoint
    assert pruned.config.pad_token_id == checkpoint.config.pad_token_id == 1
    assert pruned.signature.longest == checkpoint.signature.longest


def test_what_is_not_seen_is_told_of() -> None:
    checkpoint = tiny_checkpoint("bert")
    known = prune_vocabulary(checkpoint, SENTENCES).report
    assert known["unknown_words"] == known["unknown_words_before"] == 0
    checkpoint = replace(checkpoint, processor=character_tokenizer(["abcdef "]))
    checkpoint = replace(
        checkpoint,
        signature=transformer_signature(checkpoint.module, checkpoint.module, checkpoint.processor),
    )
    report = prune_vocabulary(checkpoint, ["ab"] * 10 + ["fab"] + ["ab"] * 9).report
    assert report["unknown_words"] == pytest.approx(1 / 5)  # f of "ab" and "fab"
    assert report["unknown_words_before"] == 0
    assert report["pieces_per_word"] == report["pieces_per_word_before"] == 1
    assert word_pieces(checkpoint.processor, ["xax"]).unknown == pytest.approx(2 / 3)


def test_rare_tokens_and_foreign_letters_go() -> None:
    checkpoint = tiny_checkpoint("bert")
    texts = ["the cat sat", "the cat ran", "the cat"] * 4
    every, frequent = (
        prune_vocabulary(checkpoint, texts, min_count=count).checkpoint.processor.get_vocab()
        for count in (1, 5)
    )
    assert set(every) - set(frequent) == {"sat", "ran"}
    assert {"q", "##q"} <= frequent.keys()  # any word of its letters is still split
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "水": 2, "##水": 3, "あ": 4}))
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    assert closed(made, {2}) == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="--vocab-min-count must be at least 1, got 0"):
        prune_vocabulary(checkpoint, texts, min_count=0)


def test_generation_settings_follow() -> None:
    checkpoint = tiny_checkpoint("gpt2", "text-generation")
    settings = checkpoint.backbone.generation_config
    place = checkpoint.processor.get_vocab()["green"]
    settings.suppress_tokens = [place]
    settings.bad_words_ids = [[place, 2]]
    settings.max_new_tokens = 7
    pruned = prune_vocabulary(checkpoint, TEXTS).checkpoint
    new = pruned.processor.get_vocab()["green"]
    assert new != place
    assert pruned.backbone.generation_config.suppress_tokens == [new]
    assert pruned.backbone.generation_config.bad_words_ids == [[new, 2]]
    assert pruned.backbone.generation_config.max_new_tokens == 7
    assert settings.suppress_tokens == [place]  # the input is untouched


def test_bad_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny_checkpoint("bert")
    with pytest.raises(DataError, match="--vocab-from"):
        prune_vocabulary(checkpoint, [])
    with pytest.raises(ModelError, match="without a tokenizer"):
        prune_vocabulary(tiny_checkpoint("vit"), TEXTS)
    with pytest.raises(ModelError, match="quantized already"):
        prune_vocabulary(quantize(checkpoint, QuantizeConfig()).checkpoint, TEXTS)
    with pytest.raises(ModelError, match="adapter"):
        prune_vocabulary(add_adapter(checkpoint, AdapterConfig("lora")), TEXTS)

    class Slow:
        is_fast = False

        def get_vocab(self) -> dict[str, int]:
            return {}

    with pytest.raises(ModelError, match=r"Slow has no tokenizer\.json"):
        prune_vocabulary(replace(checkpoint, processor=Slow()), TEXTS)

    # the checks can fail: a tokenizer that splits otherwise, a row that is another's
    other = tiny_tokenizer()
    monkeypatch.setattr(vocabulary, "subset", lambda tokenizer, kept: other)
    with pytest.raises(ModelError, match="splits texts otherwise"):
        prune_vocabulary(checkpoint, TEXTS)
    monkeypatch.undo()
    shrunk = vocabulary.with_rows

    def swapped(*args: Any) -> Checkpoint:
        made = shrunk(*args)
        table = made.backbone.get_input_embeddings().weight
        with torch.no_grad():
            table.copy_(table.flip(0))
        return made

    monkeypatch.setattr(vocabulary, "with_rows", swapped)
    with pytest.raises(ModelError, match="gives another last_hidden_state"):
        prune_vocabulary(checkpoint, TEXTS)
